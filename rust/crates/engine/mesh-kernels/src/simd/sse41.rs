//! Four 128-bit registers per vector, for CPUs without AVX; f16 in integer arithmetic.

use std::arch::x86_64::*;

use super::halves::{narrow, widen};
use super::methods::{four, methods, pointer_methods, shift};
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
    const SINGLE: bool = false;
    const FLOAT_ROWS: usize = 2;
    const QUERIES: usize = 3;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) {
        // SAFETY: the token proves that the CPU has the features.
        unsafe { enter(self, kernel) }
    }

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
        fn isplat(v: i32) -> I { [_mm_set1_epi32(v); 4] }
        fn isub(a: I, b: I) -> I { four!(i => _mm_sub_epi32(a[i], b[i])) }
        fn ishl<const N: u32>(a: I) -> I { four!(i => shift!(_mm_slli_epi32, a[i], N)) }
        fn to_f(a: I) -> F { four!(i => _mm_cvtepi32_ps(a[i])) }
        fn round(a: F) -> I { four!(i => _mm_cvtps_epi32(a[i])) }
        fn band(a: __m128i, mask: u8) -> __m128i { _mm_and_si128(a, _mm_set1_epi8(mask.cast_signed())) }
        fn lookup(table: __m128i, codes: __m128i) -> __m128i { _mm_shuffle_epi8(table, codes) }
        fn bor(a: __m128i, b: __m128i) -> __m128i { _mm_or_si128(a, b) }
        fn bshl<const N: u32>(a: __m128i) -> __m128i { shift!(_mm_slli_epi16, a, N) }
        fn bshr<const N: u32>(a: __m128i) -> __m128i { shift!(_mm_srli_epi16, a, N) }
        fn open(_acc: &I, _part: usize) -> __m128i { _mm_setzero_si128() }
        fn close(acc: &mut I, part: usize, p: __m128i) {
            acc[part] = _mm_add_epi32(acc[part], _mm_madd_epi16(p, _mm_set1_epi16(1)));
        }
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
        fn load_u8(p: *const u8) -> I {
            four!(i => _mm_cvtepu8_epi32(_mm_loadu_si32(p.add(4 * i))))
        }
        fn load_i8(p: *const i8) -> I {
            four!(i => _mm_cvtepi8_epi32(_mm_loadu_si32(p.cast::<u8>().add(4 * i))))
        }
        fn store_i8(p: *mut i8, v: I) {
            let words = [_mm_packs_epi32(v[0], v[1]), _mm_packs_epi32(v[2], v[3])];
            _mm_storeu_si128(p.cast(), _mm_packs_epi16(words[0], words[1]));
        }
        fn load_b(p: *const u8) -> __m128i { _mm_loadu_si128(p.cast()) }
        fn dot(p: __m128i, w: __m128i, a: *const i8) -> __m128i {
            let a = _mm_set1_epi32(a.cast::<i32>().read_unaligned());
            _mm_add_epi16(p, _mm_maddubs_epi16(w, a))
        }
        fn dot_wide(p: __m128i, w: __m128i, a: *const i8) -> __m128i {
            let a = _mm_set1_epi32(a.cast::<i32>().read_unaligned());
            let w = _mm_xor_si128(w, _mm_set1_epi8(-128));
            _mm_add_epi16(p, _mm_maddubs_epi16(_mm_abs_epi8(w), _mm_sign_epi8(a, w)))
        }
    }
}
