//! Activations as the products read them: signed bytes with one f32 scale per 32.
//!
//! Rows are put into tiles of 8, 4, 2 and 1 (4 or 2 at most where registers are few); within a tile, block by
//! block, lie the bytes of all its rows interleaved by four (`[8][rows][4]`), then per row the scale, scale ×
//! sum, −sum, and −sum of the first half. How rows are grouped changes addresses, never values.

use crate::grouping::ExpertRows;
use crate::layout::BLOCK;
use crate::mem::{Buffer, TaskPointer};
use crate::norm::normalise;
use crate::simd::{self, Kernel, Simd};
use crate::{KernelError, Pool};

/// Bytes per row and block.
pub(crate) const ROW_BLOCK: usize = BLOCK + 16;

/// A weight vector and the epsilon of an RMS norm.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm<'a> {
    /// One factor per input.
    pub weight: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

/// Tiles that `rows` rows are put into: `(first row, rows)`.
pub(crate) fn tiles(
    range: std::ops::Range<usize>,
    largest: usize,
) -> impl Iterator<Item = (usize, usize)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let left = range.end - at;
        if left == 0 {
            return None;
        }
        let take = if left >= largest {
            largest
        } else {
            1 << left.ilog2()
        };
        at += take;
        Some((at - take, take))
    })
}

/// Quantises `x` (`[rows, k]`, after `norm` where given) into `out`.
pub(crate) fn quantise(
    pool: &Pool,
    x: &[f32],
    rows: usize,
    k: usize,
    norm: Option<RmsNorm<'_>>,
    out: &mut Buffer,
    scratch: &mut Buffer,
) -> Result<(), KernelError> {
    let blocks = k / BLOCK;
    out.reserve("quantised activations", rows * blocks * ROW_BLOCK)?;
    let largest = pool.isa().tile_rows();
    if norm.is_some() {
        scratch.reserve("normalised rows", rows * k * 4)?;
    }
    let (out, scratch) = (
        TaskPointer(out.as_mut_ptr()),
        TaskPointer(scratch.as_mut_ptr()),
    );
    let chunk = rows
        .div_ceil(4 * pool.threads())
        .next_multiple_of(largest)
        .max(largest);
    // A few rows take less time than waking a thread.
    let chunk = if rows * k < 16 * 1024 { rows } else { chunk };
    pool.run(rows.div_ceil(chunk), &|task| {
        let first = task * chunk;
        simd::run(
            pool.isa(),
            Quantise {
                x,
                rows: first..(first + chunk).min(rows),
                largest,
                k,
                norm,
                out: out.get(),
                scratch: scratch.get().cast(),
            },
        );
    });
    Ok(())
}

/// Quantises a range of rows that starts at a tile.
struct Quantise<'a> {
    x: &'a [f32],
    rows: std::ops::Range<usize>,
    largest: usize,
    k: usize,
    norm: Option<RmsNorm<'a>>,
    out: *mut u8,
    scratch: *mut f32,
}

impl Kernel for Quantise<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let k = self.k;
        let blocks = k / BLOCK;
        for (first, count) in tiles(self.rows, self.largest) {
            for r in 0..count {
                let row = first + r;
                let mut x = &self.x[row * k..][..k];
                if let Some(norm) = self.norm {
                    // SAFETY: the scratch holds [rows, k] floats and only this task touches this row of it.
                    let scratch =
                        unsafe { std::slice::from_raw_parts_mut(self.scratch.add(row * k), k) };
                    normalise(s, x, norm.weight, norm.eps, scratch);
                    x = scratch;
                }
                for (b, x) in x.chunks_exact(BLOCK).enumerate() {
                    // SAFETY: the buffer holds ROW_BLOCK bytes per row and block; a tile's rows are
                    // contiguous in it, and this task alone writes this tile.
                    unsafe {
                        let at = self.out.add((first * blocks + b * count) * ROW_BLOCK);
                        block(s, x, at, count, r);
                    }
                }
            }
        }
    }
}

/// Quantises gathered rows of `x`: row `i` of the result is row `from[i]`, or row `i` without `from`. Tiles
/// begin anew with each group, which together are all rows.
pub(crate) fn quantise_groups(
    pool: &Pool,
    x: &[f32],
    from: Option<&[u32]>,
    groups: &[ExpertRows],
    k: usize,
    out: &mut Buffer,
) -> Result<(), KernelError> {
    let rows = groups.last().map_or(0, |group| group.rows.end);
    out.reserve("quantised activations", rows * (k / BLOCK) * ROW_BLOCK)?;
    let out = TaskPointer(out.as_mut_ptr());
    let largest = pool.isa().tile_rows();
    let quantise = |groups: &[ExpertRows]| {
        let job = QuantiseGroups {
            x,
            from,
            groups,
            largest,
            k,
            out: out.get(),
        };
        simd::run(pool.isa(), job);
    };
    // A few rows take less time than waking a thread.
    if rows * k < 16 * 1024 {
        quantise(groups);
        return Ok(());
    }
    let chunk = groups.len().div_ceil(4 * pool.threads());
    pool.run(groups.len().div_ceil(chunk), &|task| {
        quantise(&groups[task * chunk..][..chunk.min(groups.len() - task * chunk)]);
    });
    Ok(())
}

/// Quantises the rows of some groups.
struct QuantiseGroups<'a> {
    x: &'a [f32],
    from: Option<&'a [u32]>,
    groups: &'a [ExpertRows],
    largest: usize,
    k: usize,
    out: *mut u8,
}

impl Kernel for QuantiseGroups<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let blocks = self.k / BLOCK;
        let all = self.groups.iter().map(|group| group.rows.clone());
        for (first, count) in all.flat_map(|rows| tiles(rows, self.largest)) {
            for r in 0..count {
                let row = self.from.map_or(first + r, |from| from[first + r] as usize);
                let x = &self.x[row * self.k..][..self.k];
                for (b, x) in x.chunks_exact(BLOCK).enumerate() {
                    // SAFETY: as in `Quantise`; the tiles of a group are contiguous, and one task alone
                    // writes them.
                    unsafe {
                        let at = self.out.add((first * blocks + b * count) * ROW_BLOCK);
                        block(s, x, at, count, r);
                    }
                }
            }
        }
    }
}

/// Quantises 32 values to row `r` of a tile of `rows` at `at`.
#[inline(always)]
unsafe fn block<S: Simd>(s: S, x: &[f32], at: *mut u8, rows: usize, r: usize) {
    debug_assert_eq!(x.len(), BLOCK);
    // SAFETY: `x` is 32 floats; the caller gives ROW_BLOCK * rows bytes at `at`, and `r < rows`.
    unsafe {
        let a = s.load(x.as_ptr());
        let b = s.load(x.as_ptr().add(16));
        let peak = s.largest(s.max(s.abs(a), s.abs(b)));
        let scale = peak / 127.0;
        let inverse = s.splat(if peak > 0.0 { 127.0 / peak } else { 0.0 });
        let mut q = [0_i8; BLOCK];
        s.store_i8(q.as_mut_ptr(), s.round(s.mul(a, inverse)));
        s.store_i8(q.as_mut_ptr().add(16), s.round(s.mul(b, inverse)));
        let words = q.as_ptr().cast::<u32>();
        for group in 0..8 {
            let to = at.add((group * rows + r) * 4).cast::<u32>();
            to.write_unaligned(words.add(group).read_unaligned());
        }
        let half: i32 = q[..16].iter().map(|&q| i32::from(q)).sum();
        let sum: i32 = half + q[16..].iter().map(|&q| i32::from(q)).sum::<i32>();
        let tail = at.add(BLOCK * rows).cast::<f32>().add(r);
        tail.write_unaligned(scale);
        tail.add(rows).write_unaligned(scale * sum as f32);
        tail.add(2 * rows).cast::<i32>().write_unaligned(-sum);
        tail.add(3 * rows).cast::<i32>().write_unaligned(-half);
    }
}
