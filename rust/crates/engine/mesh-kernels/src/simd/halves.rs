//! Conversion of f16 in integer arithmetic, for x86 CPUs without F16C: exact, and to nearest even, as F16C.

use std::arch::x86_64::*;

/// Eight halves as floats.
///
/// # Safety
/// The CPU has SSE2.
#[inline(always)]
pub(crate) unsafe fn widen(h: __m128i) -> [__m128; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let zero = _mm_setzero_si128();
        // Infinities and NaNs have all bits of the exponent set, in an f32 too: three bits more.
        let exponent = _mm_set1_epi16(0x7c00);
        let beyond = _mm_cmpeq_epi16(_mm_and_si128(h, exponent), exponent);
        let beyond = _mm_and_si128(beyond, _mm_set1_epi16(0x7000));
        [
            widen_four(
                _mm_unpacklo_epi16(zero, h),
                _mm_unpacklo_epi16(zero, beyond),
            ),
            widen_four(
                _mm_unpackhi_epi16(zero, h),
                _mm_unpackhi_epi16(zero, beyond),
            ),
        ]
    }
}

/// Four halves in the upper halves of the lanes, and the bits that their exponents lack.
#[inline(always)]
unsafe fn widen_four(h: __m128i, beyond: __m128i) -> __m128 {
    // SAFETY: the caller's promise.
    unsafe {
        // The exponent's bias grows by 112. A product does that for subnormal numbers too.
        let bias = _mm_castsi128_ps(_mm_set1_epi32((127 + 112) << 23));
        let bits = _mm_and_si128(_mm_srai_epi32::<3>(h), _mm_set1_epi32(!0x7000_0000));
        _mm_mul_ps(_mm_castsi128_ps(_mm_or_si128(bits, beyond)), bias)
    }
}

/// Eight floats as halves.
///
/// # Safety
/// The CPU has SSE2.
#[inline(always)]
pub(crate) unsafe fn narrow(v: [__m128; 2]) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe {
        // With the sign of 16 bits, so that packing does not change them.
        let [low, high] = [narrow_four(v[0]), narrow_four(v[1])];
        let low = _mm_srai_epi32::<16>(_mm_slli_epi32::<16>(low));
        let high = _mm_srai_epi32::<16>(_mm_slli_epi32::<16>(high));
        _mm_packs_epi32(low, high)
    }
}

/// `a` where the mask's bits are set, else `b`.
///
/// # Safety
/// The CPU has SSE2.
#[inline(always)]
pub(super) unsafe fn select(mask: __m128i, a: __m128i, b: __m128i) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe { _mm_or_si128(_mm_and_si128(mask, a), _mm_andnot_si128(mask, b)) }
}

/// Four floats as halves in 32-bit lanes.
#[inline(always)]
unsafe fn narrow_four(v: __m128) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe {
        let bits = _mm_castps_si128(v);
        let size = _mm_and_si128(bits, _mm_set1_epi32(0x7fff_ffff));
        let sign = _mm_srli_epi32::<16>(_mm_xor_si128(bits, size));
        // Normal: the bias shrinks by 112; half of the last place less one is added, and one for odd numbers.
        let odd = _mm_and_si128(_mm_srli_epi32::<13>(size), _mm_set1_epi32(1));
        let offset = _mm_set1_epi32(0xfff - (112 << 23));
        let normal = _mm_srli_epi32::<13>(_mm_add_epi32(_mm_add_epi32(size, offset), odd));
        // Subnormal: the last place of 0.5 is that of the smallest halves, so adding it rounds.
        let half = _mm_set1_ps(0.5);
        let small = _mm_add_ps(_mm_castsi128_ps(size), half);
        let small = _mm_sub_epi32(_mm_castps_si128(small), _mm_castps_si128(half));
        let is_small = _mm_cmplt_epi32(size, _mm_set1_epi32(113 << 23));
        let finite = select(is_small, small, normal);
        // From 65536 on: infinity, or a quiet NaN with the upper bits of the old one.
        let payload = _mm_and_si128(_mm_srli_epi32::<13>(size), _mm_set1_epi32(0x3ff));
        let payload = _mm_or_si128(payload, _mm_set1_epi32(0x200));
        let is_nan = _mm_cmpgt_epi32(size, _mm_set1_epi32(0x7f80_0000));
        let beyond = _mm_or_si128(_mm_and_si128(payload, is_nan), _mm_set1_epi32(0x7c00));
        let is_beyond = _mm_cmpgt_epi32(size, _mm_set1_epi32((143 << 23) - 1));
        _mm_or_si128(select(is_beyond, beyond, finite), sign)
    }
}
