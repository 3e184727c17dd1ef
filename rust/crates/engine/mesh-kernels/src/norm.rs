//! Root mean square normalisation.

use crate::error::expect_len;
use crate::mem::TaskPointer;
use crate::simd::{self, Kernel, LANES, Simd};
use crate::{KernelError, Pool};

/// `out[r] = x[r] / sqrt(mean(x[r]²) + eps) * weight`, row by row of `weight.len()` elements.
///
/// # Errors
/// When `x` and `out` do not hold the same whole number of rows.
pub fn rms_norm(
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    all_rows(pool, x, weight, eps, out, false)
}

/// `out[r] += x[r] / sqrt(mean(x[r]²) + eps) * weight`: a residual connection with a norm before it.
///
/// # Errors
/// As [`rms_norm`].
pub fn add_rms_norm(
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) -> Result<(), KernelError> {
    all_rows(pool, x, weight, eps, out, true)
}

/// Normalises the columns `columns` of each row of `x`, in place; rows have `stride` elements.
///
/// # Errors
/// When the weight is not as wide as the columns, or `x` is not a whole number of rows that have them.
pub fn rms_norm_columns(
    pool: &Pool,
    x: &mut [f32],
    stride: usize,
    columns: std::ops::Range<usize>,
    weight: &[f32],
    eps: f32,
) -> Result<(), KernelError> {
    expect_len("the norm's weight", weight.len(), columns.len())?;
    if columns.end > stride || columns.is_empty() || !x.len().is_multiple_of(stride) {
        return Err(KernelError::Length {
            what: "the rows to normalise",
            got: x.len(),
            need: stride,
        });
    }
    let mut normed = vec![0.0; weight.len()];
    for row in x.chunks_exact_mut(stride) {
        let part = &mut row[columns.clone()];
        let (x, out) = (&*part, normed.as_mut_slice());
        let add = false;
        simd::run(
            pool.isa(),
            Rows {
                x,
                weight,
                eps,
                out,
                add,
            },
        );
        part.copy_from_slice(&normed);
    }
    Ok(())
}

fn all_rows(
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
    add: bool,
) -> Result<(), KernelError> {
    let k = weight.len();
    if k == 0 || !x.len().is_multiple_of(k) {
        return Err(KernelError::Length {
            what: "the rows to normalise",
            got: x.len(),
            need: k,
        });
    }
    expect_len("the normalised rows", out.len(), x.len())?;
    let rows = x.len() / k;
    let chunk = if x.len() < 32 * 1024 {
        rows.max(1)
    } else {
        rows.div_ceil(4 * pool.threads())
    };
    let out = TaskPointer(out.as_mut_ptr());
    pool.run(rows.div_ceil(chunk), &|task| {
        let rows = task * chunk..((task + 1) * chunk).min(rows);
        // SAFETY: this task alone writes these rows of the output, which is as long as the input.
        let out = unsafe {
            std::slice::from_raw_parts_mut(out.get().add(rows.start * k), rows.len() * k)
        };
        simd::run(
            pool.isa(),
            Rows {
                x: &x[rows.start * k..rows.end * k],
                weight,
                eps,
                out,
                add,
            },
        );
    });
    Ok(())
}

struct Rows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
    add: bool,
}

impl Kernel for Rows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let k = self.weight.len();
        for (x, out) in self.x.chunks_exact(k).zip(self.out.chunks_exact_mut(k)) {
            if self.add {
                normalise_into::<S, true>(s, x, self.weight, self.eps, out);
            } else {
                normalise(s, x, self.weight, self.eps, out);
            }
        }
    }
}

/// Normalises one row. Lengths are equal. A tail of less than 16 elements is added element by element.
#[inline(always)]
pub(crate) fn normalise<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    normalise_into::<S, false>(s, x, weight, eps, out);
}

/// As [`normalise`]; with `ADD` the result is added to `out`.
#[inline(always)]
fn normalise_into<S: Simd, const ADD: bool>(
    s: S,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let k = x.len().min(weight.len()).min(out.len());
    let whole = k / LANES * LANES;
    let mut squares = [s.splat(0.0); 2];
    for i in (0..whole).step_by(LANES) {
        // SAFETY: i + 16 <= k.
        let v = unsafe { s.load(x.as_ptr().add(i)) };
        let turn = i / LANES % 2;
        squares[turn] = s.fma(v, v, squares[turn]);
    }
    let mut total = s.sum(s.add(squares[0], squares[1]));
    for &v in &x[whole..k] {
        total += v * v;
    }
    let factor = 1.0 / (total / k as f32 + eps).sqrt();
    let factors = s.splat(factor);
    for i in (0..whole).step_by(LANES) {
        // SAFETY: i + 16 <= k, for all three.
        unsafe {
            let v = s.mul(s.load(x.as_ptr().add(i)), factors);
            let mut v = s.mul(v, s.load(weight.as_ptr().add(i)));
            if ADD {
                v = s.add(s.load(out.as_ptr().add(i)), v);
            }
            s.store(out.as_mut_ptr().add(i), v);
        }
    }
    for i in whole..k {
        let v = x[i] * factor * weight[i];
        out[i] = if ADD { out[i] + v } else { v };
    }
}
