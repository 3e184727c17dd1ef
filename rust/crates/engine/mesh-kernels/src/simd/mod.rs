//! Vectors of sixteen lanes on every CPU.
//!
//! Every kernel is written once over [`Simd`], a token whose existence proves that the CPU has the
//! instructions. A vector is always 16 lanes (one AVX-512 register, two AVX2, four NEON or SSE ones), and
//! every reduction is the same tree. [`Simd::fma`] is fused on AVX2, AVX-VNNI, AVX-512 and NEON, which give the
//! same bits. On [`Scalar`](scalar::Scalar), SSE4.1 and AVX, whose CPUs have no such instruction, it is a
//! multiplication and an addition; these give the same bits among each other, and agree with the former to
//! rounding.
//!
//! A kernel is a struct that implements [`Kernel`]; [`run`] calls it inside a function that has the target
//! features, and everything below is `#[inline(always)]`, so that it is compiled with them.

pub(crate) mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
mod halves;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod methods;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(target_arch = "x86_64")]
pub(crate) mod sse;

use std::mem::transmute_copy;

use crate::Isa;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Products of [`Simd::dot`] whose sum is within 16 bits, for weights of `bits` bits.
pub(crate) const fn chain(bits: u32) -> usize {
    let largest_pair = 2 * 127 * ((1 << bits) - 1);
    i16::MAX as usize / largest_pair
}

/// A unit of work that is compiled once per instruction set.
pub(crate) trait Kernel {
    /// Runs the work with the instructions of `s`.
    fn run<S: Simd>(self, s: S);
}

/// Runs `kernel` with the instructions of `isa`, or with [`Scalar`](scalar::Scalar) where the CPU lacks them.
pub(crate) fn run<K: Kernel>(isa: Isa, kernel: K) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => match avx512::Avx512::<true>::detect() {
            // SAFETY: the token exists, so the CPU has the features.
            Some(s) => unsafe { avx512::enter(s, kernel) },
            None => kernel.run(scalar::Scalar),
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bw => match avx512::Avx512::<false>::detect() {
            // SAFETY: the token exists, so the CPU has the features.
            Some(s) => unsafe { avx512::enter(s, kernel) },
            None => kernel.run(scalar::Scalar),
        },
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => match avx2::Avx2::<true>::detect() {
            // SAFETY: the token exists, so the CPU has the features.
            Some(s) => unsafe { avx2::enter(s, kernel) },
            None => kernel.run(scalar::Scalar),
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => match avx2::Avx2::<false>::detect() {
            // SAFETY: the token exists, so the CPU has the features.
            Some(s) => unsafe { avx2::enter(s, kernel) },
            None => kernel.run(scalar::Scalar),
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx => match avx::Avx::detect() {
            // SAFETY: the token exists, so the CPU has the features.
            Some(s) => unsafe { avx::enter(s, kernel) },
            None => kernel.run(scalar::Scalar),
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Sse41 => match sse::Sse41::detect() {
            // SAFETY: the token exists, so the CPU has the features.
            Some(s) => unsafe { sse::enter_sse41(s, kernel) },
            None => kernel.run(scalar::Scalar),
        },
        #[cfg(target_arch = "x86_64")]
        Isa::Sse2 => match sse::Sse2::detect() {
            // SAFETY: the token exists, so the CPU has the features.
            Some(s) => unsafe { sse::enter_sse2(s, kernel) },
            None => kernel.run(scalar::Scalar),
        },
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm => match neon::dot::Neon::<true>::detect() {
            // SAFETY: the token exists, so the CPU has the features.
            Some(s) => unsafe { neon::dot::enter(s, kernel) },
            None => kernel.run(scalar::Scalar),
        },
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => match neon::dot::Neon::<false>::detect() {
            // SAFETY: the token exists, so the CPU has the features.
            Some(s) => unsafe { neon::dot::enter(s, kernel) },
            None => kernel.run(scalar::Scalar),
        },
        #[cfg(target_arch = "aarch64")]
        Isa::NeonV8 => match neon::v8::NeonV8::detect() {
            // SAFETY: the token exists, so the CPU has the features.
            Some(s) => unsafe { neon::v8::enter(s, kernel) },
            None => kernel.run(scalar::Scalar),
        },
        _ => kernel.run(scalar::Scalar),
    }
}

/// Vectors of 16 lanes. The token is proof that the CPU has the instructions.
///
/// Methods that take pointers are unsafe: the pointer must be valid for the 16 elements (`64 / PARTS`
/// bytes for [`Simd::load_b`]); no alignment is needed.
pub(crate) trait Simd: Copy {
    /// 16 × f32.
    type F: Copy;
    /// 16 × i32.
    type I: Copy;
    /// `64 / PARTS` bytes: as many columns of 4 consecutive weights.
    type B: Copy;
    /// Partial sums of the dot products of a [`Simd::B`].
    type P: Copy;

    /// Parts of 16 columns of weights that are multiplied one after the other: more than one where registers
    /// are short and few.
    const PARTS: usize;
    /// True if [`Simd::dot_wide`] takes signed weights and no bias.
    const SIGNED_WIDE: bool;
    /// True if there are registers for 24 accumulators.
    const WIDE: bool;
    /// Most quantised rows that are multiplied at a time: 1, 2, 4 or 8.
    const ROWS: usize;
    /// Most rows of floats that are multiplied at a time: 1, 2, 4 or 8.
    const FLOAT_ROWS: usize;
    /// Most queries of a head that attend at a time, at most 6.
    const QUERIES: usize;

    /// Runs `kernel` in a function of its own: for what many kernels end with, to be compiled once.
    fn apart<K: Kernel>(self, kernel: K);

    fn splat(self, v: f32) -> Self::F;
    unsafe fn load(self, p: *const f32) -> Self::F;
    unsafe fn store(self, p: *mut f32, v: Self::F);
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    unsafe fn load_bf16(self, p: *const u16) -> Self::F;
    unsafe fn store_f16(self, p: *mut u16, v: Self::F);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// Lanes from `n` on become `fill`.
    fn keep_first(self, a: Self::F, n: usize, fill: f32) -> Self::F;
    /// `a * 2^n`; the result must be a normal number.
    fn scale2(self, a: Self::F, n: Self::I) -> Self::F;
    /// The sum in the tree order (i, i+8), (i, i+4), (i, i+2), (i, i+1).
    fn sum(self, a: Self::F) -> f32;
    fn largest(self, a: Self::F) -> f32;

    fn isplat(self, v: i32) -> Self::I;
    fn isub(self, a: Self::I, b: Self::I) -> Self::I;
    fn ishl<const N: u32>(self, a: Self::I) -> Self::I;
    fn to_f(self, a: Self::I) -> Self::F;
    /// Rounds half to even.
    fn round(self, a: Self::F) -> Self::I;
    unsafe fn load_u8(self, p: *const u8) -> Self::I;
    unsafe fn load_i8(self, p: *const i8) -> Self::I;
    /// The low byte of each lane, for values within `i8`.
    unsafe fn store_i8(self, p: *mut i8, v: Self::I);

    unsafe fn load_b(self, p: *const u8) -> Self::B;
    /// The low and the high nibbles of 16 bytes.
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (Self::I, Self::I) {
        // SAFETY: the caller's 16 bytes.
        let bytes = unsafe { p.cast::<u128>().read_unaligned() };
        const LOW: u128 = u128::from_ne_bytes([15; 16]);
        let (low, high) = (
            (bytes & LOW).to_ne_bytes(),
            (bytes >> 4 & LOW).to_ne_bytes(),
        );
        // SAFETY: 16 bytes each.
        unsafe { (self.load_u8(low.as_ptr()), self.load_u8(high.as_ptr())) }
    }
    /// Byte `c` of `table` for every code `c` below 16; the table's 16 bytes are there four times over.
    #[inline(always)]
    fn lookup(self, table: Self::B, codes: Self::B) -> Self::B {
        const { assert!(size_of::<Self::B>() == 64) };
        // SAFETY: B is 64 bytes without padding, of which every pattern is a value.
        unsafe {
            let (table, codes): ([u8; 64], [u8; 64]) =
                (transmute_copy(&table), transmute_copy(&codes));
            let found: [u8; 64] = std::array::from_fn(|i| table[usize::from(codes[i] & 15)]);
            transmute_copy(&found)
        }
    }
    /// Every byte `& mask`.
    fn band(self, a: Self::B, mask: u8) -> Self::B;
    fn bor(self, a: Self::B, b: Self::B) -> Self::B;
    /// Shifts pairs of bytes: mask the result before use.
    fn bshl<const N: u32>(self, a: Self::B) -> Self::B;
    /// Shifts pairs of bytes: mask the result before use.
    fn bshr<const N: u32>(self, a: Self::B) -> Self::B;
    /// Partial sums for the columns of a part, to be added to `acc` by [`Simd::close`].
    fn open(self, acc: &Self::I, part: usize) -> Self::P;
    /// Adds `p` to the columns of a part. `acc` must be what it was at [`Simd::open`].
    fn close(self, acc: &mut Self::I, part: usize, p: Self::P);
    /// `p[c] += Σ w[4c+i] * a[i]` over four weights below 128 and the four signed bytes of row `ROW`, out of
    /// `R` rows that have four each at `a`. Sums may be kept in 16 bits, two for each column: at most
    /// [`chain`] products may be added before [`Simd::close`]. No activation may be -128.
    unsafe fn dot<const R: usize, const ROW: usize>(
        self,
        p: Self::P,
        w: Self::B,
        a: *const i8,
    ) -> Self::P;
    /// The same for weights stored as `w + 128`, with `w` in `-128..128`: the result is the sum for `w +
    /// 128`, or for `w` if [`Simd::SIGNED_WIDE`] is true. One product, then [`Simd::close`].
    unsafe fn dot_wide<const R: usize, const ROW: usize>(
        self,
        p: Self::P,
        w: Self::B,
        a: *const i8,
    ) -> Self::P;

    /// `2^x` for `x <= 0`, to about one unit in the last place times two; below -126 it is about `2^-126`.
    #[inline(always)]
    fn exp2(self, x: Self::F) -> Self::F {
        let x = self.max(x, self.splat(-126.0));
        let n = self.round(x);
        let f = self.sub(x, self.to_f(n));
        let mut p = self.splat(EXP2[0]);
        for &c in &EXP2[1..] {
            p = self.fma(p, f, self.splat(c));
        }
        self.scale2(p, n)
    }

    /// `x / (1 + e^-x)`.
    #[inline(always)]
    fn silu(self, x: Self::F) -> Self::F {
        self.sigmoid_times(x, x)
    }

    /// GELU in its tanh form, `x/2 · (1 + tanh(u))` with `u = √(2/π) · (x + 0.044715 x³)`: the same as `x /
    /// (1 + e^-2u)`.
    #[inline(always)]
    fn gelu_tanh(self, x: Self::F) -> Self::F {
        const LINEAR: f32 = 1.595_769;
        let slope = self.fma(
            self.mul(x, x),
            self.splat(0.044_715 * LINEAR),
            self.splat(LINEAR),
        );
        self.sigmoid_times(self.mul(x, slope), x)
    }

    /// `x / (1 + e^-a)`, for `a` of the sign of `x`.
    #[inline(always)]
    fn sigmoid_times(self, a: Self::F, x: Self::F) -> Self::F {
        // e^-|a| keeps the argument of exp2 negative: for a < 0 the quotient is x e^a / (1 + e^a).
        let e = self.exp2(self.mul(self.abs(a), self.splat(-std::f32::consts::LOG2_E)));
        let one = self.splat(1.0);
        let negative = self.mul(x, e);
        // max(x, 0) + min(x, 0) e^-|a|: x for positive x, x e^a for negative.
        let positive = self.max(x, self.splat(0.0));
        let negative = self.sub(negative, self.mul(positive, e));
        self.div(self.add(positive, negative), self.add(one, e))
    }

    /// `x Φ(x)` with the normal distribution's Φ, to 2e-7 of |x|: erfc by Abramowitz and Stegun's formula
    /// 7.1.26.
    #[inline(always)]
    fn gelu(self, x: Self::F) -> Self::F {
        let size = self.abs(x);
        let z = self.mul(size, self.splat(std::f32::consts::FRAC_1_SQRT_2));
        let one = self.splat(1.0);
        let t = self.div(one, self.fma(z, self.splat(ERFC_P), one));
        let mut p = self.splat(ERFC[0]);
        for &c in &ERFC[1..] {
            p = self.fma(p, t, self.splat(c));
        }
        let exponent = self.mul(self.mul(z, z), self.splat(-std::f32::consts::LOG2_E));
        let tail = self.mul(self.mul(p, t), self.exp2(exponent));
        // x Φ(x) = max(x, 0) - |x| erfc(|x|/√2) / 2, on both sides of zero.
        let half = self.mul(size, self.splat(-0.5));
        self.fma(half, tail, self.max(x, self.splat(0.0)))
    }
}

/// Abramowitz and Stegun 7.1.26: `erfc(z) ≈ (a₁t + … + a₅t⁵) e^(-z²)`, `t = 1 / (1 + pz)`; here a₅ first.
const ERFC_P: f32 = 0.327_591_1;
const ERFC: [f32; 5] = [
    1.061_405_4,
    -1.453_152_1,
    1.421_413_8,
    -0.284_496_72,
    0.254_829_6,
];

/// Coefficients of `2^f` for |f| <= 0.5, highest power first (minimax of degree 6, last one exact).
const EXP2: [f32; 7] = [
    1.535_336_2e-4,
    1.339_887_5e-3,
    9.618_437e-3,
    5.550_332_5e-2,
    2.402_264_7e-1,
    6.931_472e-1,
    1.0,
];
