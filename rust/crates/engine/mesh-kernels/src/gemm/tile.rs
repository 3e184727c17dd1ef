//! One register tile: a panel of 16 outputs times up to 8 rows.
//!
//! Every output value is `Σ over blocks, in order, of d·da·(integer dot product)`, plus `m·(da·Σa)` right
//! after each block where the layout has minima: the same operations on the same numbers for any number of
//! rows. Where scales differ between the halves of a block, each half is a block in this sense.

// Register tiles are arrays indexed by row and column; iterators over several of them at once hide the
// arithmetic.
#![allow(clippy::needless_range_loop)]

use std::marker::PhantomData;

use mesh_quant::Codebook;

use super::codes::weights;
use crate::layout::{BLOCK, GROUP, Layout, Scales, code_bytes};
use crate::simd::{Simd, chain};

/// A quantised layout known at compile time.
pub(super) trait TileFormat {
    const LAYOUT: Layout;
    const BITS: u32;
    const SCALES: Scales;
    /// Codes are indices into a codebook.
    const BOOK: bool = Self::LAYOUT.codebook().is_some();
    /// Weights, with the bias added, take all 8 bits.
    const FULL: bool = Self::LAYOUT.bias() == 128;
    /// Products that are added before they are closed.
    const CHAIN: usize = if Self::FULL {
        1
    } else if Self::BOOK {
        // A codebook's numbers are below twice the bias.
        chain(Self::LAYOUT.bias().ilog2() + 1)
    } else {
        chain(Self::BITS)
    };
    const BLOCK_BYTES: usize = Self::SCALES.bytes() + code_bytes(Self::BITS);
}

macro_rules! formats {
    ($($name:ident $(($book:ident))?)*) => {
        $(
            pub(super) struct $name;
            impl TileFormat for $name {
                const LAYOUT: Layout = Layout::$name $((Codebook::$book))?;
                const BITS: u32 = match Self::LAYOUT.quantised() {
                    Some((bits, _)) => bits,
                    None => 0,
                };
                const SCALES: Scales = match Self::LAYOUT.quantised() {
                    Some((_, scales)) => scales,
                    None => Scales::Block,
                };
            }
        )*
    };
}

// The codebook is an argument of the products; the ones here only stand for the layout.
formats! {
    Q4 Q4Signed Q4Min Q4Coded Q5 Q5Min Q5Coded Q6 Q6Halves Q8
    Q2Nibbles Book3Halves(Iq2) Book4(Iq4) Book4Exponent(Mxfp4) Book4Halves(Iq4)
}

/// A codebook's numbers with the layout's bias added, 16 of them four times over: all zero without a codebook.
#[derive(Clone, Copy)]
pub(super) struct Table([u8; 64]);

impl Table {
    pub(super) fn of(layout: Layout) -> Table {
        let mut table = [0; 64];
        if let Some(book) = layout.codebook() {
            let values = book.values();
            for (i, number) in table.iter_mut().enumerate() {
                *number = (i32::from(values[i % 16]) + layout.bias()) as u8;
            }
        }
        Table(table)
    }
}

/// The products of `R` rows with one panel.
///
/// # Safety
/// `panel` points to a whole panel of `blocks` blocks of layout `T`, whose codebook is `table`, `acts` to a
/// tile of `R` quantised rows as long.
#[inline(always)]
pub(super) unsafe fn quantised<S: Simd, T: TileFormat, const R: usize>(
    s: S,
    panel: *const u8,
    blocks: usize,
    table: &Table,
    acts: *const u8,
) -> [S::F; R] {
    // SAFETY: 64 bytes.
    let table = unsafe { s.load_b(table.0.as_ptr()) };
    let mut acc = [s.splat(0.0); R];
    let mut w = panel;
    let mut a = acts;
    let mut head = (s.splat(0.0), s.splat(0.0));
    for index in 0..blocks {
        // SAFETY: within the panel and the tile, by their layouts.
        unsafe {
            if T::SCALES.head_bytes() > 0 && index % GROUP == 0 {
                head = match T::SCALES {
                    Scales::Halves => (s.load(w.cast()), s.splat(0.0)),
                    Scales::Signed => (s.load_bf16(w.cast()), s.splat(0.0)),
                    _ => (s.load_f16(w.cast()), s.load_f16(w.add(32).cast())),
                };
                w = w.add(T::SCALES.head_bytes());
            }
            block::<S, T, R>(s, w, table, a, head, &mut acc);
            w = w.add(T::BLOCK_BYTES);
            a = a.add(super::acts::ROW_BLOCK * R);
        }
    }
    acc
}

/// The same for each of [`Simd::PARTS`]. Not a loop: the sums of a part that is not known at compile time are
/// in memory.
macro_rules! parts {
    ($s:ty, $part:ident => $each:expr) => {{
        {
            let $part = 0;
            $each
        }
        if <$s>::PARTS > 1 {
            let $part = 1;
            $each
        }
        if <$s>::PARTS > 2 {
            {
                let $part = 2;
                $each
            }
            let $part = 3;
            $each
        }
    }};
}

#[inline(always)]
unsafe fn block<S: Simd, T: TileFormat, const R: usize>(
    s: S,
    w: *const u8,
    table: S::B,
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
            Scales::Block
            | Scales::BlockMin
            | Scales::Coded
            | Scales::Signed
            | Scales::Exponent => {
                let mut sum = biased::<S, T, R>(s, tail.add(2 * R).cast());
                parts!(S, part => {
                    let mut dots = Dots::<S, T, R>::open(s, &sum, part, codes, table, q);
                    dots.pair::<0, 4>(s, &mut sum, 6);
                    dots.pair::<1, 5>(s, &mut sum, 4);
                    dots.pair::<2, 6>(s, &mut sum, 2);
                    dots.pair::<3, 7>(s, &mut sum, 0);
                });
                let d = match T::SCALES {
                    Scales::Coded => s.mul(s.to_f(s.load_u8(w)), head.0),
                    Scales::Signed => s.mul(s.to_f(s.load_i8(w.cast())), head.0),
                    Scales::Exponent => {
                        let exponent = s.isub(s.load_u8(w), s.isplat(1));
                        s.scale2(s.splat(0.0), exponent)
                    }
                    _ => s.load_f16(w.cast()),
                };
                scale(s, &sum, d, tail, acc);
                if matches!(T::SCALES, Scales::BlockMin | Scales::Coded) {
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
            Scales::Halves | Scales::Nibbles => {
                let minus_first = tail.add(3 * R).cast::<i32>();
                let minus_all = tail.add(2 * R).cast::<i32>();
                let mut sum = biased::<S, T, R>(s, minus_first);
                parts!(S, part => {
                    let mut dots = Dots::<S, T, R>::open(s, &sum, part, codes, table, q);
                    dots.pair::<0, 1>(s, &mut sum, 2);
                    dots.pair::<2, 3>(s, &mut sum, 0);
                });
                let (d, m) = half_scales::<S, T>(s, w, head);
                scale(s, &sum, d, tail, acc);
                if matches!(T::SCALES, Scales::Nibbles) {
                    for r in 0..R {
                        let sum = minus_first.add(r).read_unaligned().wrapping_neg();
                        minimum(s, m, sum, *tail.add(r), &mut acc[r]);
                    }
                }
                let all = biased::<S, T, R>(s, minus_all);
                let half = biased::<S, T, R>(s, minus_first);
                for r in 0..R {
                    sum[r] = s.isub(all[r], half[r]);
                }
                parts!(S, part => {
                    let mut dots = Dots::<S, T, R>::open(s, &sum, part, codes, table, q);
                    dots.pair::<4, 5>(s, &mut sum, 2);
                    dots.pair::<6, 7>(s, &mut sum, 0);
                });
                let (d, m) = half_scales::<S, T>(s, w.add(16), head);
                scale(s, &sum, d, tail, acc);
                if matches!(T::SCALES, Scales::Nibbles) {
                    for r in 0..R {
                        let first = minus_first.add(r).read_unaligned();
                        let sum = first.wrapping_sub(minus_all.add(r).read_unaligned());
                        minimum(s, m, sum, *tail.add(r), &mut acc[r]);
                    }
                }
            }
        }
    }
}

/// Scale and minimum of half a block, from the 16 codes at `w`.
#[inline(always)]
unsafe fn half_scales<S: Simd, T: TileFormat>(
    s: S,
    w: *const u8,
    head: (S::F, S::F),
) -> (S::F, S::F) {
    // SAFETY: the caller's block holds 16 codes.
    unsafe {
        if matches!(T::SCALES, Scales::Nibbles) {
            let (scale, minimum) = s.load_nibbles(w);
            (s.mul(s.to_f(scale), head.0), s.mul(s.to_f(minimum), head.1))
        } else {
            (s.mul(s.to_f(s.load_i8(w.cast())), head.0), s.splat(0.0))
        }
    }
}

/// Adds `m` times the sum of activations.
#[inline(always)]
fn minimum<S: Simd>(s: S, m: S::F, sum: i32, scale: f32, acc: &mut S::F) {
    *acc = s.fma(m, s.splat(scale * sum as f32), *acc);
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
            64 => s.ishl::<6>(minus),
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
    table: S::B,
    /// The rows' activations.
    q: *const i8,
    sums: [S::P; R],
    format: PhantomData<T>,
}

impl<S: Simd, T: TileFormat, const R: usize> Dots<S, T, R> {
    #[inline(always)]
    unsafe fn open(
        s: S,
        sum: &[S::I; R],
        part: usize,
        codes: *const u8,
        table: S::B,
        q: *const i8,
    ) -> Self {
        let mut sums = [s.open(&sum[0], part); R];
        for r in 1..R {
            sums[r] = s.open(&sum[r], part);
        }
        Dots {
            part,
            // SAFETY: a part of the caller's codes.
            codes: unsafe { codes.add(part * (64 / S::PARTS)) },
            table,
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
            let w = weights::<S, T, G>(s, self.codes, self.table);
            let q = self.q.add(G * R * 4);
            // Not a loop: instructions may name the row.
            self.row::<0>(s, sum, w, q, left);
            if R > 1 {
                self.row::<1>(s, sum, w, q, left);
            }
            if R > 2 {
                self.row::<2>(s, sum, w, q, left);
                self.row::<3>(s, sum, w, q, left);
            }
            if R > 4 {
                self.row::<4>(s, sum, w, q, left);
                self.row::<5>(s, sum, w, q, left);
                self.row::<6>(s, sum, w, q, left);
                self.row::<7>(s, sum, w, q, left);
            }
        }
    }

    /// Adds the products of row `ROW` with an input group whose activations are at `q`.
    #[inline(always)]
    unsafe fn row<const ROW: usize>(
        &mut self,
        s: S,
        sum: &mut [S::I; R],
        w: S::B,
        q: *const i8,
        left: usize,
    ) {
        // SAFETY: the caller's group has R rows.
        self.sums[ROW] = unsafe {
            if T::FULL {
                s.dot_wide::<R, ROW>(self.sums[ROW], w, q)
            } else {
                s.dot::<R, ROW>(self.sums[ROW], w, q)
            }
        };
        if left.is_multiple_of(T::CHAIN) {
            s.close(&mut sum[ROW], self.part, self.sums[ROW]);
            self.sums[ROW] = s.open(&sum[ROW], self.part);
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
