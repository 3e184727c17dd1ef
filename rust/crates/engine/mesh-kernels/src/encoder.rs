//! Operators that encoders need besides products: layer norm, and attention over whole sequences.
//!
//! Sequences lie back to back without padding. A row's result is made of its own sequence alone, in one
//! order.

// Register tiles are arrays indexed by row and column; iterators over several of them at once hide the
// arithmetic.
#![allow(clippy::needless_range_loop)]

use std::cell::Cell;

use crate::error::expect_len;
use crate::gemm::acts::tiles;
use crate::gemm::tile::{self, F32};
use crate::mem::{Buffer, TaskPointer};
use crate::simd::{self, Kernel, LANES, Simd};
use crate::{KernelError, Pool};

/// `x[r] = (x[r] - mean) / sqrt(variance + eps) * weight + bias`, in place, row by row of `weight.len()`
/// elements.
///
/// # Errors
/// When `x` is not a whole number of rows, or `bias` is not as long as `weight`.
pub fn layer_norm(
    pool: &Pool,
    x: &mut [f32],
    weight: &[f32],
    bias: &[f32],
    eps: f32,
) -> Result<(), KernelError> {
    let k = weight.len();
    expect_len("the norm's bias", bias.len(), k)?;
    if k == 0 || !x.len().is_multiple_of(k) {
        return Err(KernelError::Length {
            what: "the rows to normalise",
            got: x.len(),
            need: k,
        });
    }
    let rows = x.len() / k;
    let chunk = if x.len() < SMALL {
        rows.max(1)
    } else {
        rows.div_ceil(4 * pool.threads())
    };
    let start = TaskPointer(x.as_mut_ptr());
    pool.run(rows.div_ceil(chunk), &|task| {
        let rows = task * chunk..((task + 1) * chunk).min(rows);
        // SAFETY: these rows lie within `x`, and this task alone touches them.
        let x = unsafe {
            std::slice::from_raw_parts_mut(start.get().add(rows.start * k), rows.len() * k)
        };
        simd::run(
            pool.isa(),
            Norm {
                x,
                weight,
                bias,
                eps,
            },
        );
    });
    Ok(())
}

struct Norm<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
}

impl Kernel for Norm<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.x.chunks_exact_mut(self.weight.len()) {
            normalise(s, x, self.weight, self.bias, self.eps);
        }
    }
}

/// Normalises one row; lengths are equal. A tail of less than 16 elements is added element by element.
#[inline(always)]
fn normalise<S: Simd>(s: S, x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let k = x.len().min(weight.len()).min(bias.len());
    let whole = k / LANES * LANES;
    let (x, weight, bias) = (&mut x[..k], &weight[..k], &bias[..k]);
    let mut sums = [s.splat(0.0); 2];
    for i in (0..whole).step_by(LANES) {
        // SAFETY: i + 16 <= k.
        let v = unsafe { s.load(x.as_ptr().add(i)) };
        let turn = i / LANES % 2;
        sums[turn] = s.add(sums[turn], v);
    }
    let mut total = s.sum(s.add(sums[0], sums[1]));
    for &v in &x[whole..] {
        total += v;
    }
    let mean = total / k as f32;
    let means = s.splat(mean);
    let mut squares = [s.splat(0.0); 2];
    for i in (0..whole).step_by(LANES) {
        // SAFETY: i + 16 <= k.
        let v = s.sub(unsafe { s.load(x.as_ptr().add(i)) }, means);
        let turn = i / LANES % 2;
        squares[turn] = s.fma(v, v, squares[turn]);
    }
    let mut total = s.sum(s.add(squares[0], squares[1]));
    for &v in &x[whole..] {
        total += (v - mean) * (v - mean);
    }
    let factor = 1.0 / (total / k as f32 + eps).sqrt();
    let factors = s.splat(factor);
    for i in (0..whole).step_by(LANES) {
        // SAFETY: i + 16 <= k, for all three.
        unsafe {
            let v = s.mul(s.sub(s.load(x.as_ptr().add(i)), means), factors);
            let w = s.load(weight.as_ptr().add(i));
            s.store(
                x.as_mut_ptr().add(i),
                s.fma(v, w, s.load(bias.as_ptr().add(i))),
            );
        }
    }
    for i in whole..k {
        x[i] = (x[i] - mean) * factor * weight[i] + bias[i];
    }
}

/// Attention of every row to all rows of its own sequence.
///
/// `qkv` is `[rows, 3 * heads * dim]`: queries, keys and values of a row side by side, each head after head.
/// `lengths` says how many rows each sequence has, in their order. `out` is `[rows, heads * dim]`. Scores are
/// divided by `sqrt(dim)`.
///
/// # Errors
/// When a buffer does not fit the shapes, `dim` is not a multiple of 16, a sequence is empty, or memory is
/// short.
pub fn encode_attention(
    pool: &Pool,
    heads: usize,
    dim: usize,
    lengths: &[usize],
    qkv: &[f32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    for (what, value) in [("number of heads", heads), ("head dimension", dim)] {
        if value == 0 || value > 1 << 16 {
            return Err(KernelError::Dimension {
                what,
                value,
                need: "it must be at least 1 and at most 65536",
            });
        }
    }
    if !dim.is_multiple_of(LANES) {
        return Err(KernelError::Dimension {
            what: "head dimension",
            value: dim,
            need: "it must be a multiple of 16",
        });
    }
    let mut starts = Vec::with_capacity(lengths.len());
    let mut rows = 0_usize;
    for &length in lengths {
        starts.push(rows);
        rows = rows.saturating_add(length);
        if length == 0 {
            return Err(KernelError::Dimension {
                what: "sequence length",
                value: 0,
                need: "a sequence has at least one row",
            });
        }
    }
    let width = heads * dim;
    expect_len(
        "queries, keys and values",
        qkv.len(),
        rows.saturating_mul(3 * width),
    )?;
    expect_len("the output rows", out.len(), rows * width)?;
    let failed = std::sync::Mutex::new(None);
    let out = TaskPointer(out.as_mut_ptr());
    pool.run(lengths.len() * heads, &|task| {
        let (sequence, head) = (task / heads, task % heads);
        let (start, length) = (starts[sequence], lengths[sequence]);
        let mut work = WORK.take();
        let padded = length.next_multiple_of(LANES);
        let floats = 2 * padded * dim + TALL * padded + TALL * dim;
        match work.reserve("an attention head's rows", 4 * floats) {
            Ok(()) => simd::run(
                pool.isa(),
                EncoderHead {
                    dim,
                    width,
                    length,
                    qkv: &qkv[start * 3 * width..][..length * 3 * width],
                    head,
                    // SAFETY: the sequence's rows lie within the output; this task alone writes this head's
                    // columns of them.
                    out: unsafe { out.get().add(start * width + head * dim) },
                    work: work.floats_mut(),
                },
            ),
            Err(error) => {
                failed
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .get_or_insert(error);
            }
        }
        WORK.set(work);
    });
    let failed = failed
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    failed.map_or(Ok(()), Err)
}

thread_local! {
    /// Keys, values, queries and scores of one head, kept between calls.
    static WORK: Cell<Buffer> = Cell::default();
}

/// Most queries at a time, on any instruction set.
const TALL: usize = 8;

/// Elements below which a loop is not worth cutting.
const SMALL: usize = 16 * 1024;

/// One head of one sequence.
struct EncoderHead<'a> {
    dim: usize,
    /// Elements per row, over all heads.
    width: usize,
    length: usize,
    qkv: &'a [f32],
    head: usize,
    out: *mut f32,
    work: &'a mut [f32],
}

impl Kernel for EncoderHead<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (dim, length) = (self.dim, self.length);
        let padded = length.next_multiple_of(LANES);
        let (keys, rest) = self.work.split_at_mut(padded * dim);
        let (values, rest) = rest.split_at_mut(padded * dim);
        let (scores, queries) = rest.split_at_mut(TALL * padded);
        let stride = 3 * self.width;
        let at = |row: usize, part: usize| row * stride + part * self.width + self.head * dim;
        // Keys as panels of 16 positions, `[dim][16]` each: a product of queries and keys is then one of rows
        // and panels.
        for row in 0..padded {
            let panel = &mut keys[row / LANES * LANES * dim..][..LANES * dim];
            for i in 0..dim {
                panel[i * LANES + row % LANES] = if row < length {
                    self.qkv[at(row, 1) + i]
                } else {
                    0.0
                };
            }
        }
        // Values as panels of 16 columns, `[positions][16]` each.
        for row in 0..length {
            let value = &self.qkv[at(row, 2)..][..dim];
            for (panel, value) in value.chunks_exact(LANES).enumerate() {
                values[panel * LANES * length + row * LANES..][..LANES].copy_from_slice(value);
            }
        }
        let scale = std::f32::consts::LOG2_E / (dim as f32).sqrt();
        for (row, count) in tiles(0..length, S::FLOAT_ROWS) {
            for r in 0..count {
                let query = &self.qkv[at(row + r, 0)..][..dim];
                for (to, from) in queries[r * dim..][..dim].iter_mut().zip(query) {
                    *to = from * scale;
                }
            }
            let task = Rows {
                dim,
                length,
                keys,
                values,
                queries,
                // SAFETY: these rows of the output are the caller's, as said there.
                out: unsafe { self.out.add(row * self.width) },
                width: self.width,
            };
            match count {
                8 if S::FLOAT_ROWS >= 8 => task.attend::<S, 8>(s, scores),
                4 if S::FLOAT_ROWS >= 4 => task.attend::<S, 4>(s, scores),
                2 if S::FLOAT_ROWS >= 2 => task.attend::<S, 2>(s, scores),
                _ => task.attend::<S, 1>(s, scores),
            }
        }
    }
}

/// Some queries of a head.
struct Rows<'a> {
    dim: usize,
    length: usize,
    keys: &'a [f32],
    values: &'a [f32],
    queries: &'a [f32],
    out: *mut f32,
    width: usize,
}

impl Rows<'_> {
    #[inline(always)]
    fn attend<S: Simd, const R: usize>(&self, s: S, scores: &mut [f32]) {
        let (dim, length) = (self.dim, self.length);
        let padded = length.next_multiple_of(LANES);
        assert!(scores.len() >= R * padded && self.queries.len() >= R * dim);
        assert!(self.keys.len() >= padded * dim && self.values.len() >= length * dim);
        for panel in 0..padded / LANES {
            let keys = self.keys[panel * LANES * dim..].as_ptr().cast();
            let queries = self.queries.as_ptr();
            // SAFETY: a whole panel of keys and R whole queries, by the lengths above.
            let [acc] = unsafe { tile::floats::<S, F32, R, 1>(s, keys, 0, dim, queries, dim) };
            let valid = (length - panel * LANES).min(LANES);
            for r in 0..R {
                let v = s.keep_first(acc[r], valid, f32::MIN);
                // SAFETY: row r of R, columns of this panel.
                unsafe { s.store(scores.as_mut_ptr().add(r * padded + panel * LANES), v) };
            }
        }
        let mut shares = [0.0; R];
        for r in 0..R {
            let row = &mut scores[r * padded..][..padded];
            let mut peak = s.splat(f32::MIN);
            for i in (0..padded).step_by(LANES) {
                // SAFETY: i + 16 <= padded.
                peak = s.max(peak, unsafe { s.load(row.as_ptr().add(i)) });
            }
            let peak = s.splat(s.largest(peak));
            let mut sum = s.splat(0.0);
            for i in (0..padded).step_by(LANES) {
                // SAFETY: i + 16 <= padded.
                unsafe {
                    let e = s.exp2(s.sub(s.load(row.as_ptr().add(i)), peak));
                    let e = s.keep_first(e, length - i, 0.0);
                    sum = s.add(sum, e);
                    s.store(row.as_mut_ptr().add(i), e);
                }
            }
            shares[r] = 1.0 / s.sum(sum);
        }
        for panel in 0..dim / LANES {
            let values = self.values[panel * LANES * length..].as_ptr().cast();
            // SAFETY: a whole panel of values and R rows of scores, by the lengths above.
            let [acc] = unsafe {
                tile::floats::<S, F32, R, 1>(s, values, 0, length, scores.as_ptr(), padded)
            };
            for r in 0..R {
                let v = s.mul(acc[r], s.splat(shares[r]));
                // SAFETY: row r of this task's rows, columns of its own head.
                unsafe { s.store(self.out.add(r * self.width + panel * LANES), v) };
            }
        }
    }
}
