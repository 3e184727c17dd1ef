//! Four 128-bit registers per vector, for CPUs without AVX; f16 in integer arithmetic.

use std::arch::x86_64::*;

use super::halves::{narrow, widen};
use super::methods::{four, methods, pointer_methods, quarter_methods, shift};
use super::{Kernel, Simd};

/// Proof that the CPU has SSE4.1 and SSSE3.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sse41(());

impl Sse41 {
    /// The token, where the CPU has the features.
    pub(crate) fn detect() -> Option<Sse41> {
        crate::Isa::Sse41.is_available().then_some(Sse41(()))
    }
}

/// Runs `kernel` in a function with the features.
///
/// # Safety
/// The CPU must have them, which the token proves.
#[inline(never)]
#[target_feature(enable = "sse4.1,ssse3")]
pub(crate) unsafe fn enter<K: Kernel>(s: Sse41, kernel: K) {
    kernel.run(s);
}

/// Four registers: lanes 0..4, 4..8, 8..12, 12..16.
type F = [__m128; 4];
/// As [`F`].
type I = [__m128i; 4];

impl Simd for Sse41 {
    type F = F;
    type I = I;
    type B = __m128i;
    type P = __m128i;

    const PARTS: usize = 4;
    const SIGNED_WIDE: bool = true;
    const WIDE: bool = false;
    const ROWS: usize = 4;
    const FLOAT_ROWS: usize = 2;
    const QUERIES: usize = 3;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) {
        // SAFETY: the token proves that the CPU has the features.
        unsafe { enter(self, kernel) }
    }

    quarter_methods! {}

    methods! {
        fn splat(v: f32) -> F { [_mm_set1_ps(v); 4] }
        fn add(a: F, b: F) -> F { four!(i => _mm_add_ps(a[i], b[i])) }
        fn sub(a: F, b: F) -> F { four!(i => _mm_sub_ps(a[i], b[i])) }
        fn mul(a: F, b: F) -> F { four!(i => _mm_mul_ps(a[i], b[i])) }
        fn div(a: F, b: F) -> F { four!(i => _mm_div_ps(a[i], b[i])) }
        fn fma(a: F, b: F, c: F) -> F { four!(i => _mm_add_ps(_mm_mul_ps(a[i], b[i]), c[i])) }
        fn max(a: F, b: F) -> F { four!(i => _mm_max_ps(a[i], b[i])) }
        fn abs(a: F) -> F {
            let sign = _mm_set1_ps(-0.0);
            four!(i => _mm_andnot_ps(sign, a[i]))
        }
        fn keep_first(a: F, n: usize, fill: f32) -> F {
            let n = _mm_set1_epi32(n.min(16) as i32);
            let fill = _mm_set1_ps(fill);
            let first = _mm_setr_epi32(0, 1, 2, 3);
            four!(i => {
                let index = _mm_add_epi32(first, _mm_set1_epi32(4 * i));
                _mm_blendv_ps(fill, a[i as usize], _mm_castsi128_ps(_mm_cmpgt_epi32(n, index)))
            })
        }
        fn scale2(a: F, n: I) -> F {
            four!(i => {
                let shifted = _mm_slli_epi32::<23>(n[i]);
                _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(a[i]), shifted))
            })
        }
        fn sum(a: F) -> f32 {
            let c = _mm_add_ps(_mm_add_ps(a[0], a[2]), _mm_add_ps(a[1], a[3]));
            let d = _mm_add_ps(c, _mm_movehl_ps(c, c));
            _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)))
        }
        fn largest(a: F) -> f32 {
            let c = _mm_max_ps(_mm_max_ps(a[0], a[2]), _mm_max_ps(a[1], a[3]));
            let d = _mm_max_ps(c, _mm_movehl_ps(c, c));
            _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)))
        }
        fn to_f(a: I) -> F { four!(i => _mm_cvtepi32_ps(a[i])) }
        fn round(a: F) -> I { four!(i => _mm_cvtps_epi32(a[i])) }
    }

    pointer_methods! {
        fn load(p: *const f32) -> F { four!(i => _mm_loadu_ps(p.add(4 * i))) }
        fn store(p: *mut f32, v: F) {
            four!(i => _mm_storeu_ps(p.add(4 * i), v[i]));
        }
        fn load_f16(p: *const u16) -> F {
            let low = widen(_mm_loadu_si128(p.cast()));
            let high = widen(_mm_loadu_si128(p.add(8).cast()));
            [low[0], low[1], high[0], high[1]]
        }
        fn load_bf16(p: *const u16) -> F {
            let zero = _mm_setzero_si128();
            let (low, high) = (_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(8).cast()));
            [
                _mm_castsi128_ps(_mm_unpacklo_epi16(zero, low)),
                _mm_castsi128_ps(_mm_unpackhi_epi16(zero, low)),
                _mm_castsi128_ps(_mm_unpacklo_epi16(zero, high)),
                _mm_castsi128_ps(_mm_unpackhi_epi16(zero, high)),
            ]
        }
        fn store_f16(p: *mut u16, v: F) {
            _mm_storeu_si128(p.cast(), narrow([v[0], v[1]]));
            _mm_storeu_si128(p.add(8).cast(), narrow([v[2], v[3]]));
        }
    }
}
