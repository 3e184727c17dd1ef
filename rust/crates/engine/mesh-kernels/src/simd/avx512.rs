//! One 512-bit register per vector; VNNI for the integer products where the CPU has it.

use std::arch::x86_64::*;

use super::methods::{methods, pointer_methods};
use super::{Kernel, Simd};
use crate::Isa;

/// Proof that the CPU has AVX-512 F, BW, DQ and VL, and VNNI if `VNNI` is true.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>(());

impl<const VNNI: bool> Avx512<VNNI> {
    /// The token, where the CPU has the features.
    pub(crate) fn detect() -> Option<Self> {
        let isa = if VNNI { Isa::Avx512 } else { Isa::Avx512Bw };
        isa.is_available().then_some(Avx512(()))
    }
}

/// Runs `kernel` in a function with the features.
///
/// # Safety
/// The CPU must have them, which the token proves.
#[inline(always)]
pub(crate) unsafe fn enter<K: Kernel, const VNNI: bool>(s: Avx512<VNNI>, kernel: K) {
    // SAFETY: the caller's promise.
    unsafe {
        if VNNI {
            with_vnni(s, kernel);
        } else {
            without_vnni(s, kernel);
        }
    }
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn without_vnni<K: Kernel, const VNNI: bool>(s: Avx512<VNNI>, kernel: K) {
    kernel.run(s);
}

#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn with_vnni<K: Kernel, const VNNI: bool>(s: Avx512<VNNI>, kernel: K) {
    kernel.run(s);
}

impl<const VNNI: bool> Simd for Avx512<VNNI> {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type P = __m512i;

    const PARTS: usize = 1;
    const SIGNED_WIDE: bool = !VNNI;
    const WIDE: bool = true;
    const ROWS: usize = 8;
    const FLOAT_ROWS: usize = 8;
    const QUERIES: usize = 6;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) {
        // SAFETY: the token proves that the CPU has the features.
        unsafe { enter(self, kernel) }
    }

    methods! {
        fn splat(v: f32) -> __m512 { _mm512_set1_ps(v) }
        fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn fma(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn abs(a: __m512) -> __m512 { _mm512_abs_ps(a) }
        fn keep_first(a: __m512, n: usize, fill: f32) -> __m512 {
            let mask = ((1_u32 << n.min(16)) - 1) as u16;
            _mm512_mask_blend_ps(mask, _mm512_set1_ps(fill), a)
        }
        fn scale2(a: __m512, n: __m512i) -> __m512 {
            let shifted = _mm512_slli_epi32::<23>(n);
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), shifted))
        }
        fn sum(a: __m512) -> f32 {
            let b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
            let d = _mm_add_ps(c, _mm_movehl_ps(c, c));
            _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)))
        }
        fn largest(a: __m512) -> f32 {
            let b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
            let d = _mm_max_ps(c, _mm_movehl_ps(c, c));
            _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)))
        }
        fn isplat(v: i32) -> __m512i { _mm512_set1_epi32(v) }
        fn isub(a: __m512i, b: __m512i) -> __m512i { _mm512_sub_epi32(a, b) }
        fn ishl<const N: u32>(a: __m512i) -> __m512i { _mm512_slli_epi32::<N>(a) }
        fn to_f(a: __m512i) -> __m512 { _mm512_cvtepi32_ps(a) }
        fn round(a: __m512) -> __m512i { _mm512_cvtps_epi32(a) }
        fn band(a: __m512i, mask: u8) -> __m512i { _mm512_and_si512(a, _mm512_set1_epi8(mask.cast_signed())) }
        fn bor(a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        fn lookup(table: __m512i, codes: __m512i) -> __m512i { _mm512_shuffle_epi8(table, codes) }
        fn bshl<const N: u32>(a: __m512i) -> __m512i { _mm512_slli_epi16::<N>(a) }
        fn bshr<const N: u32>(a: __m512i) -> __m512i { _mm512_srli_epi16::<N>(a) }
        fn open(acc: &__m512i, _part: usize) -> __m512i { if VNNI { *acc } else { _mm512_setzero_si512() } }
        fn close(acc: &mut __m512i, _part: usize, p: __m512i) {
            *acc = if VNNI {
                p
            } else {
                _mm512_add_epi32(*acc, _mm512_madd_epi16(p, _mm512_set1_epi16(1)))
            };
        }
    }

    pointer_methods! {
        fn load(p: *const f32) -> __m512 { _mm512_loadu_ps(p) }
        fn store(p: *mut f32, v: __m512) { _mm512_storeu_ps(p, v) }
        fn load_f16(p: *const u16) -> __m512 { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        fn load_bf16(p: *const u16) -> __m512 {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
        fn store_f16(p: *mut u16, v: __m512) {
            _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
        }
        fn load_u8(p: *const u8) -> __m512i { _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast())) }
        fn load_i8(p: *const i8) -> __m512i { _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())) }
        fn store_i8(p: *mut i8, v: __m512i) { _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(v)) }
        fn load_b(p: *const u8) -> __m512i { _mm512_loadu_si512(p.cast()) }
        fn dot<const R: usize, const ROW: usize>(p: __m512i, w: __m512i, a: *const i8) -> __m512i {
            let a = _mm512_set1_epi32(a.cast::<i32>().add(ROW).read_unaligned());
            if VNNI {
                _mm512_dpbusd_epi32(p, w, a)
            } else {
                _mm512_add_epi16(p, _mm512_maddubs_epi16(w, a))
            }
        }
        fn dot_wide<const R: usize, const ROW: usize>(p: __m512i, w: __m512i, a: *const i8) -> __m512i {
            let a = _mm512_set1_epi32(a.cast::<i32>().add(ROW).read_unaligned());
            if VNNI {
                return _mm512_dpbusd_epi32(p, w, a);
            }
            // As on AVX2: |w| times a with the sign of w.
            let w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
            let negative = _mm512_movepi8_mask(w);
            let a = _mm512_mask_sub_epi8(a, negative, _mm512_setzero_si512(), a);
            _mm512_add_epi16(p, _mm512_maddubs_epi16(_mm512_abs_epi8(w), a))
        }
    }
}
