//! One register tile: a panel of 16 outputs times up to 8 rows.
//!
//! Every output value is `Σ over blocks, in order, of d·da·(integer dot product)`, plus `m·(da·Σa)` right
//! after each block where the layout has minima: the same operations on the same numbers for any number of
//! rows.

// Register tiles are arrays indexed by row and column; iterators over several of them at once hide the
// arithmetic.
#![allow(clippy::needless_range_loop)]

use std::marker::PhantomData;

use crate::layout::{BLOCK, GROUP, GROUP_HEAD, Layout, Scales, code_bytes};
use crate::simd::{Simd, chain};

/// A quantised layout known at compile time.
pub(super) trait TileFormat {
    const LAYOUT: Layout;
    const BITS: u32;
    const SCALES: Scales;
    /// Products that are added before they are closed.
    const CHAIN: usize = if Self::BITS == 8 {
        1
    } else {
        chain(Self::BITS)
    };
    const BLOCK_BYTES: usize = Self::SCALES.bytes() + code_bytes(Self::BITS);
}

macro_rules! formats {
    ($($name:ident)*) => {
        $(
            pub(super) struct $name;
            impl TileFormat for $name {
                const LAYOUT: Layout = Layout::$name;
                const BITS: u32 = match Layout::$name.quantised() {
                    Some((bits, _)) => bits,
                    None => 0,
                };
                const SCALES: Scales = match Layout::$name.quantised() {
                    Some((_, scales)) => scales,
                    None => Scales::Block,
                };
            }
        )*
    };
}

formats! { Q4 Q4Min Q4Coded Q5 Q5Min Q5Coded Q6 Q6Halves Q8 }

/// The products of `R` rows with one panel.
///
/// # Safety
/// `panel` points to a whole panel of `blocks` blocks of layout `T`, `acts` to a tile of `R` quantised rows
/// as long.
#[inline(always)]
pub(super) unsafe fn quantised<S: Simd, T: TileFormat, const R: usize>(
    s: S,
    panel: *const u8,
    blocks: usize,
    acts: *const u8,
) -> [S::F; R] {
    let mut acc = [s.splat(0.0); R];
    let mut w = panel;
    let mut a = acts;
    let mut head = (s.splat(0.0), s.splat(0.0));
    for index in 0..blocks {
        // SAFETY: within the panel and the tile, by their layouts.
        unsafe {
            if T::SCALES.grouped() && index % GROUP == 0 {
                head = (s.load_f16(w.cast()), s.load_f16(w.add(32).cast()));
                w = w.add(GROUP_HEAD);
            }
            block::<S, T, R>(s, w, a, head, &mut acc);
            w = w.add(T::BLOCK_BYTES);
            a = a.add(super::acts::ROW_BLOCK * R);
        }
    }
    acc
}

#[inline(always)]
unsafe fn block<S: Simd, T: TileFormat, const R: usize>(
    s: S,
    w: *const u8,
    a: *const u8,
    head: (S::F, S::F),
    acc: &mut [S::F; R],
) {
    // SAFETY: the caller's block and tile hold what their layouts say.
    unsafe {
        let codes = w.add(T::SCALES.bytes());
        let q = a.cast::<i8>();
        let tail = a.add(BLOCK * R).cast::<f32>();
        match T::SCALES {
            Scales::Block | Scales::BlockMin | Scales::Coded => {
                let mut sum = biased::<S, T, R>(s, tail.add(2 * R).cast());
                for part in 0..S::PARTS {
                    let mut dots = Dots::<S, T, R>::open(s, &sum, part, codes, q);
                    dots.pair::<0, 4>(s, &mut sum, 6);
                    dots.pair::<1, 5>(s, &mut sum, 4);
                    dots.pair::<2, 6>(s, &mut sum, 2);
                    dots.pair::<3, 7>(s, &mut sum, 0);
                }
                let d = if matches!(T::SCALES, Scales::Coded) {
                    s.mul(s.to_f(s.load_u8(w)), head.0)
                } else {
                    s.load_f16(w.cast())
                };
                scale(s, &sum, d, tail, acc);
                if !matches!(T::SCALES, Scales::Block) {
                    let m = if matches!(T::SCALES, Scales::Coded) {
                        s.mul(s.to_f(s.load_i8(w.add(16).cast())), head.1)
                    } else {
                        s.load_f16(w.add(32).cast())
                    };
                    for r in 0..R {
                        acc[r] = s.fma(m, s.splat(*tail.add(R + r)), acc[r]);
                    }
                }
            }
            Scales::Halves => {
                let first = tail.add(3 * R).cast::<i32>();
                let mut sum = biased::<S, T, R>(s, first);
                for part in 0..S::PARTS {
                    let mut dots = Dots::<S, T, R>::open(s, &sum, part, codes, q);
                    dots.pair::<0, 1>(s, &mut sum, 2);
                    dots.pair::<2, 3>(s, &mut sum, 0);
                }
                let d = s.mul(s.to_f(s.load_i8(w.cast())), head.0);
                scale(s, &sum, d, tail, acc);
                let all = biased::<S, T, R>(s, tail.add(2 * R).cast());
                let half = biased::<S, T, R>(s, first);
                for r in 0..R {
                    sum[r] = s.isub(all[r], half[r]);
                }
                for part in 0..S::PARTS {
                    let mut dots = Dots::<S, T, R>::open(s, &sum, part, codes, q);
                    dots.pair::<4, 5>(s, &mut sum, 2);
                    dots.pair::<6, 7>(s, &mut sum, 0);
                }
                let d = s.mul(s.to_f(s.load_i8(w.add(16).cast())), head.0);
                scale(s, &sum, d, tail, acc);
            }
        }
    }
}

/// The sums' start: minus the bias times the sum of the activations.
#[inline(always)]
unsafe fn biased<S: Simd, T: TileFormat, const R: usize>(
    s: S,
    minus_sums: *const i32,
) -> [S::I; R] {
    let mut sum = [s.isplat(0); R];
    for (r, sum) in sum.iter_mut().enumerate() {
        // SAFETY: R sums are there.
        let minus = s.isplat(unsafe { minus_sums.add(r).read_unaligned() });
        *sum = match T::LAYOUT.bias() {
            8 => s.ishl::<3>(minus),
            16 => s.ishl::<4>(minus),
            32 => s.ishl::<5>(minus),
            128 if !S::SIGNED_WIDE => s.ishl::<7>(minus),
            _ => *sum,
        };
    }
    sum
}

/// Dot products of one part of the columns, on their way into the sums.
struct Dots<S: Simd, T, const R: usize> {
    part: usize,
    /// The part's codes.
    codes: *const u8,
    /// The rows' activations.
    q: *const i8,
    sums: [S::P; R],
    format: PhantomData<T>,
}

impl<S: Simd, T: TileFormat, const R: usize> Dots<S, T, R> {
    #[inline(always)]
    unsafe fn open(s: S, sum: &[S::I; R], part: usize, codes: *const u8, q: *const i8) -> Self {
        let mut sums = [s.open(&sum[0], part); R];
        for r in 1..R {
            sums[r] = s.open(&sum[r], part);
        }
        Dots {
            part,
            // SAFETY: a part of the caller's codes.
            codes: unsafe { codes.add(part * (64 / S::PARTS)) },
            q,
            sums,
            format: PhantomData,
        }
    }

    /// Adds the products of input groups `G` and `H`, `left` groups before the last.
    #[inline(always)]
    unsafe fn pair<const G: usize, const H: usize>(
        &mut self,
        s: S,
        sum: &mut [S::I; R],
        left: usize,
    ) {
        // SAFETY: the caller's block and tile hold what their layouts say.
        unsafe {
            self.group::<G>(s, sum, left + 1);
            self.group::<H>(s, sum, left);
        }
    }

    #[inline(always)]
    unsafe fn group<const G: usize>(&mut self, s: S, sum: &mut [S::I; R], left: usize) {
        // SAFETY: the caller's block and tile hold what their layouts say.
        unsafe {
            let w = weights::<S, T, G>(s, self.codes);
            for r in 0..R {
                let q = self.q.add((G * R + r) * 4);
                self.sums[r] = if T::BITS == 8 {
                    s.dot_wide(self.sums[r], w, q)
                } else {
                    s.dot(self.sums[r], w, q)
                };
                if left.is_multiple_of(T::CHAIN) {
                    s.close(&mut sum[r], self.part, self.sums[r]);
                    self.sums[r] = s.open(&sum[r], self.part);
                }
            }
        }
    }
}

/// The codes of input group `G`.
#[inline(always)]
unsafe fn weights<S: Simd, T: TileFormat, const G: usize>(s: S, codes: *const u8) -> S::B {
    // SAFETY: the caller's block holds what its layout says.
    unsafe {
        if T::BITS == 8 {
            return s.load_b(codes.add(64 * G));
        }
        let raw = s.load_b(codes.add(64 * (G % 4)));
        let low = s.band(if G < 4 { raw } else { s.bshr::<4>(raw) }, 15);
        match T::BITS {
            5 => {
                let h = s.load_b(codes.add(256));
                let h = match G {
                    0 => s.bshl::<4>(h),
                    1 => s.bshl::<3>(h),
                    2 => s.bshl::<2>(h),
                    3 => s.bshl::<1>(h),
                    4 => h,
                    5 => s.bshr::<1>(h),
                    6 => s.bshr::<2>(h),
                    _ => s.bshr::<3>(h),
                };
                s.bor(low, s.band(h, 0x10))
            }
            6 => {
                let h = s.load_b(codes.add(256 + 64 * (G / 4)));
                let h = match G % 4 {
                    0 => s.bshl::<4>(h),
                    1 => s.bshl::<2>(h),
                    2 => h,
                    _ => s.bshr::<2>(h),
                };
                s.bor(low, s.band(h, 0x30))
            }
            _ => low,
        }
    }
}

#[inline(always)]
unsafe fn scale<S: Simd, const R: usize>(
    s: S,
    sum: &[S::I; R],
    d: S::F,
    scales: *const f32,
    acc: &mut [S::F; R],
) {
    for r in 0..R {
        // SAFETY: R scales are there.
        let da = s.splat(unsafe { *scales.add(r) });
        acc[r] = s.fma(s.to_f(sum[r]), s.mul(d, da), acc[r]);
    }
}

/// Storage format of a panel of floats.
pub(crate) trait Float {
    /// 16 of them, from number `index` × 16 on.
    ///
    /// # Safety
    /// The panel must hold them.
    unsafe fn load<S: Simd>(s: S, panel: *const u8, index: usize) -> S::F;
}

/// f32.
pub(crate) struct F32;
/// f16.
pub(crate) struct F16;
/// bf16.
pub(crate) struct Bf16;

impl Float for F32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, panel: *const u8, index: usize) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load(panel.cast::<f32>().add(index * 16)) }
    }
}

impl Float for F16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, panel: *const u8, index: usize) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load_f16(panel.cast::<u16>().add(index * 16)) }
    }
}

impl Float for Bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, panel: *const u8, index: usize) -> S::F {
        // SAFETY: the caller's promise.
        unsafe { s.load_bf16(panel.cast::<u16>().add(index * 16)) }
    }
}

/// The products of `R` rows of floats with `P` panels of floats, input by input: one accumulator per output,
/// for any tile. Rows lie `stride` floats apart, panels `panel_bytes`.
///
/// # Safety
/// `panel` points to the first of `P` panels of `k` inputs, `x` to the first of `R` rows of `k` floats.
#[inline(always)]
pub(crate) unsafe fn floats<S: Simd, T: Float, const R: usize, const P: usize>(
    s: S,
    panel: *const u8,
    panel_bytes: usize,
    k: usize,
    x: *const f32,
    stride: usize,
) -> [[S::F; R]; P] {
    let mut acc = [[s.splat(0.0); R]; P];
    for i in 0..k {
        // SAFETY: input i of k, of every panel and row.
        unsafe {
            let mut w = [s.splat(0.0); P];
            for p in 0..P {
                w[p] = T::load(s, panel.add(p * panel_bytes), i);
            }
            for r in 0..R {
                let x = s.splat(*x.add(r * stride + i));
                for p in 0..P {
                    acc[p][r] = s.fma(x, w[p], acc[p][r]);
                }
            }
        }
    }
    acc
}
