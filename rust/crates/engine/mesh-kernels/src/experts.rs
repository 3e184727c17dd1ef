//! Feed-forward layers that are mixtures of experts.
//!
//! A router scores the experts for each row. Rows are gathered by expert, so that an expert's matrices are read
//! once for all rows that use them, and the products of all used experts are one loop: an expert alone is too
//! small for all cores. Then each row adds up its experts' outputs in the order of their rank.
//!
//! A row's scores, its choice of experts and the order of its sum depend on the row alone, so rows stay
//! independent bit for bit.

mod routing;
mod shared;

use std::cell::Cell;

use crate::error::expect_len;
use crate::gemm::Input;
use crate::gemm::acts::{self, RmsNorm};
use crate::gemm::experts::{ExpertProduct, multiply_experts};
use crate::linear::Activate;
use crate::matrix::QMatrix;
use crate::mem::{Buffer, TaskPointer};
use crate::{Activation, KernelError, Linear, Pool, linear, rms_norm, simd};
use routing::Choice;
pub use shared::SharedExpert;
use shared::SharedScratch;

/// One expert: a gated feed-forward network.
#[derive(Debug)]
pub struct Expert {
    /// The matrix before the activation.
    pub gate: ExpertMatrix,
    /// The one that its result is multiplied by.
    pub up: ExpertMatrix,
    /// The second half: its inputs are the first half's outputs.
    pub down: ExpertMatrix,
}

/// A matrix of an expert.
#[derive(Debug)]
pub struct ExpertMatrix {
    /// The weights.
    pub weights: QMatrix,
    /// Added to every product: one number per output.
    pub bias: Option<Vec<f32>>,
}

impl From<QMatrix> for ExpertMatrix {
    /// A matrix without bias.
    fn from(weights: QMatrix) -> Self {
        ExpertMatrix {
            weights,
            bias: None,
        }
    }
}

impl ExpertMatrix {
    fn n(&self) -> usize {
        self.weights.n()
    }

    fn k(&self) -> usize {
        self.weights.k()
    }
}

/// The experts of a layer, all of one shape.
#[derive(Debug)]
pub struct Experts {
    experts: Vec<Expert>,
    /// Gate and up of each expert have one layout, so that one pass computes both.
    together: bool,
    /// The forms of rows that gate and up read.
    first: Forms,
    /// The forms of rows that down reads.
    second: Forms,
}

impl Experts {
    /// The experts of a layer. Their matrices are moved next to each other in memory.
    ///
    /// # Errors
    /// If there are none, or their shapes differ or do not chain, or memory is short.
    pub fn new(mut experts: Vec<Expert>) -> Result<Experts, KernelError> {
        let Some(one) = experts.first() else {
            return Err(KernelError::Dimension {
                what: "number of experts",
                value: 0,
                need: "at least one is needed",
            });
        };
        let (wide, narrow) = (one.gate.n(), one.gate.k());
        for expert in &experts {
            for (what, left, right) in [
                ("outputs of experts' gates", wide, expert.gate.n()),
                ("inputs of experts' gates", narrow, expert.gate.k()),
                ("outputs of gate and up", wide, expert.up.n()),
                ("inputs of gate and up", narrow, expert.up.k()),
                ("outputs of gate and inputs of down", wide, expert.down.k()),
                (
                    "inputs of gate and outputs of down",
                    narrow,
                    expert.down.n(),
                ),
                ("parts of an expert's matrices", 3, expert.parts()),
            ] {
                if left != right {
                    return Err(KernelError::Mismatch { what, left, right });
                }
            }
            for matrix in expert.matrices() {
                if let Some(bias) = &matrix.bias {
                    expect_len("the bias of an expert", bias.len(), matrix.n())?;
                }
            }
        }
        // One after the other: that takes memory for one more matrix of each expert, not for three.
        let what = "experts' weights";
        Buffer::join(
            what,
            experts.iter_mut().flat_map(|e| e.gate.weights.buffers()),
        )?;
        Buffer::join(
            what,
            experts.iter_mut().flat_map(|e| e.up.weights.buffers()),
        )?;
        Buffer::join(
            what,
            experts.iter_mut().flat_map(|e| e.down.weights.buffers()),
        )?;
        let layout = |matrix: &ExpertMatrix| matrix.weights.parts()[0].layout;
        let together = |expert: &Expert| layout(&expert.gate) == layout(&expert.up);
        Ok(Experts {
            together: experts.iter().all(together),
            first: Forms::of(experts.iter().flat_map(|e| [&e.gate, &e.up])),
            second: Forms::of(experts.iter().map(|e| &e.down)),
            experts,
        })
    }

    /// Number of experts.
    pub fn count(&self) -> usize {
        self.experts.len()
    }

    /// Bytes of all matrices.
    pub fn bytes(&self) -> usize {
        let matrices = self.experts.iter().flat_map(Expert::matrices);
        matrices.map(|matrix| matrix.weights.bytes()).sum()
    }

    /// Width of the rows between an expert's halves, and of those around it.
    fn widths(&self) -> (usize, usize) {
        (self.experts[0].gate.n(), self.experts[0].gate.k())
    }
}

/// The forms of rows that products with some matrices read.
#[derive(Debug, Clone, Copy, Default)]
struct Forms {
    quantised: bool,
    floats: bool,
}

impl Forms {
    fn of<'a>(matrices: impl Iterator<Item = &'a ExpertMatrix>) -> Forms {
        let mut forms = Forms::default();
        for part in matrices.flat_map(|matrix| matrix.weights.parts()) {
            match part.layout.quantised() {
                Some(_) => forms.quantised = true,
                None => forms.floats = true,
            }
        }
        forms
    }
}

impl Expert {
    fn parts(&self) -> usize {
        let parts = |matrix: &ExpertMatrix| matrix.weights.parts().len();
        self.matrices().map(parts).into_iter().sum()
    }

    fn matrices(&self) -> [&ExpertMatrix; 3] {
        [&self.gate, &self.up, &self.down]
    }
}

/// A feed-forward layer with a mixture of experts.
#[derive(Debug, Clone, Copy)]
pub struct MixtureLayer<'a> {
    /// Norm of the input rows, before router and experts.
    pub norm: RmsNorm<'a>,
    /// Scores the experts: one output for each.
    pub router: &'a QMatrix,
    /// Added to the scores.
    pub router_bias: Option<&'a [f32]>,
    /// The experts.
    pub experts: &'a Experts,
    /// The activation applied to the product with an expert's gate.
    pub activation: Activation,
    /// Experts that compute a row.
    pub used: usize,
    /// The weights of a row's experts add up to 1 (a softmax over their scores); otherwise they are those of a
    /// softmax over the scores of all experts.
    pub normalised: bool,
    /// Factor on the weights.
    pub scale: f32,
    /// The expert that computes every row, if there is one.
    pub shared: Option<SharedExpert<'a>>,
}

/// Computes the layer in place over `x`: adds the outputs of the `used` experts with the highest scores, each
/// times its weight, and that of the shared expert. Of experts with equal scores the one with the lowest index
/// comes first; NaN ranks last.
///
/// # Errors
/// When the router does not fit the experts, or a buffer does not fit them.
pub fn mixture(
    pool: &Pool,
    layer: &MixtureLayer<'_>,
    x: &mut [f32],
    rows: usize,
) -> Result<(), KernelError> {
    let (wide, width) = layer.experts.widths();
    for (what, left, right) in [
        (
            "outputs of the router and experts",
            layer.router.n(),
            layer.experts.count(),
        ),
        ("inputs of router and experts", layer.router.k(), width),
    ] {
        if left != right {
            return Err(KernelError::Mismatch { what, left, right });
        }
    }
    if layer.used == 0 || layer.used > layer.experts.count() {
        return Err(KernelError::OutOfRange {
            what: "number of used experts",
            index: layer.used,
            count: layer.experts.count(),
        });
    }
    if let Some(shared) = &layer.shared {
        shared.check(width)?;
    }
    expect_len("the norm's weight", layer.norm.weight.len(), width)?;
    expect_len("the rows", x.len(), rows.saturating_mul(width))?;
    let mut scratch = SCRATCH.take();
    let block = (GATHERED / layer.used.saturating_mul(width.max(wide))).clamp(1, BLOCK);
    let done = x
        .chunks_mut((block * width).max(1))
        .try_for_each(|x| scratch.compute(pool, layer, x));
    SCRATCH.set(scratch);
    done
}

/// Rows that are computed at once. More rows use an expert's matrices more often once they are read; fewer need
/// less memory between the steps, which is that of `used` rows for each.
const BLOCK: usize = 512;
/// Most numbers of gathered rows, whatever the file says about widths and experts.
const GATHERED: usize = 1 << 24;

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// Memory between the steps of a layer, kept between calls.
#[derive(Debug, Default)]
struct Scratch {
    normed: Vec<f32>,
    /// `[rows, experts]`.
    scores: Vec<f32>,
    choice: Choice,
    /// Rows gathered by expert, as floats and as quantised tiles.
    gathered: Vec<f32>,
    acts: Buffer,
    /// Rows between the halves, those of up alone where they are computed apart, and the experts' outputs.
    middle: Buffer,
    ups: Buffer,
    outputs: Buffer,
    shared: SharedScratch,
}

impl Scratch {
    fn compute(
        &mut self,
        pool: &Pool,
        layer: &MixtureLayer<'_>,
        x: &mut [f32],
    ) -> Result<(), KernelError> {
        let experts = layer.experts;
        let (wide, width) = experts.widths();
        let rows = x.len() / width;
        self.normed.resize(rows * width, 0.0);
        rms_norm(pool, x, layer.norm.weight, layer.norm.eps, &mut self.normed)?;
        self.scores.resize(rows * experts.count(), 0.0);
        let options = Linear {
            bias: layer.router_bias,
            ..Linear::default()
        };
        let router = layer.router;
        linear(pool, router, &self.normed, rows, &mut self.scores, &options)?;
        self.choice.choose(pool, layer, &self.scores);
        if let Some(shared) = &layer.shared {
            self.shared.compute(pool, shared, &self.normed, rows)?;
        }

        let total = self.choice.gathered.from.len();
        self.middle.reserve("the rows between", total * wide * 4)?;
        self.outputs
            .reserve("the experts' outputs", total * width * 4)?;
        let from = std::mem::take(&mut self.choice.gathered.from);
        self.gather(pool, experts.first, Source::Normed(&from), width)?;
        self.choice.gathered.from = from;
        self.first_half(pool, layer, total, width, wide)?;
        self.gather(pool, experts.second, Source::Middle(total), wide)?;
        let middle = &self.middle.floats_mut()[..total * wide];
        let down = ExpertProduct {
            experts: &experts.experts,
            matrix: |expert| &expert.down,
            up: None,
            input: Input {
                acts: self.acts.bytes(),
                x: middle,
                rows: total,
            },
            out: TaskPointer(self.outputs.as_mut_ptr().cast()),
        };
        multiply_experts(pool, &self.choice.gathered.groups, wide, &down);
        let outputs = &self.outputs.floats_mut()[..total * width];
        self.choice.add_up(pool, layer.used, outputs, width, x);
        if layer.shared.is_some() {
            self.shared.add(x, width);
        }
        Ok(())
    }

    /// Brings rows into the forms that a product reads, gathered by expert.
    fn gather(
        &mut self,
        pool: &Pool,
        forms: Forms,
        source: Source<'_>,
        k: usize,
    ) -> Result<(), KernelError> {
        let groups = &self.choice.gathered.groups;
        let (x, from): (&[f32], _) = match source {
            Source::Normed(from) => (&self.normed, Some(from)),
            Source::Middle(rows) => (&self.middle.floats_mut()[..rows * k], None),
        };
        if forms.quantised {
            acts::quantise_groups(pool, x, from, groups, k, &mut self.acts)?;
        }
        if let Some(from) = from.filter(|_| forms.floats) {
            self.gathered.clear();
            for &row in from {
                self.gathered.extend_from_slice(&x[row as usize * k..][..k]);
            }
        }
        Ok(())
    }

    /// Fills `middle` with `activation(h · Wgᵀ) * (h · Wuᵀ)` of every gathered row.
    fn first_half(
        &mut self,
        pool: &Pool,
        layer: &MixtureLayer<'_>,
        total: usize,
        width: usize,
        wide: usize,
    ) -> Result<(), KernelError> {
        let experts = &layer.experts.experts;
        let groups = &self.choice.gathered.groups;
        let input = Input {
            acts: self.acts.bytes(),
            x: &self.gathered,
            rows: total,
        };
        let mut product = ExpertProduct {
            experts,
            matrix: |expert| &expert.gate,
            up: Some((|expert| &expert.up, layer.activation)),
            input,
            out: TaskPointer(self.middle.as_mut_ptr().cast()),
        };
        if layer.experts.together {
            multiply_experts(pool, groups, width, &product);
            return Ok(());
        }
        product.up = None;
        multiply_experts(pool, groups, width, &product);
        self.ups.reserve("the rows of up", total * wide * 4)?;
        let ups = ExpertProduct {
            experts,
            matrix: |expert| &expert.up,
            up: None,
            input,
            out: TaskPointer(self.ups.as_mut_ptr().cast()),
        };
        multiply_experts(pool, groups, width, &ups);
        let activate = Activate {
            activation: layer.activation,
            gate: &mut self.middle.floats_mut()[..total * wide],
            up: &self.ups.floats_mut()[..total * wide],
        };
        simd::run(pool.isa(), activate);
        Ok(())
    }
}

/// The rows that are gathered.
enum Source<'a> {
    /// Normed rows, each as often as experts compute it.
    Normed(&'a [u32]),
    /// So many rows between the halves, which lie by expert already.
    Middle(usize),
}
