//! Products of rows with the matrices of several experts, in one loop over all of them.

use std::ops::Range;

use super::{
    Add, Destination, GatedPart, Input, ProductTask, ROWS_BYTES, TASK_BYTES, dispatch, row_bytes,
};
use crate::experts::{Expert, ExpertMatrix};
use crate::grouping::ExpertRows;
use crate::matrix::PackedPart;
use crate::mem::TaskPointer;
use crate::{Activation, Pool};

/// Chooses a matrix of an expert.
pub(crate) type Which = fn(&Expert) -> &ExpertMatrix;

/// One product of a layer's experts.
pub(crate) struct ExpertProduct<'a> {
    pub(crate) experts: &'a [Expert],
    /// The matrix of an expert.
    pub(crate) matrix: Which,
    /// The matrix whose product is multiplied by the activation of the first one's. It has the same layout and
    /// shape.
    pub(crate) up: Option<(Which, Activation)>,
    /// Tiles of the quantised rows begin where the rows of an expert do.
    pub(crate) input: Input<'a>,
    /// As many rows as the input's.
    pub(crate) out: TaskPointer<f32>,
}

struct Task<'a> {
    part: &'a PackedPart,
    up: Option<GatedPart<'a>>,
    bias: Option<&'a [f32]>,
    rows: Range<usize>,
    panels: Range<usize>,
}

/// Multiplies the rows of each group with its expert's matrix, all of which have one part and `k` inputs.
pub(crate) fn multiply_experts(
    pool: &Pool,
    groups: &[ExpertRows],
    k: usize,
    product: &ExpertProduct<'_>,
) {
    let mut tasks = Vec::new();
    let work: usize = groups.iter().map(|group| work(pool, group, product)).sum();
    let share = (work / (TASKS_PER_THREAD * pool.threads())).max(TASK_BYTES);
    for group in groups {
        add_tasks(pool, group, k, product, share, &mut tasks);
    }
    pool.run(tasks.len(), &|index| {
        let task = &tasks[index];
        let job = ProductTask {
            part: task.part,
            up: task.up,
            k,
            panels: task.panels.clone(),
            rows: task.rows.clone(),
            input: product.input,
            first_column: 0,
            sink: Destination {
                out: product.out,
                stride: task.part.n,
                bias: task.bias,
                activation: None,
                add: Add::Nothing,
            },
        };
        dispatch(pool.isa(), job);
    });
}

/// Tasks for each thread: enough that all end at about the same time.
const TASKS_PER_THREAD: usize = 8;

/// Bytes of weights that a group's product reads, each as often as tiles of rows pass by it.
fn work(pool: &Pool, group: &ExpertRows, product: &ExpertProduct<'_>) -> usize {
    let expert = &product.experts[group.expert];
    let up = product.up.map_or(0, |(up, _)| up(expert).weights.bytes());
    let bytes = (product.matrix)(expert).weights.bytes() + up;
    bytes * group.rows.len().div_ceil(pool.isa().tile_rows())
}

fn add_tasks<'a>(
    pool: &Pool,
    group: &ExpertRows,
    k: usize,
    product: &ExpertProduct<'a>,
    share: usize,
    tasks: &mut Vec<Task<'a>>,
) {
    let expert = &product.experts[group.expert];
    let matrix = (product.matrix)(expert);
    let (first, bias) = (&matrix.weights.parts()[0], matrix.bias.as_deref());
    let up = product.up.map(|(up, activation)| {
        let up = up(expert);
        GatedPart {
            part: &up.weights.parts()[0],
            activation,
            biases: [bias, up.bias.as_deref()],
        }
    });
    // That of a gate is added before the activation.
    let bias = bias.filter(|_| up.is_none());
    let tile = pool.isa().tile_rows();
    let width = row_bytes(k, first.layout.quantised().is_none());
    let rows_per_task = (ROWS_BYTES / width).max(4 * tile) / tile * tile;
    let panel_bytes = first.panel_bytes + up.map_or(0, |up| up.part.panel_bytes);
    for rows in group.rows.clone().step_by(rows_per_task) {
        let rows = rows..(rows + rows_per_task).min(group.rows.end);
        let passes = rows.len().div_ceil(tile);
        let panels_per_task = share.div_ceil(panel_bytes * passes).next_multiple_of(2);
        for panels in (0..first.panels()).step_by(panels_per_task) {
            tasks.push(Task {
                part: first,
                up,
                bias,
                rows: rows.clone(),
                panels: panels..(panels + panels_per_task).min(first.panels()),
            });
        }
    }
}
