//! Two 256-bit registers per vector; AVX-VNNI for the integer products where the CPU has it.

use std::arch::x86_64::*;

use super::methods::{methods, pointer_methods, shift, two};
use super::{Kernel, Simd};
use crate::Isa;

/// Proof that the CPU has AVX2, FMA and F16C, and AVX-VNNI if `VNNI` is true.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    /// The token, where the CPU has the features.
    pub(crate) fn detect() -> Option<Self> {
        let isa = if VNNI { Isa::AvxVnni } else { Isa::Avx2 };
        isa.is_available().then_some(Avx2(()))
    }
}

/// Runs `kernel` in a function with the features.
///
/// # Safety
/// The CPU must have them, which the token proves.
#[inline(always)]
pub(crate) unsafe fn enter<K: Kernel, const VNNI: bool>(s: Avx2<VNNI>, kernel: K) {
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
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn without_vnni<K: Kernel, const VNNI: bool>(s: Avx2<VNNI>, kernel: K) {
    kernel.run(s);
}

#[cfg(not(feature = "evex-vnni"))]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn with_vnni<K: Kernel, const VNNI: bool>(s: Avx2<VNNI>, kernel: K) {
    kernel.run(s);
}

/// The same kernels with AVX-512's encoding of VPDPBUSD: the tests run them on CPUs that have only that.
#[cfg(feature = "evex-vnni")]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512vl,avx512vnni")]
unsafe fn with_vnni<K: Kernel, const VNNI: bool>(s: Avx2<VNNI>, kernel: K) {
    kernel.run(s);
}

/// `acc[c] += Σ w[4c+i] * a[4c+i]`, unsigned times signed bytes.
#[inline(always)]
unsafe fn dpbusd(acc: __m256i, w: __m256i, a: __m256i) -> __m256i {
    // SAFETY: the callers' token proves VNNI in the encoding that `with_vnni` names.
    unsafe {
        #[cfg(not(feature = "evex-vnni"))]
        return _mm256_dpbusd_avx_epi32(acc, w, a);
        #[cfg(feature = "evex-vnni")]
        return _mm256_dpbusd_epi32(acc, w, a);
    }
}

/// Two registers: lanes 0..8 and 8..16.
type F = [__m256; 2];
/// As [`F`].
type I = [__m256i; 2];

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F = F;
    type I = I;
    type B = I;
    type P = I;

    const PARTS: usize = 1;
    const SIGNED_WIDE: bool = !VNNI;
    const WIDE: bool = false;
    const ROWS: usize = 4;
    const FLOAT_ROWS: usize = 4;
    const QUERIES: usize = 6;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) {
        // SAFETY: the token proves that the CPU has the features.
        unsafe { enter(self, kernel) }
    }

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
        fn ishl<const N: u32>(a: I) -> I { two!(i => shift!(_mm256_slli_epi32, a[i], N)) }
        fn to_f(a: I) -> F { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
        fn round(a: F) -> I { [_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])] }
        fn band(a: I, mask: u8) -> I {
            let mask = _mm256_set1_epi8(mask.cast_signed());
            [_mm256_and_si256(a[0], mask), _mm256_and_si256(a[1], mask)]
        }
        fn bor(a: I, b: I) -> I { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
        fn lookup(table: I, codes: I) -> I { two!(i => _mm256_shuffle_epi8(table[0], codes[i])) }
        fn bshl<const N: u32>(a: I) -> I { two!(i => shift!(_mm256_slli_epi16, a[i], N)) }
        fn bshr<const N: u32>(a: I) -> I { two!(i => shift!(_mm256_srli_epi16, a[i], N)) }
        fn open(acc: &I, _part: usize) -> I { if VNNI { *acc } else { [_mm256_setzero_si256(); 2] } }
        fn close(acc: &mut I, _part: usize, p: I) {
            if VNNI {
                *acc = p;
                return;
            }
            let ones = _mm256_set1_epi16(1);
            *acc = two!(i => _mm256_add_epi32(acc[i], _mm256_madd_epi16(p[i], ones)));
        }
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
        fn dot<const R: usize, const ROW: usize>(p: I, w: I, a: *const i8) -> I {
            let a = _mm256_set1_epi32(a.cast::<i32>().add(ROW).read_unaligned());
            if VNNI {
                return two!(i => dpbusd(p[i], w[i], a));
            }
            two!(i => _mm256_add_epi16(p[i], _mm256_maddubs_epi16(w[i], a)))
        }
        fn dot_wide<const R: usize, const ROW: usize>(p: I, w: I, a: *const i8) -> I {
            let a = _mm256_set1_epi32(a.cast::<i32>().add(ROW).read_unaligned());
            if VNNI {
                return two!(i => dpbusd(p[i], w[i], a));
            }
            let flip = _mm256_set1_epi8(-128);
            two!(i => {
                let w = _mm256_xor_si256(w[i], flip);
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
                _mm256_add_epi16(p[i], pairs)
            })
        }
    }
}
