//! The products of a transformer layer.

use std::cell::Cell;

use crate::error::expect_len;
use crate::gemm::acts::{self, RmsNorm};
use crate::gemm::{self, Add, Destination, Input};
use crate::matrix::QMatrix;
use crate::mem::{Buffer, TaskPointer};
use crate::simd::{self, Kernel, LANES, Simd};
use crate::{KernelError, Pool, add_rms_norm, rms_norm};

/// An elementwise function between the halves of a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    #[default]
    Silu,
    /// GELU in its tanh form.
    GeluTanh,
    /// GELU itself: `x Φ(x)` with the normal distribution's Φ.
    Gelu,
    /// ReLU: `max(x, 0)`.
    Relu,
    /// gpt-oss's: `x σ(1.702 x)` for x up to 7, and what it is multiplied by is bounded to ±7 and moved up by 1.
    ClampedSwiglu,
}

impl Activation {
    #[inline(always)]
    pub(crate) fn apply<S: Simd>(self, s: S, x: S::F) -> S::F {
        match self {
            Activation::Silu => s.silu(x),
            Activation::GeluTanh => s.gelu_tanh(x),
            Activation::Gelu => s.gelu(x),
            Activation::Relu => s.max(x, s.splat(0.0)),
            Activation::ClampedSwiglu => {
                let x = at_most(s, x, CLAMP);
                s.sigmoid_times(s.mul(x, s.splat(1.702)), x)
            }
        }
    }

    /// The factor on the activated gate: `up`, bounded and moved where the activation says so.
    #[inline(always)]
    pub(crate) fn factor<S: Simd>(self, s: S, up: S::F) -> S::F {
        match self {
            Activation::ClampedSwiglu => {
                let up = s.max(at_most(s, up, CLAMP), s.splat(-CLAMP));
                s.add(up, s.splat(1.0))
            }
            _ => up,
        }
    }
}

/// Bound of [`Activation::ClampedSwiglu`].
const CLAMP: f32 = 7.0;

#[inline(always)]
fn at_most<S: Simd>(s: S, x: S::F, most: f32) -> S::F {
    let zero = s.splat(0.0);
    s.sub(zero, s.max(s.sub(zero, x), s.splat(-most)))
}

/// The first half of a gated feed-forward layer.
#[derive(Debug, Clone, Copy)]
pub struct Gate<'a> {
    /// The matrix before the activation.
    pub gate: &'a QMatrix,
    /// The one that its result is multiplied by.
    pub up: &'a QMatrix,
    /// The activation applied to the product with `gate`.
    pub activation: Activation,
}

/// A gated feed-forward layer with its norms.
#[derive(Debug, Clone, Copy)]
pub struct FeedForward<'a> {
    /// Norm of the input rows, before the matrices.
    pub norm: RmsNorm<'a>,
    /// The gated first half of the layer.
    pub gate: Gate<'a>,
    /// The second half: its inputs are the first half's outputs.
    pub down: &'a QMatrix,
    /// Norm of the result, before it is added (Gemma).
    pub post_norm: Option<RmsNorm<'a>>,
}

/// Operations fused into [`linear`], before and after the product.
#[derive(Debug, Clone, Copy, Default)]
pub struct Linear<'a> {
    /// Normalise the input rows first.
    pub norm: Option<RmsNorm<'a>>,
    /// Added to every output row: `n` elements.
    pub bias: Option<&'a [f32]>,
    /// Applied after the bias.
    pub activation: Option<Activation>,
    /// The residual, added last.
    pub residual: Residual<'a>,
}

/// A residual connection: rows added to the result.
#[derive(Debug, Clone, Copy, Default)]
pub enum Residual<'a> {
    /// None: the output is overwritten.
    #[default]
    None,
    /// The product is added to the current content of the output.
    InPlace,
    /// These rows, `[rows, n]`, plus the product are written to the output.
    Rows(&'a [f32]),
}

/// `out[r] = activation(norm(x[r]) · Wᵀ + bias) + residual[r]` for `x` of `[rows, k]` and `out` of `[rows,
/// n]`.
///
/// Activations are rounded to 8 bits per 32 inputs, except for matrices of floats. A row's result does not
/// depend, bit for bit, on the other rows or on the number of threads.
///
/// # Errors
/// When a buffer does not fit the matrix; nothing is written then.
pub fn linear(
    pool: &Pool,
    matrix: &QMatrix,
    x: &[f32],
    rows: usize,
    out: &mut [f32],
    options: &Linear<'_>,
) -> Result<(), KernelError> {
    check("the output rows", out.len(), rows, matrix.n())?;
    if let Some(bias) = options.bias {
        expect_len("the bias", bias.len(), matrix.n())?;
    }
    if let Residual::Rows(residual) = options.residual {
        expect_len("the residual rows", residual.len(), out.len())?;
    }
    let quantised = matrix
        .parts()
        .iter()
        .any(|p| p.layout.quantised().is_some());
    let floats = matrix
        .parts()
        .iter()
        .any(|p| p.layout.quantised().is_none());
    with_input(
        pool,
        x,
        rows,
        matrix.k(),
        options.norm,
        quantised,
        floats,
        |input| {
            gemm::multiply(
                pool,
                matrix,
                input,
                Destination {
                    out: TaskPointer(out.as_mut_ptr()),
                    stride: matrix.n(),
                    bias: options.bias,
                    activation: options.activation,
                    add: match options.residual {
                        Residual::None => Add::Nothing,
                        Residual::InPlace => Add::Output,
                        Residual::Rows(rows) => Add::Rows(rows),
                    },
                },
            );
        },
    )
}

/// The first half of a gated feed-forward layer: `out[r] = activation(h · Wgᵀ) * (h · Wuᵀ)` with `h =
/// norm(x[r])`.
///
/// # Errors
/// When the matrices differ in shape or a buffer does not fit them.
pub fn gate_up(
    pool: &Pool,
    gate: &Gate<'_>,
    x: &[f32],
    rows: usize,
    norm: Option<RmsNorm<'_>>,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let &Gate {
        gate,
        up,
        activation,
    } = gate;
    for (what, left, right) in [
        ("outputs of gate and up", gate.n(), up.n()),
        ("inputs of gate and up", gate.k(), up.k()),
    ] {
        if left != right {
            return Err(KernelError::Mismatch { what, left, right });
        }
    }
    check("the output rows", out.len(), rows, gate.n())?;
    if let ([g], [u]) = (gate.parts(), up.parts())
        && g.layout == u.layout
    {
        let quantised = g.layout.quantised().is_some();
        let k = gate.k();
        return with_input(pool, x, rows, k, norm, quantised, !quantised, |input| {
            let out = TaskPointer(out.as_mut_ptr());
            gemm::multiply_gate_up(pool, (g, u), activation, k, input, out);
        });
    }
    let options = Linear {
        norm,
        ..Linear::default()
    };
    let mut ups = vec![0.0; out.len()];
    linear(pool, up, x, rows, &mut ups, &options)?;
    linear(pool, gate, x, rows, out, &options)?;
    simd::run(
        pool.isa(),
        Activate {
            activation,
            gate: out,
            up: &ups,
        },
    );
    Ok(())
}

/// A whole gated feed-forward layer, in place over `x`: `x += post_norm((activation(h·Wgᵀ) * (h·Wuᵀ)) · Wdᵀ)`
/// with `h = norm(x)`.
///
/// # Errors
/// When the matrices' shapes do not chain or a buffer does not fit them.
pub fn feed_forward(
    pool: &Pool,
    layer: &FeedForward<'_>,
    x: &mut [f32],
    rows: usize,
) -> Result<(), KernelError> {
    let &FeedForward {
        norm,
        gate,
        down,
        post_norm,
    } = layer;
    let (wide, narrow) = (gate.gate.n(), gate.gate.k());
    for (what, left, right) in [
        ("outputs of gate and inputs of down", wide, down.k()),
        ("inputs of gate and outputs of down", narrow, down.n()),
    ] {
        if left != right {
            return Err(KernelError::Mismatch { what, left, right });
        }
    }
    check("the rows", x.len(), rows, narrow)?;
    if let Some(norm) = post_norm {
        expect_len("the norm's weight", norm.weight.len(), narrow)?;
    }
    let (mut middle, mut result) = MIDDLE.take();
    let block = rows.min(BLOCK);
    middle.reserve("the rows between", block * wide * 4)?;
    if post_norm.is_some() {
        result.reserve("the rows before their norm", block * narrow * 4)?;
    }
    let done = x.chunks_mut((BLOCK * narrow).max(1)).try_for_each(|x| {
        let rows = x.len() / narrow;
        let middle = &mut middle.floats_mut()[..rows * wide];
        gate_up(pool, &gate, x, rows, Some(norm), middle)?;
        let Some(norm) = post_norm else {
            let options = Linear {
                residual: Residual::InPlace,
                ..Linear::default()
            };
            return linear(pool, down, middle, rows, x, &options);
        };
        let result = &mut result.floats_mut()[..rows * narrow];
        linear(pool, down, middle, rows, result, &Linear::default())?;
        add_rms_norm(pool, result, norm.weight, norm.eps, x)
    });
    MIDDLE.set((middle, result));
    done
}

/// Rows that a feed-forward layer takes at once: enough that the weights' way from memory is hidden behind
/// the products, few enough that the rows between its halves, which are the widest of all, stay in the cache
/// and cost little memory.
const BLOCK: usize = 128;

thread_local! {
    /// Quantised rows and normalised rows, kept between calls.
    static SCRATCH: Cell<(Buffer, Buffer)> = Cell::default();
    /// Rows between the halves of a feed-forward layer, and rows before the norm behind it.
    static MIDDLE: Cell<(Buffer, Buffer)> = Cell::default();
}

/// Brings `x` into the forms that a product reads, and calls `then` with them.
#[allow(clippy::too_many_arguments)]
fn with_input(
    pool: &Pool,
    x: &[f32],
    rows: usize,
    k: usize,
    norm: Option<RmsNorm<'_>>,
    quantised: bool,
    floats: bool,
    then: impl FnOnce(Input<'_>),
) -> Result<(), KernelError> {
    check("the input rows", x.len(), rows, k)?;
    if let Some(norm) = norm {
        expect_len("the norm's weight", norm.weight.len(), k)?;
    }
    if rows == 0 {
        return Ok(());
    }
    let (mut acts, mut scratch) = SCRATCH.take();
    let result = (|| {
        if quantised {
            acts::quantise(pool, x, rows, k, norm, &mut acts, &mut scratch)?;
        }
        let mut x = x;
        if floats && let Some(norm) = norm {
            scratch.reserve("normalised rows", rows * k * 4)?;
            let normed = &mut scratch.floats_mut()[..rows * k];
            rms_norm(pool, x, norm.weight, norm.eps, normed)?;
            x = normed;
        }
        then(Input {
            acts: acts.bytes(),
            x,
            rows,
        });
        Ok(())
    })();
    SCRATCH.set((acts, scratch));
    result
}

fn check(what: &'static str, got: usize, rows: usize, width: usize) -> Result<(), KernelError> {
    let need = rows.checked_mul(width).ok_or(KernelError::Dimension {
        what: "number of rows",
        value: rows,
        need: "the rows must fit the address space",
    })?;
    expect_len(what, got, need)
}

/// `gate = activation(gate) * up`.
pub(crate) struct Activate<'a> {
    pub(crate) activation: Activation,
    pub(crate) gate: &'a mut [f32],
    pub(crate) up: &'a [f32],
}

impl Kernel for Activate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (gate, up) in self.gate.chunks_mut(LANES).zip(self.up.chunks(LANES)) {
            let (mut g, mut u) = ([0.0; LANES], [0.0; LANES]);
            g[..gate.len()].copy_from_slice(gate);
            u[..up.len()].copy_from_slice(up);
            // SAFETY: arrays of 16.
            unsafe {
                let x = s.load(g.as_ptr());
                let x = self.activation.apply(s, x);
                let up = self.activation.factor(s, s.load(u.as_ptr()));
                let v = s.mul(x, up);
                s.store(g.as_mut_ptr(), v);
            }
            let len = gate.len();
            gate.copy_from_slice(&g[..len]);
        }
    }
}
