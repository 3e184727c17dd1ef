//! Two 256-bit registers per vector.

use std::arch::x86_64::*;

use super::{Kernel, Simd};

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The token, where the CPU has the features.
    pub(crate) fn detect() -> Option<Avx2> {
        crate::Isa::Avx2.is_available().then_some(Avx2(()))
    }
}

/// Runs `kernel` in a function with the features.
///
/// # Safety
/// The CPU must have them, which the token proves.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn enter<K: Kernel>(s: Avx2, kernel: K) {
    kernel.run(s);
}

/// Two registers: lanes 0..8 and 8..16.
type F = [__m256; 2];
/// As [`F`].
type I = [__m256i; 2];

macro_rules! methods {
    ($(fn $name:ident $(<const $n:ident: u32>)? ($($arg:ident: $ty:ty),*) $(-> $out:ty)? $body:block)*) => {
        $(
            #[inline(always)]
            fn $name $(<const $n: u32>)? (self, $($arg: $ty),*) $(-> $out)? {
                // SAFETY: the token proves that the CPU has the features.
                unsafe { $body }
            }
        )*
    };
}
macro_rules! pointer_methods {
    ($(fn $name:ident ($($arg:ident: $ty:ty),*) $(-> $out:ty)? $body:block)*) => {
        $(
            #[inline(always)]
            unsafe fn $name (self, $($arg: $ty),*) $(-> $out)? {
                // SAFETY: the token proves the features; the caller vouches for the pointer.
                unsafe { $body }
            }
        )*
    };
}

/// Shift counts are `i32` in these intrinsics and `u32` in the trait, and const generics do not convert.
macro_rules! shift {
    ($op:ident, $a:expr, $n:expr) => {
        match $n {
            0 => $a,
            1 => [$op::<1>($a[0]), $op::<1>($a[1])],
            2 => [$op::<2>($a[0]), $op::<2>($a[1])],
            3 => [$op::<3>($a[0]), $op::<3>($a[1])],
            4 => [$op::<4>($a[0]), $op::<4>($a[1])],
            5 => [$op::<5>($a[0]), $op::<5>($a[1])],
            6 => [$op::<6>($a[0]), $op::<6>($a[1])],
            _ => [$op::<7>($a[0]), $op::<7>($a[1])],
        }
    };
}

impl Simd for Avx2 {
    type F = F;
    type I = I;
    type B = I;

    const SIGNED_WIDE: bool = true;
    const WIDE: bool = false;
    const SINGLE: bool = false;

    methods! {
        fn splat(v: f32) -> F { [_mm256_set1_ps(v); 2] }
        fn add(a: F, b: F) -> F { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        fn sub(a: F, b: F) -> F { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
        fn mul(a: F, b: F) -> F { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        fn div(a: F, b: F) -> F { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
        fn fma(a: F, b: F, c: F) -> F {
            [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
        }
        fn max(a: F, b: F) -> F { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
        fn abs(a: F) -> F {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
        }
        fn keep_first(a: F, n: usize, fill: f32) -> F {
            let n = _mm256_set1_epi32(n.min(16) as i32);
            let fill = _mm256_set1_ps(fill);
            let low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
            [
                _mm256_blendv_ps(fill, a[0], _mm256_castsi256_ps(_mm256_cmpgt_epi32(n, low))),
                _mm256_blendv_ps(fill, a[1], _mm256_castsi256_ps(_mm256_cmpgt_epi32(n, high))),
            ]
        }
        fn scale2(a: F, n: I) -> F {
            [
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a[0]), _mm256_slli_epi32::<23>(n[0]))),
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a[1]), _mm256_slli_epi32::<23>(n[1]))),
            ]
        }
        fn sum(a: F) -> f32 {
            let b = _mm256_add_ps(a[0], a[1]);
            let c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
            let d = _mm_add_ps(c, _mm_movehl_ps(c, c));
            _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)))
        }
        fn largest(a: F) -> f32 {
            let b = _mm256_max_ps(a[0], a[1]);
            let c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
            let d = _mm_max_ps(c, _mm_movehl_ps(c, c));
            _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)))
        }
        fn isplat(v: i32) -> I { [_mm256_set1_epi32(v); 2] }
        fn isub(a: I, b: I) -> I { [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])] }
        fn ishl<const N: u32>(a: I) -> I { shift!(_mm256_slli_epi32, a, N) }
        fn to_f(a: I) -> F { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
        fn round(a: F) -> I { [_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])] }
        fn band(a: I, mask: u8) -> I {
            let mask = _mm256_set1_epi8(mask.cast_signed());
            [_mm256_and_si256(a[0], mask), _mm256_and_si256(a[1], mask)]
        }
        fn bor(a: I, b: I) -> I { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
        fn lookup(table: I, codes: I) -> I {
            [_mm256_shuffle_epi8(table[0], codes[0]), _mm256_shuffle_epi8(table[0], codes[1])]
        }
        fn bshl<const N: u32>(a: I) -> I { shift!(_mm256_slli_epi16, a, N) }
        fn bshr<const N: u32>(a: I) -> I { shift!(_mm256_srli_epi16, a, N) }
    }

    pointer_methods! {
        fn load(p: *const f32) -> F { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
        fn store(p: *mut f32, v: F) {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        }
        fn load_f16(p: *const u16) -> F {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
            ]
        }
        fn load_bf16(p: *const u16) -> F {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
        }
        fn store_f16(p: *mut u16, v: F) {
            _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]));
            _mm_storeu_si128(p.add(8).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]));
        }
        fn load_u8(p: *const u8) -> I {
            [
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast())),
            ]
        }
        fn load_i8(p: *const i8) -> I {
            [
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())),
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast())),
            ]
        }
        fn store_i8(p: *mut i8, v: I) {
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(v[0], v[1]));
            let low = _mm256_castsi256_si128(words);
            let high = _mm256_extracti128_si256::<1>(words);
            _mm_storeu_si128(p.cast(), _mm_packs_epi16(low, high));
        }
        fn load_b(p: *const u8) -> I {
            [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())]
        }
        fn dot(acc: I, w: I, a: *const i8) -> I {
            // Products of a weight below 128 and a byte, added in pairs, stay below 2^15: no saturation.
            let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
            let ones = _mm256_set1_epi16(1);
            let low = _mm256_madd_epi16(_mm256_maddubs_epi16(w[0], a), ones);
            let high = _mm256_madd_epi16(_mm256_maddubs_epi16(w[1], a), ones);
            [_mm256_add_epi32(acc[0], low), _mm256_add_epi32(acc[1], high)]
        }
        fn dot_wide(acc: I, w: I, a: *const i8) -> I {
            // |w| <= 128 times ±a with |a| <= 127: a pair is at most 32512 in magnitude.
            let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
            let ones = _mm256_set1_epi16(1);
            let flip = _mm256_set1_epi8(-128);
            let mut out = acc;
            for half in 0..2 {
                let w = _mm256_xor_si256(w[half], flip);
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
                out[half] = _mm256_add_epi32(acc[half], _mm256_madd_epi16(pairs, ones));
            }
            out
        }
    }
}
