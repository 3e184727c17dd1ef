//! Codes of 2 to 8 bits as bytes.

use super::tile::TileFormat;
use crate::simd::Simd;

/// The weights of input group `G`, the bias added to them.
///
/// # Safety
/// `codes` points to the codes of a block, or of a part of its columns.
#[inline(always)]
pub(super) unsafe fn weights<S: Simd, T: TileFormat, const G: usize>(
    s: S,
    codes: *const u8,
    table: S::B,
) -> S::B {
    // SAFETY: the caller's block holds what its layout says.
    let codes = unsafe { group_codes::<S, T, G>(s, codes) };
    if T::BOOK {
        s.lookup(table, codes)
    } else {
        codes
    }
}

/// The codes of input group `G`.
#[inline(always)]
unsafe fn group_codes<S: Simd, T: TileFormat, const G: usize>(s: S, codes: *const u8) -> S::B {
    // SAFETY: the caller's block holds what its layout says.
    unsafe {
        if T::BITS == 8 {
            return s.load_b(codes.add(64 * G));
        }
        if T::BITS < 4 {
            return few_bits::<S, T, G>(s, codes);
        }
        let raw = s.load_b(codes.add(64 * (G % 4)));
        let low = s.band(if G < 4 { raw } else { s.bshr::<4>(raw) }, 15);
        match T::BITS {
            5 => {
                let h = s.load_b(codes.add(256));
                let h = match G {
                    0 => s.bshl::<4>(h),
                    1 => s.bshl::<3>(h),
                    2 => s.bshl::<2>(h),
                    3 => s.bshl::<1>(h),
                    4 => h,
                    5 => s.bshr::<1>(h),
                    6 => s.bshr::<2>(h),
                    _ => s.bshr::<3>(h),
                };
                s.bor(low, s.band(h, 0x10))
            }
            6 => {
                let h = s.load_b(codes.add(256 + 64 * (G / 4)));
                let h = match G % 4 {
                    0 => s.bshl::<4>(h),
                    1 => s.bshl::<2>(h),
                    2 => h,
                    _ => s.bshr::<2>(h),
                };
                s.bor(low, s.band(h, 0x30))
            }
            _ => low,
        }
    }
}

/// The codes of input group `G`, of 2 or 3 bits.
#[inline(always)]
unsafe fn few_bits<S: Simd, T: TileFormat, const G: usize>(s: S, codes: *const u8) -> S::B {
    // SAFETY: the caller's block holds what its layout says.
    unsafe {
        let raw = s.load_b(codes.add(64 * (G / 4)));
        let raw = match G % 4 {
            0 => raw,
            1 => s.bshr::<2>(raw),
            2 => s.bshr::<4>(raw),
            _ => s.bshr::<6>(raw),
        };
        let low = s.band(raw, 3);
        if T::BITS == 2 {
            return low;
        }
        let h = s.load_b(codes.add(128));
        let h = match G {
            0 => s.bshl::<2>(h),
            1 => s.bshl::<1>(h),
            2 => h,
            3 => s.bshr::<1>(h),
            4 => s.bshr::<2>(h),
            5 => s.bshr::<3>(h),
            6 => s.bshr::<4>(h),
            _ => s.bshr::<5>(h),
        };
        s.bor(low, s.band(h, 4))
    }
}
