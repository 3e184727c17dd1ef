//! Which experts compute a row, and the sum of their outputs.

use std::f32::consts::LOG2_E;

use super::MixtureLayer;
use crate::Pool;
use crate::grouping::{Gathered, highest};
use crate::mem::TaskPointer;
use crate::simd::{self, Kernel, LANES, Simd};

/// Which experts compute which rows.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// Of each row its experts by rank, and their weights.
    experts: Vec<u32>,
    weights: Vec<f32>,
    pub(super) gathered: Gathered,
}

impl Choice {
    pub(super) fn choose(&mut self, pool: &Pool, layer: &MixtureLayer<'_>, scores: &[f32]) {
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
        self.gathered
            .gather(&self.experts, count, used, pool.isa().tile_rows());
    }

    /// Adds to each row its experts' outputs times their weights.
    pub(super) fn add_up(
        &self,
        pool: &Pool,
        used: usize,
        outputs: &[f32],
        width: usize,
        x: &mut [f32],
    ) {
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
                    places: &self.gathered.places[row * used..][..used],
                    weights: &self.weights[row * used..][..used],
                    outputs,
                    x,
                };
                simd::run(pool.isa(), sum);
            }
        });
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
