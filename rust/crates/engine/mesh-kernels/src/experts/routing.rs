//! Which experts compute a row, and the sum of their outputs.

use std::f32::consts::LOG2_E;

use super::MixtureLayer;
use crate::Pool;
use crate::gemm::experts::ExpertRows;
use crate::mem::TaskPointer;
use crate::simd::{self, Kernel, LANES, Simd};

/// Which experts compute which rows.
#[derive(Debug, Default)]
pub(super) struct Choice {
    /// Of each row its experts by rank, and their weights.
    experts: Vec<u32>,
    weights: Vec<f32>,
    /// Of each row and rank its place among the gathered rows.
    places: Vec<u32>,
    /// The row of each gathered row.
    pub(super) from: Vec<u32>,
    /// The gathered rows of each expert that has any.
    pub(super) groups: Vec<ExpertRows>,
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
