//! Four 128-bit registers per vector, for x86-64 CPUs without AVX; f16 in integer arithmetic.

use std::arch::x86_64::*;

use super::halves::{narrow, select, widen};
use super::methods::{byte_methods, four, methods, pointer_methods, quarter_methods, shift};
use super::{Kernel, Simd};

/// Proof that the CPU has SSE2: every x86-64 CPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sse2(());

/// Proof that the CPU has SSE4.1 and SSSE3.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sse41(());

impl Sse2 {
    /// The token.
    pub(crate) fn detect() -> Option<Sse2> {
        crate::Isa::Sse2.is_available().then_some(Sse2(()))
    }
}

impl Sse41 {
    /// The token, where the CPU has the features.
    pub(crate) fn detect() -> Option<Sse41> {
        crate::Isa::Sse41.is_available().then_some(Sse41(()))
    }
}

/// Runs `kernel` in a function with SSE2.
///
/// # Safety
/// The CPU must have it, which the token proves.
#[inline(never)]
#[target_feature(enable = "sse2")]
pub(crate) unsafe fn enter_sse2<K: Kernel>(s: Sse2, kernel: K) {
    kernel.run(s);
}

/// Runs `kernel` in a function with SSE4.1 and SSSE3.
///
/// # Safety
/// The CPU must have them, which the token proves.
#[inline(never)]
#[target_feature(enable = "sse4.1,ssse3")]
pub(crate) unsafe fn enter_sse41<K: Kernel>(s: Sse41, kernel: K) {
    kernel.run(s);
}

/// Four registers: lanes 0..4, 4..8, 8..12, 12..16.
type F = [__m128; 4];
/// As [`F`].
type I = [__m128i; 4];

/// Floats, and what follows from the number of registers: the same in both sets, with instructions of SSE2.
macro_rules! common {
    ($enter:ident) => {
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
            unsafe { $enter(self, kernel) }
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
                let fill = _mm_castps_si128(_mm_set1_ps(fill));
                let first = _mm_setr_epi32(0, 1, 2, 3);
                four!(i => {
                    let index = _mm_add_epi32(first, _mm_set1_epi32(4 * i));
                    let first = select(_mm_cmpgt_epi32(n, index), _mm_castps_si128(a[i as usize]), fill);
                    _mm_castsi128_ps(first)
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
                _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps::<1>(d, d)))
            }
            fn largest(a: F) -> f32 {
                let c = _mm_max_ps(_mm_max_ps(a[0], a[2]), _mm_max_ps(a[1], a[3]));
                let d = _mm_max_ps(c, _mm_movehl_ps(c, c));
                _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps::<1>(d, d)))
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
    };
}

impl Simd for Sse41 {
    common! { enter_sse41 }
    byte_methods! {}
}

impl Simd for Sse2 {
    common! { enter_sse2 }

    methods! {
        fn lookup(table: __m128i, codes: __m128i) -> __m128i {
            let (mut table_bytes, mut bytes) = ([0u8; 16], [0u8; 16]);
            _mm_storeu_si128(table_bytes.as_mut_ptr().cast(), table);
            _mm_storeu_si128(bytes.as_mut_ptr().cast(), codes);
            let found = bytes.map(|code| table_bytes[usize::from(code & 15)]);
            _mm_loadu_si128(found.as_ptr().cast())
        }
    }

    pointer_methods! {
        fn load_u8(p: *const u8) -> I {
            let zero = _mm_setzero_si128();
            four!(i => {
                let words = _mm_unpacklo_epi8(_mm_loadu_si32(p.add(4 * i)), zero);
                _mm_unpacklo_epi16(words, zero)
            })
        }
        fn load_i8(p: *const i8) -> I {
            four!(i => {
                let bytes = _mm_loadu_si32(p.cast::<u8>().add(4 * i));
                let words = _mm_unpacklo_epi8(bytes, bytes);
                _mm_srai_epi32::<24>(_mm_unpacklo_epi16(words, words))
            })
        }
        fn dot<const R: usize, const ROW: usize>(p: __m128i, w: __m128i, a: *const i8) -> __m128i {
            let low = _mm_and_si128(w, _mm_set1_epi16(0xff));
            add_products(p, [low, _mm_srli_epi16::<8>(w)], a.add(4 * ROW))
        }
        fn dot_wide<const R: usize, const ROW: usize>(p: __m128i, w: __m128i, a: *const i8) -> __m128i {
            let w = _mm_xor_si128(w, _mm_set1_epi8(-128));
            add_products(p, signed_words(w), a.add(4 * ROW))
        }
    }
}

/// The signed bytes with even and those with odd numbers.
#[inline(always)]
fn signed_words(bytes: __m128i) -> [__m128i; 2] {
    // SAFETY: every x86-64 CPU has SSE2.
    unsafe {
        let low = _mm_srai_epi16::<8>(_mm_slli_epi16::<8>(bytes));
        [low, _mm_srai_epi16::<8>(bytes)]
    }
}

/// `p` with the products of weights and the four bytes at `a` added in 16 bits, two for each sum.
///
/// # Safety
/// Four bytes must be readable at `a`.
#[inline(always)]
unsafe fn add_products(p: __m128i, w: [__m128i; 2], a: *const i8) -> __m128i {
    // SAFETY: every x86-64 CPU has SSE2; the caller vouches for the pointer.
    unsafe {
        let a = signed_words(_mm_set1_epi32(a.cast::<i32>().read_unaligned()));
        let products = [_mm_mullo_epi16(w[0], a[0]), _mm_mullo_epi16(w[1], a[1])];
        _mm_add_epi16(p, _mm_add_epi16(products[0], products[1]))
    }
}
