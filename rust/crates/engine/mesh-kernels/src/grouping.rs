//! The choice of the highest scores, and rows gathered by the experts that compute them.

use std::ops::Range;

/// Rows that one expert computes: a range of the rows that were gathered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExpertRows {
    pub(crate) expert: usize,
    pub(crate) rows: Range<usize>,
}

/// Rows gathered by expert.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    /// Of each row and rank its place among the gathered rows.
    pub(crate) places: Vec<u32>,
    /// The row of each gathered row.
    pub(crate) from: Vec<u32>,
    /// The gathered rows of each expert that has any.
    pub(crate) groups: Vec<ExpertRows>,
}

impl Gathered {
    /// Gathers rows by expert (`used` of `count` for each), those of an expert in their order. Where a tile more
    /// is slower than rows more, the last row is repeated: its results are left alone.
    pub(crate) fn gather(&mut self, experts: &[u32], count: usize, used: usize, tile: usize) {
        let mut ends = vec![0_u32; count];
        for &expert in experts {
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
        self.places.resize(experts.len(), 0);
        for (i, &expert) in experts.iter().enumerate() {
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
}

/// Rows with which `rows` rows make the fewest tiles: 11 rows are tiles of 8, 2 and 1, 12 are tiles of 8 and 4.
pub(crate) fn padded(rows: usize, tile: usize) -> usize {
    let whole = rows / tile * tile;
    match rows - whole {
        0 => whole,
        rest => whole + rest.next_power_of_two(),
    }
}

/// Writes the indices of the highest scores and those scores, highest first, equal ones in the order of their
/// indices. No number counts as the lowest score.
pub(crate) fn highest(scores: &[f32], experts: &mut [u32], best: &mut [f32]) {
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
