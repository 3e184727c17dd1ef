//! Up to six queries of one key/value head over one chunk of positions, and the merging of chunks.

// Register tiles are arrays indexed by row and column; iterators over several of them at once hide the
// arithmetic.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::cache::TILE;
use crate::simd::{Kernel, LANES, Simd};

/// Positions per chunk. Chunks start at absolute multiples of it.
pub(super) const CHUNK: usize = 128;
/// Most queries at a time, on any instruction set.
pub(super) const QUERIES: usize = 6;
/// Largest head dimension.
pub(crate) const MAX_DIM: usize = 256;

/// Result of one chunk for one query: `out = Σ 2^(score - peak) · value`, `sum = Σ 2^(score - peak)`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Partial {
    pub(super) peak: f32,
    pub(super) sum: f32,
}

/// Element type of a cache.
pub(super) trait Element: Copy {
    /// 16 of them.
    ///
    /// # Safety
    /// 16 elements are readable.
    unsafe fn load<S: Simd>(s: S, at: *const Self) -> S::F;

    /// Writes 16.
    ///
    /// # Safety
    /// 16 elements are writable.
    unsafe fn store<S: Simd>(s: S, at: *mut Self, v: S::F);
}

/// The bits of an f16.
impl Element for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const u16) -> S::F {
        // SAFETY: passed on.
        unsafe { s.load_f16(at) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, at: *mut u16, v: S::F) {
        // SAFETY: passed on.
        unsafe { s.store_f16(at, v) }
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const f32) -> S::F {
        // SAFETY: passed on.
        unsafe { s.load(at) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, at: *mut f32, v: S::F) {
        // SAFETY: passed on.
        unsafe { s.store(at, v) }
    }
}

/// One chunk of one head's keys and values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk<E> {
    /// The chunk's first tile of keys.
    pub(super) keys: *const E,
    /// The chunk's first row of values.
    pub(super) values: *const E,
    /// Elements of a key.
    pub(super) dim: usize,
    /// Elements of a value.
    pub(super) value_dim: usize,
}

/// A query: its vector (scaled, so that scores are exponents of 2), and which positions of the chunk it sees:
/// `start..limit`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Query {
    pub(super) vector: *const f32,
    pub(super) start: usize,
    pub(super) limit: usize,
}

/// Memory of the calls of one task.
pub(super) struct ChunkScratch {
    scores: [[f32; CHUNK]; QUERIES],
    out: [[f32; MAX_DIM]; QUERIES],
}

impl ChunkScratch {
    pub(super) fn new() -> ChunkScratch {
        ChunkScratch {
            scores: [[0.0; CHUNK]; QUERIES],
            out: [[0.0; MAX_DIM]; QUERIES],
        }
    }
}

/// Takes the result of each query of a call. Not a closure: closures do not inherit the target features.
pub(super) trait Results {
    /// Query `i` of the call got `partial` and `values`.
    fn take<S: Simd>(&mut self, s: S, i: usize, partial: Partial, values: &[f32]);
}

/// Attends with `queries` (at most [`Simd::QUERIES`], each with a limit of 1 to [`CHUNK`] and a start before it)
/// and hands each one's result on.
///
/// # Safety
/// Every vector has `dim` elements; the chunk's keys and values are readable up to the largest limit (keys to
/// the end of the tile).
#[inline(always)]
pub(super) unsafe fn attend<S: Simd, E: Element>(
    s: S,
    chunk: Chunk<E>,
    queries: &[Query],
    work: &mut ChunkScratch,
    results: &mut impl Results,
) {
    // SAFETY: passed on; the lengths are those of the arrays.
    unsafe {
        // Constant conditions keep numbers that an instruction set does not use from being compiled.
        match queries.len() {
            2 if S::QUERIES >= 2 => attend_n::<S, E, 2>(s, chunk, queries, work, results),
            3 if S::QUERIES >= 3 => attend_n::<S, E, 3>(s, chunk, queries, work, results),
            4 if S::QUERIES >= 4 => attend_n::<S, E, 4>(s, chunk, queries, work, results),
            5 if S::QUERIES >= 5 => attend_n::<S, E, 5>(s, chunk, queries, work, results),
            6 if S::QUERIES >= 6 => attend_n::<S, E, 6>(s, chunk, queries, work, results),
            _ => attend_n::<S, E, 1>(s, chunk, queries, work, results),
        }
    }
}

#[inline(always)]
unsafe fn attend_n<S: Simd, E: Element, const N: usize>(
    s: S,
    chunk: Chunk<E>,
    queries: &[Query],
    work: &mut ChunkScratch,
    results: &mut impl Results,
) {
    let ChunkScratch { scores, out } = work;
    let mut all = [queries[0]; N];
    all.copy_from_slice(&queries[..N]);
    let queries = all;
    let (mut most, mut least) = (0, CHUNK);
    // Where the first query's window begins, and the last one's.
    let (mut first, mut from) = (CHUNK, 0);
    for query in &queries {
        most = most.max(query.limit);
        least = least.min(query.limit);
        first = first.min(query.start);
        from = from.max(query.start);
    }
    // The positions that all queries see; empty if one range ends before another begins.
    let common = from..least.max(from);
    let tiles = most.div_ceil(TILE);
    // SAFETY: tiles up to the largest limit are readable, and the vectors hold `dim` elements.
    unsafe {
        let mut tile = first / TILE;
        while S::WIDE && tile + 2 <= tiles {
            score::<S, E, N, 2>(s, chunk, &queries, tile, scores);
            tile += 2;
        }
        while tile < tiles {
            score::<S, E, N, 1>(s, chunk, &queries, tile, scores);
            tile += 1;
        }
    }
    let mut partials = [Partial {
        peak: 0.0,
        sum: 0.0,
    }; N];
    for i in 0..N {
        partials[i] = weigh(s, &mut scores[i], queries[i].start, queries[i].limit);
    }
    // SAFETY: rows up to each query's limit are readable and hold `value_dim` elements, a multiple of 16.
    unsafe {
        let mut d = 0;
        while S::WIDE && d + 4 * LANES <= chunk.value_dim {
            gather::<S, E, N, 4>(s, chunk, d, &common, &queries, scores, out);
            d += 4 * LANES;
        }
        while d < chunk.value_dim {
            gather::<S, E, N, 1>(s, chunk, d, &common, &queries, scores, out);
            d += LANES;
        }
    }
    for i in 0..N {
        results.take(s, i, partials[i], &out[i][..chunk.value_dim]);
    }
}

/// The scores of `T` tiles of 16 positions.
#[inline(always)]
unsafe fn score<S: Simd, E: Element, const N: usize, const T: usize>(
    s: S,
    chunk: Chunk<E>,
    queries: &[Query; N],
    tile: usize,
    scores: &mut [[f32; CHUNK]; QUERIES],
) {
    let mut acc = [[s.splat(0.0); T]; N];
    // SAFETY: the caller vouches for the tiles and vectors; the scores hold 8 tiles.
    unsafe {
        let keys = chunk.keys.add(tile * TILE * chunk.dim);
        for d in 0..chunk.dim {
            let mut k = [s.splat(0.0); T];
            for (t, k) in k.iter_mut().enumerate() {
                *k = E::load(s, keys.add((t * chunk.dim + d) * TILE));
            }
            for i in 0..N {
                let q = s.splat(*queries[i].vector.add(d));
                for t in 0..T {
                    acc[i][t] = s.fma(q, k[t], acc[i][t]);
                }
            }
        }
        for i in 0..N {
            for t in 0..T {
                s.store(scores[i].as_mut_ptr().add((tile + t) * TILE), acc[i][t]);
            }
        }
    }
}

/// Turns the scores `start..limit` into weights relative to their peak.
#[inline(always)]
fn weigh<S: Simd>(s: S, scores: &mut [f32; CHUNK], start: usize, limit: usize) -> Partial {
    let tiles = start / TILE..limit.div_ceil(TILE);
    // Lanes of the first tile that are before the start.
    let before = start % TILE;
    let mut peak = s.splat(f32::NEG_INFINITY);
    // SAFETY: the tiles are within the array, and 16 numbers of the masks are left behind `TILE - before`.
    unsafe {
        for t in tiles.clone() {
            let at = scores.as_mut_ptr().add(t * TILE);
            let mut v = s.load(at);
            if before > 0 && t == tiles.start {
                v = s.add(v, s.load(LOST.as_ptr().add(TILE - before)));
                // A lost score may be far over the peak, where `exp2` is not defined.
                s.store(at, v);
            }
            peak = s.max(peak, s.keep_first(v, limit - t * TILE, f32::NEG_INFINITY));
        }
        let peak = s.largest(peak);
        let shift = s.splat(peak);
        let mut sum = s.splat(0.0);
        for t in tiles.clone() {
            let at = scores.as_mut_ptr().add(t * TILE);
            let w = s.exp2(s.sub(s.load(at), shift));
            let mut w = s.keep_first(w, limit - t * TILE, 0.0);
            if before > 0 && t == tiles.start {
                w = s.mul(w, s.load(KEPT.as_ptr().add(TILE - before)));
            }
            sum = s.add(sum, w);
            s.store(at, w);
        }
        Partial {
            peak,
            sum: s.sum(sum),
        }
    }
}

/// Added to scores: a tile's worth that is lost, then one that stays.
static LOST: [f32; 2 * TILE] = two_tiles(f32::NEG_INFINITY, 0.0);
/// Factor of weights, likewise.
static KEPT: [f32; 2 * TILE] = two_tiles(0.0, 1.0);

const fn two_tiles(first: f32, second: f32) -> [f32; 2 * TILE] {
    let mut both = [first; 2 * TILE];
    let mut i = TILE;
    while i < 2 * TILE {
        both[i] = second;
        i += 1;
    }
    both
}

/// Adds up `W` vectors of the values from element `d` on.
#[inline(always)]
unsafe fn gather<S: Simd, E: Element, const N: usize, const W: usize>(
    s: S,
    chunk: Chunk<E>,
    d: usize,
    common: &Range<usize>,
    queries: &[Query; N],
    weights: &[[f32; CHUNK]; QUERIES],
    out: &mut [[f32; MAX_DIM]; QUERIES],
) {
    let mut acc = [[s.splat(0.0); W]; N];
    // SAFETY: the caller vouches for the rows; `d + 16 W <= value_dim <= MAX_DIM`.
    unsafe {
        let values = chunk.values.add(d);
        for i in 0..N {
            for j in queries[i].start..common.start.min(queries[i].limit) {
                let p = s.splat(weights[i][j]);
                for w in 0..W {
                    let v = E::load(s, values.add(j * chunk.value_dim + w * LANES));
                    acc[i][w] = s.fma(p, v, acc[i][w]);
                }
            }
        }
        for j in common.clone() {
            let mut v = [s.splat(0.0); W];
            for (w, v) in v.iter_mut().enumerate() {
                *v = E::load(s, values.add(j * chunk.value_dim + w * LANES));
            }
            for i in 0..N {
                let p = s.splat(weights[i][j]);
                for w in 0..W {
                    acc[i][w] = s.fma(p, v[w], acc[i][w]);
                }
            }
        }
        for i in 0..N {
            let mut mine = acc[i];
            for j in common.end..queries[i].limit {
                let p = s.splat(weights[i][j]);
                for (w, mine) in mine.iter_mut().enumerate() {
                    let v = E::load(s, values.add(j * chunk.value_dim + w * LANES));
                    *mine = s.fma(p, v, *mine);
                }
            }
            for (w, &mine) in mine.iter().enumerate() {
                s.store(out[i].as_mut_ptr().add(d + w * LANES), mine);
            }
        }
    }
}

/// Merges the next chunk's result into that of the chunks before it.
#[inline(always)]
pub(super) fn merge<S: Simd>(
    s: S,
    state: &mut Partial,
    out: &mut [f32],
    next: Partial,
    values: &[f32],
) {
    let peak = if next.peak > state.peak {
        next.peak
    } else {
        state.peak
    };
    let old = s.exp2(s.splat(state.peak - peak));
    let new = s.exp2(s.splat(next.peak - peak));
    let dim = out.len().min(values.len()) / LANES * LANES;
    for d in (0..dim).step_by(LANES) {
        // SAFETY: d + 16 elements are in both.
        unsafe {
            let kept = s.mul(s.load(out.as_ptr().add(d)), old);
            let v = s.fma(s.load(values.as_ptr().add(d)), new, kept);
            s.store(out.as_mut_ptr().add(d), v);
        }
    }
    let mut both = [0.0_f32; LANES];
    let sum = s.fma(s.splat(next.sum), new, s.mul(s.splat(state.sum), old));
    // SAFETY: an array of 16.
    unsafe { s.store(both.as_mut_ptr(), sum) };
    *state = Partial { peak, sum: both[0] };
}

/// Divides by the sum of the weights, a sink's among them. It is the same for all numbers of queries, so it is
/// compiled apart.
pub(super) struct Finish<'a> {
    pub(super) state: Partial,
    /// The sink's score, an exponent of 2 as the others.
    pub(super) sink: Option<f32>,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Finish<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Finish { state, sink, out } = self;
        let factor = match sink {
            None => s.splat(1.0 / state.sum),
            Some(sink) => {
                let peak = if sink > state.peak { sink } else { state.peak };
                let kept = s.exp2(s.splat(state.peak - peak));
                let lost = s.exp2(s.splat(sink - peak));
                s.div(kept, s.fma(s.splat(state.sum), kept, lost))
            }
        };
        let dim = out.len() / LANES * LANES;
        for d in (0..dim).step_by(LANES) {
            // SAFETY: d + 16 elements.
            unsafe {
                let v = s.mul(s.load(out.as_ptr().add(d)), factor);
                s.store(out.as_mut_ptr().add(d), v);
            }
        }
    }
}
