//! Large pictures decoded in overlapping tiles.
//!
//! The autoencoder's memory grows with the picture, and that of its attention with the square. A tile sees its own part of the
//! latents only, so tiles overlap by a quarter and fade into each other.

use std::ops::Range;

/// Starts of tiles of side `tile` that cover `length`, equally far apart and overlapping by a quarter at least.
pub(crate) fn starts(length: usize, tile: usize) -> Vec<usize> {
    if length <= tile {
        return vec![0];
    }
    let step = tile - tile / 4;
    let count = (length - tile).div_ceil(step.max(1)) + 1;
    (0..count)
        .map(|i| i * (length - tile) / (count - 1))
        .collect()
}

/// A picture of overlapping tiles.
pub(crate) struct Canvas {
    channels: usize,
    height: usize,
    width: usize,
    sums: Vec<f32>,
    weights: Vec<f32>,
}

impl Canvas {
    pub(crate) fn new(channels: usize, height: usize, width: usize) -> Self {
        Canvas {
            channels,
            height,
            width,
            sums: vec![0.0; channels * height * width],
            weights: vec![0.0; height * width],
        }
    }

    /// Adds a tile, row-major `[channels, rows, columns]`, that fades over `fade` pixels at the sides that others overlap.
    pub(crate) fn add(
        &mut self,
        tile: &[f32],
        rows: Range<usize>,
        columns: Range<usize>,
        fade: usize,
    ) {
        let down = ramp(&rows, self.height, fade);
        let across = ramp(&columns, self.width, fade);
        let (height, width) = (rows.len(), columns.len());
        for (y, &down) in down.iter().enumerate() {
            for (x, &across) in across.iter().enumerate() {
                let weight = down * across;
                let at = (rows.start + y) * self.width + columns.start + x;
                self.weights[at] += weight;
                for channel in 0..self.channels {
                    let value = tile[(channel * height + y) * width + x];
                    self.sums[channel * self.height * self.width + at] += weight * value;
                }
            }
        }
    }

    /// The picture `[channels, height, width]`. Every pixel is covered.
    pub(crate) fn finish(mut self) -> Vec<f32> {
        for plane in self.sums.chunks_mut(self.weights.len().max(1)) {
            plane
                .iter_mut()
                .zip(&self.weights)
                .for_each(|(sum, weight)| *sum /= weight);
        }
        self.sums
    }
}

/// Weights over a tile's side: 1 inside, falling to the sides that are not the picture's.
fn ramp(range: &Range<usize>, length: usize, fade: usize) -> Vec<f32> {
    let weight = |at: usize| {
        let begin = if range.start == 0 {
            fade
        } else {
            at - range.start + 1
        };
        let end = if range.end == length {
            fade
        } else {
            range.end - at
        };
        begin.min(end).min(fade) as f32 / fade.max(1) as f32
    };
    range.clone().map(weight).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_a_side_and_overlap() {
        for (length, tile) in [(32, 64), (64, 64), (65, 64), (200, 64), (1000, 128)] {
            let starts = starts(length, tile);
            let end = |start: &usize| start + tile.min(length);
            assert_eq!((starts[0], starts.last().map(end)), (0, Some(length)));
            for pair in starts.windows(2) {
                assert!(pair[0] + tile - pair[1] >= tile / 4, "{starts:?}");
            }
        }
    }

    #[test]
    fn tiles_of_the_same_picture_give_the_picture() {
        let (height, width) = (40, 56);
        let picture: Vec<f32> = (0..2 * height * width).map(|i| (i % 97) as f32).collect();
        let mut canvas = Canvas::new(2, height, width);
        for row in starts(height, 32) {
            for column in starts(width, 32) {
                let (rows, columns) = (row..row + 32, column..column + 32);
                let at = |c: usize, y: usize, x: usize| picture[(c * height + y) * width + x];
                let tile: Vec<f32> = (0..2)
                    .flat_map(|c| {
                        rows.clone()
                            .flat_map(move |y| (0..32).map(move |x| (c, y, x)))
                    })
                    .map(|(c, y, x)| at(c, y, column + x))
                    .collect();
                canvas.add(&tile, rows, columns, 8);
            }
        }
        let joined = canvas.finish();
        let most = joined
            .iter()
            .zip(&picture)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(most < 1e-4, "{most}");
    }
}
