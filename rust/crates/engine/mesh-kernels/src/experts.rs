//! Feed-forward layers that are mixtures of experts.
//!
//! A router scores the experts for each row. Rows are gathered by expert, so that an expert's matrices are read
//! once for all rows that use them, and the products of all used experts are one loop: an expert alone is too
//! small for all cores. Then each row adds up its experts' outputs in the order of their rank.
//!
//! A row's scores, its choice of experts and the order of its sum depend on the row alone, so rows stay
//! independent bit for bit.

use std::cell::Cell;
use std::f32::consts::LOG2_E;

use crate::error::expect_len;
use crate::gemm::Input;
use crate::gemm::acts::{self, RmsNorm};
use crate::gemm::experts::{ExpertProduct, ExpertRows, multiply_experts};
use crate::matrix::QMatrix;
use crate::mem::{Buffer, TaskPointer};
use crate::simd::{self, Kernel, LANES, Simd};
use crate::{Activation, KernelError, Linear, Pool, linear, rms_norm};

/// One expert: a gated feed-forward network.
#[derive(Debug)]
pub struct Expert {
    /// The matrix before the activation.
    pub gate: QMatrix,
    /// The one that its result is multiplied by.
    pub up: QMatrix,
    /// The second half: its inputs are the first half's outputs.
    pub down: QMatrix,
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
        }
        // One after the other: that takes memory for one more matrix of each expert, not for three.
        let what = "experts' weights";
        Buffer::join(what, experts.iter_mut().flat_map(|e| e.gate.buffers()))?;
        Buffer::join(what, experts.iter_mut().flat_map(|e| e.up.buffers()))?;
        Buffer::join(what, experts.iter_mut().flat_map(|e| e.down.buffers()))?;
        let layout = |matrix: &QMatrix| matrix.parts()[0].layout;
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
        let of = |e: &Expert| e.gate.bytes() + e.up.bytes() + e.down.bytes();
        self.experts.iter().map(of).sum()
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
    fn of<'a>(matrices: impl Iterator<Item = &'a QMatrix>) -> Forms {
        let mut forms = Forms::default();
        for part in matrices.flat_map(QMatrix::parts) {
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
        let matrices = [&self.gate, &self.up, &self.down];
        matrices.iter().map(|matrix| matrix.parts().len()).sum()
    }
}

/// A feed-forward layer with a mixture of experts.
#[derive(Debug, Clone, Copy)]
pub struct MixtureLayer<'a> {
    /// Norm of the input rows, before router and experts.
    pub norm: RmsNorm<'a>,
    /// Scores the experts: one output for each.
    pub router: &'a QMatrix,
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
}

/// Computes the layer in place over `x`: adds the outputs of the `used` experts with the highest scores, each
/// times its weight. Of experts with equal scores the one with the lowest index comes first; a score that is
/// no number comes last.
///
/// # Errors
/// When the router does not fit the experts, or a buffer does not fit them.
pub fn mixture(
    pool: &Pool,
    layer: &MixtureLayer<'_>,
    x: &mut [f32],
    rows: usize,
) -> Result<(), KernelError> {
    let (_, width) = layer.experts.widths();
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
    expect_len("the rows", x.len(), rows.saturating_mul(width))?;
    let mut scratch = SCRATCH.take();
    let done = x
        .chunks_mut((BLOCK * width).max(1))
        .try_for_each(|x| scratch.compute(pool, layer, x));
    SCRATCH.set(scratch);
    done
}

/// Rows that are computed at once. More rows use an expert's matrices more often once they are read; fewer need
/// less memory between the steps, which is that of `used` rows for each.
const BLOCK: usize = 512;

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
        let (router, options) = (layer.router, Linear::default());
        linear(pool, router, &self.normed, rows, &mut self.scores, &options)?;
        self.choice.choose(pool, layer, &self.scores);

        let total = self.choice.from.len();
        self.middle.reserve("the rows between", total * wide * 4)?;
        self.outputs
            .reserve("the experts' outputs", total * width * 4)?;
        let from = std::mem::take(&mut self.choice.from);
        self.gather(pool, experts.first, Source::Normed(&from), width)?;
        self.choice.from = from;
        self.first_half(pool, layer, total, width, wide)?;
        self.gather(pool, experts.second, Source::Middle(total), wide)?;
        let middle = &self.middle.floats_mut()[..total * wide];
        let down = ExpertProduct {
            experts: &experts.experts,
            matrix: |expert| &expert.down,
            up: None,
            activation: None,
            input: Input {
                acts: self.acts.bytes(),
                x: middle,
                rows: total,
            },
            out: TaskPointer(self.outputs.as_mut_ptr().cast()),
        };
        multiply_experts(pool, &self.choice.groups, wide, &down);
        let outputs = &self.outputs.floats_mut()[..total * width];
        self.choice.add_up(pool, layer.used, outputs, width, x);
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
        let groups = &self.choice.groups;
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
        let groups = &self.choice.groups;
        let input = Input {
            acts: self.acts.bytes(),
            x: &self.gathered,
            rows: total,
        };
        let mut product = ExpertProduct {
            experts,
            matrix: |expert| &expert.gate,
            up: Some((|expert| &expert.up, layer.activation)),
            activation: None,
            input,
            out: TaskPointer(self.middle.as_mut_ptr().cast()),
        };
        if layer.experts.together {
            multiply_experts(pool, groups, width, &product);
            return Ok(());
        }
        product.up = None;
        product.activation = Some(layer.activation);
        multiply_experts(pool, groups, width, &product);
        self.ups.reserve("the rows of up", total * wide * 4)?;
        let ups = ExpertProduct {
            experts,
            matrix: |expert| &expert.up,
            up: None,
            activation: None,
            input,
            out: TaskPointer(self.ups.as_mut_ptr().cast()),
        };
        multiply_experts(pool, groups, width, &ups);
        let ups = &self.ups.floats_mut()[..total * wide];
        let middle = self.middle.floats_mut().iter_mut();
        middle.zip(ups).for_each(|(gate, up)| *gate *= *up);
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

/// Which experts compute which rows.
#[derive(Debug, Default)]
struct Choice {
    /// Of each row its experts by rank, and their weights.
    experts: Vec<u32>,
    weights: Vec<f32>,
    /// Of each row and rank its place among the gathered rows.
    places: Vec<u32>,
    /// The row of each gathered row.
    from: Vec<u32>,
    /// The gathered rows of each expert that has any.
    groups: Vec<ExpertRows>,
}

impl Choice {
    fn choose(&mut self, pool: &Pool, layer: &MixtureLayer<'_>, scores: &[f32]) {
        let (count, used) = (layer.experts.count(), layer.used);
        let rows = scores.len() / count;
        self.experts.resize(rows * used, 0);
        self.weights.resize(rows * used, 0.0);
        simd::run(
            pool.isa(),
            Route {
                scores,
                count,
                used,
                normalised: layer.normalised,
                scale: layer.scale,
                experts: &mut self.experts,
                weights: &mut self.weights,
            },
        );
        self.group(count, used, pool.isa().tile_rows());
    }

    /// Gathers rows by expert, those of an expert in their order. Where a tile more is slower than rows more, the
    /// last row is repeated: its results are left alone.
    fn group(&mut self, count: usize, used: usize, tile: usize) {
        let mut ends = vec![0_u32; count];
        for &expert in &self.experts {
            ends[expert as usize] += 1;
        }
        self.groups.clear();
        let mut start = 0;
        for (expert, end) in ends.iter_mut().enumerate() {
            let rows = start..start + padded(*end as usize, tile);
            // From here on: where the expert's next row goes.
            *end = start as u32;
            start = rows.end;
            if !rows.is_empty() {
                self.groups.push(ExpertRows { expert, rows });
            }
        }
        self.from.resize(start, 0);
        self.places.resize(self.experts.len(), 0);
        for (i, &expert) in self.experts.iter().enumerate() {
            let next = &mut ends[expert as usize];
            self.from[*next as usize] = (i / used) as u32;
            self.places[i] = *next;
            *next += 1;
        }
        for group in &self.groups {
            let end = ends[group.expert] as usize;
            let last = self.from[end - 1];
            self.from[end..group.rows.end].fill(last);
        }
    }

    /// Adds to each row its experts' outputs times their weights.
    fn add_up(&self, pool: &Pool, used: usize, outputs: &[f32], width: usize, x: &mut [f32]) {
        let rows = x.len() / width;
        let chunk = match outputs.len() < 32 * 1024 {
            true => rows.max(1),
            false => rows.div_ceil(4 * pool.threads()),
        };
        let out = TaskPointer(x.as_mut_ptr());
        pool.run(rows.div_ceil(chunk), &|task| {
            let rows = task * chunk..((task + 1) * chunk).min(rows);
            for row in rows {
                // SAFETY: this task alone writes this row, and `x` holds them all.
                let x =
                    unsafe { std::slice::from_raw_parts_mut(out.get().add(row * width), width) };
                let sum = WeightedSum {
                    places: &self.places[row * used..][..used],
                    weights: &self.weights[row * used..][..used],
                    outputs,
                    x,
                };
                simd::run(pool.isa(), sum);
            }
        });
    }
}

/// Rows with which `rows` rows make the fewest tiles: 11 rows are tiles of 8, 2 and 1, 12 are tiles of 8 and 4.
fn padded(rows: usize, tile: usize) -> usize {
    let whole = rows / tile * tile;
    match rows - whole {
        0 => whole,
        rest => whole + rest.next_power_of_two(),
    }
}

/// Chooses the experts of each row and their weights.
struct Route<'a> {
    scores: &'a [f32],
    count: usize,
    used: usize,
    normalised: bool,
    scale: f32,
    experts: &'a mut [u32],
    weights: &'a mut [f32],
}

impl Kernel for Route<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.scores.chunks_exact(self.count);
        let chosen = self.experts.chunks_exact_mut(self.used);
        let weights = self.weights.chunks_exact_mut(self.used);
        for ((scores, experts), weights) in rows.zip(chosen).zip(weights) {
            highest(scores, experts, weights);
            // The highest score.
            let peak = weights[0];
            let total = match self.normalised {
                true => exponentials(s, weights, peak),
                false => {
                    let mut all = [0.0; LANES];
                    let mut total = 0.0;
                    for scores in scores.chunks(LANES) {
                        let all = &mut all[..scores.len()];
                        all.copy_from_slice(scores);
                        total += exponentials(s, all, peak);
                    }
                    exponentials(s, weights, peak);
                    total
                }
            };
            let factor = self.scale / total;
            weights.iter_mut().for_each(|weight| *weight *= factor);
        }
    }
}

/// Writes the indices of the highest scores and those scores, highest first, equal ones in the order of their
/// indices. No number counts as the lowest score.
fn highest(scores: &[f32], experts: &mut [u32], best: &mut [f32]) {
    let mut filled = 0;
    for (expert, &score) in scores.iter().enumerate() {
        let score = if score.is_nan() {
            f32::NEG_INFINITY
        } else {
            score
        };
        if filled == best.len() && score <= best[filled - 1] {
            continue;
        }
        let at = best[..filled].partition_point(|better| *better >= score);
        filled = (filled + 1).min(best.len());
        // The last one falls out if all places are taken.
        best.copy_within(at..filled - 1, at + 1);
        experts.copy_within(at..filled - 1, at + 1);
        best[at] = score;
        experts[at] = expert as u32;
    }
}

/// The lowest exponent of 2 that is told from others.
const LOWEST: f32 = -126.0;

/// Replaces each value by `e^(value - peak)`, which is at most 1, and gives their sum in order.
#[inline(always)]
fn exponentials<S: Simd>(s: S, values: &mut [f32], peak: f32) -> f32 {
    let mut total = 0.0;
    for values in values.chunks_mut(LANES) {
        let mut x = [0.0; LANES];
        for (x, value) in x.iter_mut().zip(&*values) {
            // The peak may be infinite, and a value no number, which then counts as the lowest.
            *x = match *value == peak {
                true => 0.0,
                false => ((*value - peak) * LOG2_E).max(LOWEST),
            };
        }
        // SAFETY: an array of 16.
        unsafe { s.store(x.as_mut_ptr(), s.exp2(s.load(x.as_ptr()))) };
        values.copy_from_slice(&x[..values.len()]);
        total += values.iter().sum::<f32>();
    }
    total
}

/// `x += Σ weight · output`, in the order of the ranks.
struct WeightedSum<'a> {
    /// Rows of `outputs`.
    places: &'a [u32],
    weights: &'a [f32],
    outputs: &'a [f32],
    x: &'a mut [f32],
}

impl Kernel for WeightedSum<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.x.len();
        let outputs = |place: u32| &self.outputs[place as usize * width..][..width];
        let whole = width / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            let mut sum = s.splat(0.0);
            for (&place, &weight) in self.places.iter().zip(self.weights) {
                let output = &outputs(place)[at..][..LANES];
                // SAFETY: 16 numbers.
                let output = unsafe { s.load(output.as_ptr()) };
                sum = s.fma(s.splat(weight), output, sum);
            }
            let x = &mut self.x[at..][..LANES];
            // SAFETY: 16 numbers.
            unsafe { s.store(x.as_mut_ptr(), s.add(s.load(x.as_ptr()), sum)) };
        }
        for at in whole..width {
            let weighted = self.places.iter().zip(self.weights);
            self.x[at] += weighted
                .map(|(&place, weight)| weight * outputs(place)[at])
                .sum::<f32>();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_gathered_by_expert_and_padded_to_whole_tiles() {
        let mut choice = Choice {
            // Two experts of each of seven rows.
            experts: vec![3, 0, 0, 2, 0, 3, 0, 2, 0, 3, 2, 0, 0, 2],
            ..Choice::default()
        };
        choice.group(4, 2, 8);
        let groups: Vec<_> = choice
            .groups
            .iter()
            .map(|g| (g.expert, g.rows.clone()))
            .collect();
        assert_eq!(groups, [(0, 0..8), (2, 8..12), (3, 12..16)]);
        assert_eq!(
            choice.from,
            [0, 1, 2, 3, 4, 5, 6, 6, 1, 3, 5, 6, 0, 2, 4, 4]
        );
        for (i, &place) in choice.places.iter().enumerate() {
            assert_eq!(choice.from[place as usize], i as u32 / 2);
        }
        assert_eq!(
            [1, 2, 3, 5, 8, 11, 13].map(|rows| padded(rows, 8)),
            [1, 2, 4, 8, 8, 12, 16]
        );
        assert_eq!([1, 3, 7].map(|rows| padded(rows, 1)), [1, 3, 7]);
    }

    #[test]
    fn the_highest_scores_come_first_and_equal_ones_in_order() {
        let scores = [1.0, f32::NAN, 3.0, 1.0, f32::NEG_INFINITY, 3.0, 2.0];
        let (mut experts, mut best) = ([9; 5], [0.0; 5]);
        highest(&scores, &mut experts, &mut best);
        assert_eq!(
            (experts, best),
            ([2, 5, 6, 0, 3], [3.0, 3.0, 2.0, 1.0, 1.0])
        );
        let (mut experts, mut best) = ([9; 7], [0.0; 7]);
        highest(&scores, &mut experts, &mut best);
        assert_eq!(experts, [2, 5, 6, 0, 3, 1, 4]);
    }
}
