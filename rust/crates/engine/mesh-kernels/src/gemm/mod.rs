//! Products of rows with packed matrices: dividing the work into tasks, and storing a finished tile.

// Register tiles are arrays indexed by row and column; iterators over several of them at once hide the
// arithmetic.
#![allow(clippy::needless_range_loop)]

pub(crate) mod acts;
mod codes;
pub(crate) mod experts;
pub(crate) mod tile;

use std::ops::Range;

use crate::layout::{BLOCK, Layout, PANEL};
use crate::matrix::{PackedPart, QMatrix};
use crate::mem::TaskPointer;
use crate::simd::{self, Kernel, Simd};
use crate::{Activation, Isa, Pool};
use acts::{ROW_BLOCK, tiles};
use tile::{Float, Table, TileFormat};

/// The rows of a product, in both forms; the one that a layout does not read may be empty.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input<'a> {
    /// Rows as quantised tiles.
    pub(crate) acts: &'a [u8],
    /// Rows as floats.
    pub(crate) x: &'a [f32],
    pub(crate) rows: usize,
}

/// The operand added to a product.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Add<'a> {
    Nothing,
    /// The value that the output holds.
    Output,
    /// Rows as long as the output's.
    Rows(&'a [f32]),
}

/// Destination of a matrix's products, with bias, activation and addend.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Destination<'a> {
    pub(crate) out: TaskPointer<f32>,
    /// Elements from one output row to the next.
    pub(crate) stride: usize,
    pub(crate) bias: Option<&'a [f32]>,
    /// Applied after the bias.
    pub(crate) activation: Option<Activation>,
    pub(crate) add: Add<'a>,
}

/// Computes all products of `input` with `matrix`. Buffers have been checked against the shapes.
pub(crate) fn multiply(pool: &Pool, matrix: &QMatrix, input: Input<'_>, sink: Destination<'_>) {
    let floats = matrix
        .parts()
        .iter()
        .all(|part| part.layout.quantised().is_none());
    let plan = TaskGrid::new(
        pool,
        matrix.panels(),
        matrix.bytes(),
        input.rows,
        row_bytes(matrix.k(), floats),
        floats,
    );
    pool.run(plan.tasks(), &|task| {
        let (rows, panels) = plan.task(task);
        let mut first_panel = 0;
        let mut first_column = 0;
        for part in matrix.parts() {
            let end = first_panel + part.panels();
            let local = panels.start.max(first_panel)..panels.end.min(end);
            if !local.is_empty() {
                part_panels(
                    pool.isa(),
                    part,
                    matrix.k(),
                    local.start - first_panel..local.end - first_panel,
                    rows.clone(),
                    input,
                    first_column,
                    sink,
                );
            }
            first_panel = end;
            first_column += part.n;
        }
    });
}

/// Computes `activation(gate) * up` for all rows. Both are one part, of the same layout and shape.
pub(crate) fn multiply_gate_up(
    pool: &Pool,
    (gate, up): (&PackedPart, &PackedPart),
    activation: Activation,
    k: usize,
    input: Input<'_>,
    out: TaskPointer<f32>,
) {
    let bytes = gate.data.len() + up.data.len();
    let width = row_bytes(k, gate.layout.quantised().is_none());
    let plan = TaskGrid::new(pool, gate.panels(), bytes, input.rows, width, false);
    pool.run(plan.tasks(), &|task| {
        let (rows, panels) = plan.task(task);
        let job = ProductTask {
            part: gate,
            up: Some(GatedPart {
                part: up,
                activation,
                biases: [None; 2],
            }),
            k,
            panels,
            rows,
            input,
            first_column: 0,
            sink: Destination {
                out,
                stride: gate.n,
                bias: None,
                activation: None,
                add: Add::Nothing,
            },
        };
        dispatch(pool.isa(), job);
    });
}

/// Division of a product: ranges of rows, and within them ranges of panels.
struct TaskGrid {
    rows: usize,
    rows_per_task: usize,
    panels: usize,
    panels_per_task: usize,
}

/// Bytes of weights below which a task is not worth claiming.
const TASK_BYTES: usize = 24 * 1024;
/// Bytes of quantised rows that stay in a core's second-level cache beside the panels that pass by.
const ROWS_BYTES: usize = 512 * 1024;

/// Bytes of one row of `k` inputs as a product reads it.
fn row_bytes(k: usize, floats: bool) -> usize {
    if floats {
        4 * k
    } else {
        (k / BLOCK * ROW_BLOCK).max(1)
    }
}

impl TaskGrid {
    fn new(
        pool: &Pool,
        panels: usize,
        bytes: usize,
        rows: usize,
        row_bytes: usize,
        pairs: bool,
    ) -> TaskGrid {
        let largest = pool.isa().tile_rows();
        let rows_per_task = (ROWS_BYTES / row_bytes).max(4 * largest) / largest * largest;
        // Each row is a pass over the panel, so with many rows a small range of panels is work enough.
        let work = bytes.saturating_mul(rows.min(rows_per_task).div_ceil(largest));
        let most = (work / TASK_BYTES).clamp(1, 8 * pool.threads());
        TaskGrid {
            rows,
            rows_per_task,
            panels,
            panels_per_task: panels
                .div_ceil(most)
                .next_multiple_of(if pairs { 2 } else { 1 })
                .max(1),
        }
    }

    fn columns(&self) -> usize {
        self.panels.div_ceil(self.panels_per_task)
    }

    fn tasks(&self) -> usize {
        self.rows.div_ceil(self.rows_per_task) * self.columns()
    }

    fn task(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let rows = index / self.columns() * self.rows_per_task;
        let panels = index % self.columns() * self.panels_per_task;
        (
            rows..(rows + self.rows_per_task).min(self.rows),
            panels..(panels + self.panels_per_task).min(self.panels),
        )
    }
}

/// A range of panels of one part (or of a gate and an up part) times a range of rows.
struct ProductTask<'a> {
    part: &'a PackedPart,
    up: Option<GatedPart<'a>>,
    k: usize,
    panels: Range<usize>,
    rows: Range<usize>,
    input: Input<'a>,
    /// Output column of the part's first.
    first_column: usize,
    sink: Destination<'a>,
}

/// The part whose product is multiplied by the activated product of a gate's part.
#[derive(Debug, Clone, Copy)]
struct GatedPart<'a> {
    part: &'a PackedPart,
    activation: Activation,
    /// Added to the products of the gate, and to those of this part.
    biases: [Option<&'a [f32]>; 2],
}

impl<'a> ProductTask<'a> {
    /// The part, and the second one of a gate.
    #[inline(always)]
    fn parts(&self) -> [Option<&'a PackedPart>; 2] {
        [Some(self.part), self.up.map(|up| up.part)]
    }
}

#[allow(clippy::too_many_arguments)]
fn part_panels(
    isa: Isa,
    part: &PackedPart,
    k: usize,
    panels: Range<usize>,
    rows: Range<usize>,
    input: Input<'_>,
    first_column: usize,
    sink: Destination<'_>,
) {
    let job = ProductTask {
        part,
        up: None,
        k,
        panels,
        rows,
        input,
        first_column,
        sink,
    };
    dispatch(isa, job);
}

fn dispatch(isa: Isa, job: ProductTask<'_>) {
    match job.part.layout {
        Layout::Q4 => simd::run(isa, Quantised::<tile::Q4>::new(isa, job)),
        Layout::Q4Signed => simd::run(isa, Quantised::<tile::Q4Signed>::new(isa, job)),
        Layout::Q4Min => simd::run(isa, Quantised::<tile::Q4Min>::new(isa, job)),
        Layout::Q4Coded => simd::run(isa, Quantised::<tile::Q4Coded>::new(isa, job)),
        Layout::Q5 => simd::run(isa, Quantised::<tile::Q5>::new(isa, job)),
        Layout::Q5Min => simd::run(isa, Quantised::<tile::Q5Min>::new(isa, job)),
        Layout::Q5Coded => simd::run(isa, Quantised::<tile::Q5Coded>::new(isa, job)),
        Layout::Q6 => simd::run(isa, Quantised::<tile::Q6>::new(isa, job)),
        Layout::Q6Halves => simd::run(isa, Quantised::<tile::Q6Halves>::new(isa, job)),
        Layout::Q8 => simd::run(isa, Quantised::<tile::Q8>::new(isa, job)),
        Layout::Q2Nibbles => simd::run(isa, Quantised::<tile::Q2Nibbles>::new(isa, job)),
        Layout::Book3Halves(_) => simd::run(isa, Quantised::<tile::Book3Halves>::new(isa, job)),
        Layout::Book4(_) => simd::run(isa, Quantised::<tile::Book4>::new(isa, job)),
        Layout::Book4Exponent(_) => simd::run(isa, Quantised::<tile::Book4Exponent>::new(isa, job)),
        Layout::Book4Halves(_) => simd::run(isa, Quantised::<tile::Book4Halves>::new(isa, job)),
        Layout::F16 => simd::run(isa, Floats::<tile::F16>::new(job)),
        Layout::Bf16 => simd::run(isa, Floats::<tile::Bf16>::new(job)),
        Layout::F32 => simd::run(isa, Floats::<tile::F32>::new(job)),
    }
}

struct Quantised<'a, T> {
    job: ProductTask<'a>,
    table: Table,
    largest: usize,
    format: std::marker::PhantomData<T>,
}

impl<'a, T> Quantised<'a, T> {
    fn new(isa: Isa, job: ProductTask<'a>) -> Self {
        Quantised {
            table: Table::of(job.part.layout),
            job,
            largest: isa.tile_rows(),
            format: std::marker::PhantomData,
        }
    }
}

impl<T: TileFormat> Kernel for Quantised<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (job, table) = (&self.job, &self.table);
        for panel in job.panels.clone() {
            for (row, count) in tiles(job.rows.clone(), self.largest) {
                // Constant conditions keep tiles that an instruction set does not use from being compiled.
                match count {
                    8 if S::ROWS >= 8 => quantised_tile::<S, T, 8>(s, job, table, panel, row),
                    4 if S::ROWS >= 4 => quantised_tile::<S, T, 4>(s, job, table, panel, row),
                    2 if S::ROWS >= 2 => quantised_tile::<S, T, 2>(s, job, table, panel, row),
                    _ => quantised_tile::<S, T, 1>(s, job, table, panel, row),
                }
            }
        }
    }
}

#[inline(always)]
fn quantised_tile<S: Simd, T: TileFormat, const R: usize>(
    s: S,
    job: &ProductTask<'_>,
    table: &Table,
    panel: usize,
    row: usize,
) {
    let blocks = job.k / BLOCK;
    let acts = &job.input.acts[row * blocks * ROW_BLOCK..][..R * blocks * ROW_BLOCK];
    let mut products = [[[0.0; PANEL]; R]; 2];
    for (part, products) in job.parts().iter().zip(&mut products) {
        let Some(part) = part else { break };
        let panel = part.panel(panel).as_ptr();
        // SAFETY: a whole panel of the part, and a whole tile of activations.
        let acc = unsafe { tile::quantised::<S, T, R>(s, panel, blocks, table, acts.as_ptr()) };
        for r in 0..R {
            // SAFETY: 16 elements.
            unsafe { s.store(products[r].as_mut_ptr(), acc[r]) };
        }
    }
    let [first, second] = &products;
    s.apart(Finish {
        job,
        panel,
        row,
        first,
        second,
    });
}

/// A matrix of floats.
struct Floats<'a, T> {
    job: ProductTask<'a>,
    format: std::marker::PhantomData<T>,
}

impl<'a, T> Floats<'a, T> {
    fn new(job: ProductTask<'a>) -> Self {
        Floats {
            job,
            format: std::marker::PhantomData,
        }
    }
}

impl<T: Float> Kernel for Floats<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let job = &self.job;
        let mut panel = job.panels.start;
        while panel < job.panels.end {
            // Two panels at once use each broadcast twice, where there are registers for it.
            let pair = S::WIDE && job.up.is_none() && panel + 2 <= job.panels.end;
            let largest = S::FLOAT_ROWS.min(if pair { 8 } else { 4 });
            for (row, count) in tiles(job.rows.clone(), largest) {
                if S::WIDE && pair {
                    match count {
                        8 => float_tile::<S, T, 8, 2>(s, job, panel, row),
                        4 => float_tile::<S, T, 4, 2>(s, job, panel, row),
                        2 => float_tile::<S, T, 2, 2>(s, job, panel, row),
                        _ => float_tile::<S, T, 1, 2>(s, job, panel, row),
                    }
                    continue;
                }
                match count {
                    4 if S::FLOAT_ROWS >= 4 => float_tile::<S, T, 4, 1>(s, job, panel, row),
                    2 if S::FLOAT_ROWS >= 2 => float_tile::<S, T, 2, 1>(s, job, panel, row),
                    _ => float_tile::<S, T, 1, 1>(s, job, panel, row),
                }
            }
            panel += if pair { 2 } else { 1 };
        }
    }
}

#[inline(always)]
fn float_tile<S: Simd, T: Float, const R: usize, const P: usize>(
    s: S,
    job: &ProductTask<'_>,
    panel: usize,
    row: usize,
) {
    let x = &job.input.x[row * job.k..][..R * job.k];
    let mut products = [[[[0.0; PANEL]; R]; P]; 2];
    for (part, products) in job.parts().iter().zip(&mut products) {
        let Some(part) = part else { break };
        let panels = &part.data.bytes()[panel * part.panel_bytes..][..P * part.panel_bytes];
        // SAFETY: P whole panels of the part, and R whole rows.
        let acc = unsafe {
            tile::floats::<S, T, R, P>(
                s,
                panels.as_ptr(),
                part.panel_bytes,
                job.k,
                x.as_ptr(),
                job.k,
            )
        };
        for p in 0..P {
            for r in 0..R {
                // SAFETY: 16 elements.
                unsafe { s.store(products[p][r].as_mut_ptr(), acc[p][r]) };
            }
        }
    }
    for p in 0..P {
        s.apart(Finish {
            job,
            panel: panel + p,
            row,
            first: &products[0][p],
            second: &products[1][p],
        });
    }
}

/// The end of a tile: activation, bias and residual. It is the same for all formats, so it is compiled apart.
struct Finish<'a> {
    job: &'a ProductTask<'a>,
    panel: usize,
    /// First row of the tile.
    row: usize,
    /// Each row's products with the panel of the first part.
    first: &'a [[f32; PANEL]],
    /// With that of the second, if there is one.
    second: &'a [[f32; PANEL]],
}

impl Kernel for Finish<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (r, (first, second)) in self.first.iter().zip(self.second).enumerate() {
            // SAFETY: 16 elements.
            let mut v = unsafe { s.load(first.as_ptr()) };
            if let Some(gated) = &self.job.up {
                // SAFETY: 16 elements.
                let mut up = unsafe { s.load(second.as_ptr()) };
                let column = self.panel * PANEL;
                let valid = PANEL.min(self.job.part.n - column);
                for (bias, product) in gated.biases.iter().zip([&mut v, &mut up]) {
                    if let Some(bias) = bias {
                        *product = s.add(*product, partial(s, &bias[column..][..valid]));
                    }
                }
                v = s.mul(gated.activation.apply(s, v), gated.activation.factor(s, up));
            }
            finish(s, self.job, self.panel, self.row + r, v);
        }
    }
}

/// Adds bias and residual to the 16 products of a row, with the activation between, and stores them.
#[inline(always)]
fn finish<S: Simd>(s: S, job: &ProductTask<'_>, panel: usize, row: usize, products: S::F) {
    let sink = &job.sink;
    let column = panel * PANEL;
    let valid = PANEL.min(job.part.n - column);
    let column = job.first_column + column;
    let at = row * sink.stride + column;
    let mut v = products;
    if let Some(bias) = sink.bias {
        v = s.add(v, partial(s, &bias[column..][..valid]));
    }
    if let Some(activation) = sink.activation {
        v = activation.apply(s, v);
    }
    // SAFETY: the output was checked to hold every row; this task alone touches these columns of this row.
    let out = unsafe { std::slice::from_raw_parts_mut(sink.out.get().add(at), valid) };
    match sink.add {
        Add::Nothing => {}
        Add::Output => v = s.add(v, partial(s, out)),
        Add::Rows(rows) => v = s.add(v, partial(s, &rows[at..][..valid])),
    }
    if valid == PANEL {
        // SAFETY: 16 elements.
        unsafe { s.store(out.as_mut_ptr(), v) };
    } else {
        let mut whole = [0.0; PANEL];
        // SAFETY: 16 elements.
        unsafe { s.store(whole.as_mut_ptr(), v) };
        out.copy_from_slice(&whole[..valid]);
    }
}

/// Up to 16 floats as a vector.
#[inline(always)]
fn partial<S: Simd>(s: S, values: &[f32]) -> S::F {
    if values.len() == PANEL {
        // SAFETY: 16 elements.
        unsafe { s.load(values.as_ptr()) }
    } else {
        let mut whole = [0.0; PANEL];
        whole[..values.len()].copy_from_slice(values);
        // SAFETY: 16 elements.
        unsafe { s.load(whole.as_ptr()) }
    }
}
