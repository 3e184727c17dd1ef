//! Two 256-bit registers of floats and four 128-bit ones of integers per vector: AVX without AVX2 and FMA
//! (Sandy Bridge, Ivy Bridge, Bulldozer, Piledriver).

use std::arch::asm;
use std::arch::x86_64::*;

use super::halves::{narrow, widen};
use super::methods::{byte_methods, four, methods, pointer_methods, quarter_methods, shift, two};
use super::{Kernel, Simd};

/// Proof that the CPU has AVX.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx {
    /// True if it has F16C too, which Sandy Bridge and Bulldozer lack.
    f16c: bool,
}

impl Avx {
    /// The token, where the CPU has the features.
    pub(crate) fn detect() -> Option<Avx> {
        crate::Isa::Avx.is_available().then(|| Avx {
            f16c: is_x86_feature_detected!("f16c"),
        })
    }
}

/// Runs `kernel` in a function with the features.
///
/// # Safety
/// The CPU must have them, which the token proves.
#[inline(never)]
#[target_feature(enable = "avx")]
pub(crate) unsafe fn enter<K: Kernel>(s: Avx, kernel: K) {
    kernel.run(s);
}

/// Two registers: lanes 0..8 and 8..16.
type F = [__m256; 2];
/// Four registers: lanes 0..4, 4..8, 8..12, 12..16.
type I = [__m128i; 4];

/// Lanes 0..8 or 8..16 as one register.
macro_rules! joined {
    ($a:expr, $half:expr) => {
        _mm256_set_m128i($a[2 * $half + 1], $a[2 * $half])
    };
}

/// The lower or the upper half of a register.
macro_rules! split {
    ($a:expr) => {
        [
            _mm256_castsi256_si128($a[0]),
            _mm256_extractf128_si256::<1>($a[0]),
            _mm256_castsi256_si128($a[1]),
            _mm256_extractf128_si256::<1>($a[1]),
        ]
    };
}

impl Simd for Avx {
    type F = F;
    type I = I;
    type B = __m128i;
    type P = __m128i;

    const PARTS: usize = 4;
    const SIGNED_WIDE: bool = true;
    const WIDE: bool = false;
    const ROWS: usize = 4;
    const FLOAT_ROWS: usize = 4;
    const QUERIES: usize = 4;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) {
        // SAFETY: the token proves that the CPU has the features.
        unsafe { enter(self, kernel) }
    }

    quarter_methods! {}
    byte_methods! {}

    methods! {
        fn splat(v: f32) -> F { [_mm256_set1_ps(v); 2] }
        fn add(a: F, b: F) -> F { two!(i => _mm256_add_ps(a[i], b[i])) }
        fn sub(a: F, b: F) -> F { two!(i => _mm256_sub_ps(a[i], b[i])) }
        fn mul(a: F, b: F) -> F { two!(i => _mm256_mul_ps(a[i], b[i])) }
        fn div(a: F, b: F) -> F { two!(i => _mm256_div_ps(a[i], b[i])) }
        fn fma(a: F, b: F, c: F) -> F { two!(i => _mm256_add_ps(_mm256_mul_ps(a[i], b[i]), c[i])) }
        fn max(a: F, b: F) -> F { two!(i => _mm256_max_ps(a[i], b[i])) }
        fn abs(a: F) -> F {
            let sign = _mm256_set1_ps(-0.0);
            two!(i => _mm256_andnot_ps(sign, a[i]))
        }
        fn keep_first(a: F, n: usize, fill: f32) -> F {
            let n = _mm256_set1_ps(n.min(16) as f32);
            let fill = _mm256_set1_ps(fill);
            let first = _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0);
            two!(i => {
                let index = _mm256_add_ps(first, _mm256_set1_ps((8 * i) as f32));
                _mm256_blendv_ps(fill, a[i], _mm256_cmp_ps::<_CMP_LT_OQ>(index, n))
            })
        }
        fn scale2(a: F, n: I) -> F {
            let a = [_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1])];
            let a = split!(a);
            let sums = four!(i => _mm_add_epi32(a[i], _mm_slli_epi32::<23>(n[i])));
            two!(i => _mm256_castsi256_ps(joined!(sums, i)))
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
        fn to_f(a: I) -> F { two!(i => _mm256_cvtepi32_ps(joined!(a, i))) }
        fn round(a: F) -> I {
            let rounded = two!(i => _mm256_cvtps_epi32(a[i]));
            split!(rounded)
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> F {
        // SAFETY: the token proves the features; the caller vouches for the pointer.
        unsafe {
            if self.f16c {
                return two!(i => widen_f16c(p.add(8 * i)));
            }
            two!(i => {
                let [low, high] = widen(_mm_loadu_si128(p.add(8 * i).cast()));
                _mm256_set_m128(high, low)
            })
        }
    }

    pointer_methods! {
        fn load(p: *const f32) -> F { two!(i => _mm256_loadu_ps(p.add(8 * i))) }
        fn store(p: *mut f32, v: F) {
            two!(i => _mm256_storeu_ps(p.add(8 * i), v[i]));
        }
        fn load_bf16(p: *const u16) -> F {
            let zero = _mm_setzero_si128();
            two!(i => {
                let words = _mm_loadu_si128(p.add(8 * i).cast());
                let low = _mm_castsi128_ps(_mm_unpacklo_epi16(zero, words));
                _mm256_set_m128(_mm_castsi128_ps(_mm_unpackhi_epi16(zero, words)), low)
            })
        }
        fn store_f16(p: *mut u16, v: F) {
            // Once per position: not worth F16C.
            two!(i => {
                let halves = [_mm256_castps256_ps128(v[i]), _mm256_extractf128_ps::<1>(v[i])];
                _mm_storeu_si128(p.add(8 * i).cast(), narrow(halves))
            });
        }
    }
}

/// Eight halves as floats, by F16C. An instruction for four of them in a function that has no more than AVX,
/// because the same code runs where F16C is missing.
///
/// # Safety
/// The CPU has F16C and AVX; 8 halves are readable.
#[inline(always)]
unsafe fn widen_f16c(p: *const u16) -> __m256 {
    let (low, high): (__m128, __m128);
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "vcvtph2ps {low}, qword ptr [{p}]",
            "vcvtph2ps {high}, qword ptr [{p} + 8]",
            low = out(xmm_reg) low, high = lateout(xmm_reg) high, p = in(reg) p,
            options(pure, readonly, nostack, preserves_flags),
        );
        _mm256_set_m128(high, low)
    }
}
