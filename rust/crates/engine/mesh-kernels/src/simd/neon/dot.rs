//! The dot product instructions: SDOT, and USDOT where the CPU has the 8-bit integer matrix extension (i8mm).
//!
//! That extension's SMMLA multiplies two rows by two columns of 8 inputs. The layout has 4 inputs of 16
//! columns side by side, so weights, activations and sums would have to be interleaved, which takes as many
//! instructions as it saves in tiles of 4 rows.

use std::arch::aarch64::*;
use std::arch::asm;

use super::super::methods::{four, methods, pointer_methods};
use super::super::{Kernel, Simd};
use super::{B, F, I, narrow, shared_methods, widen};
use crate::Isa;

/// Proof that the CPU has NEON with the dot product instructions, and i8mm if `I8MM` is true.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Neon<const I8MM: bool>(());

impl<const I8MM: bool> Neon<I8MM> {
    /// The token, where the CPU has the features.
    pub(crate) fn detect() -> Option<Self> {
        let isa = if I8MM { Isa::NeonI8mm } else { Isa::Neon };
        isa.is_available().then_some(Neon(()))
    }
}

/// Runs `kernel` in a function with the features.
///
/// # Safety
/// The CPU must have them, which the token proves.
#[inline(never)]
#[target_feature(enable = "neon,dotprod")]
pub(crate) unsafe fn enter<K: Kernel, const I8MM: bool>(s: Neon<I8MM>, kernel: K) {
    kernel.run(s);
}

impl<const I8MM: bool> Simd for Neon<I8MM> {
    type F = F;
    type I = I;
    type B = B;
    type P = I;

    const PARTS: usize = 1;
    const SIGNED_WIDE: bool = !I8MM;
    const WIDE: bool = false;
    const ROWS: usize = 4;
    const FLOAT_ROWS: usize = 4;
    const QUERIES: usize = 6;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) {
        // SAFETY: the token proves that the CPU has the features.
        unsafe { enter(self, kernel) }
    }

    shared_methods! {}

    #[inline(always)]
    fn open(self, acc: &I, _part: usize) -> I {
        *acc
    }
    #[inline(always)]
    fn close(self, acc: &mut I, _part: usize, p: I) {
        *acc = p;
    }

    pointer_methods! {
        fn dot<const R: usize, const ROW: usize>(p: I, w: B, a: *const i8) -> I {
            // Weights below 128 are the same signed.
            let a = lanes::<R, ROW>(a);
            four!(i => sdot::<ROW>(p[i], vreinterpretq_s8_u8(w[i]), a))
        }
        fn dot_wide<const R: usize, const ROW: usize>(p: I, w: B, a: *const i8) -> I {
            let a = lanes::<R, ROW>(a);
            if I8MM {
                return four!(i => usdot::<ROW>(p[i], w[i], a));
            }
            let flip = vdupq_n_u8(0x80);
            four!(i => sdot::<ROW>(p[i], vreinterpretq_s8_u8(veorq_u8(w[i], flip)), a))
        }
    }
}

/// The activations of `R` rows, of which [`by_lane`] takes those of row `ROW`: the rows of a tile share a
/// register.
///
/// # Safety
/// `R` × 4 bytes are readable.
#[inline(always)]
unsafe fn lanes<const R: usize, const ROW: usize>(a: *const i8) -> int8x16_t {
    // SAFETY: the caller's promise.
    unsafe {
        match R {
            1 => {
                let row = a.cast::<i32>().read_unaligned();
                vreinterpretq_s8_s32(vsetq_lane_s32::<0>(row, vdupq_n_s32(0)))
            }
            2 => vcombine_s8(vld1_s8(a), vdup_n_s8(0)),
            _ => vld1q_s8(a.add(ROW / 4 * 16)),
        }
    }
}

/// A product of weights with one lane of activations: `acc[c] += Σ w[4c+i] * a[4·(ROW mod 4)+i]`.
macro_rules! by_lane {
    ($(#[$doc:meta])* $name:ident, $w:ty, $extension:literal) => {
        $(#[$doc])*
        #[inline(always)]
        unsafe fn $name<const ROW: usize>(mut acc: int32x4_t, w: $w, a: int8x16_t) -> int32x4_t {
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    concat!(".arch_extension ", $extension),
                    concat!(stringify!($name), " {acc:v}.4s, {w:v}.16b, {a:v}.4b[{lane}]"),
                    acc = inout(vreg) acc, w = in(vreg) w, a = in(vreg) a, lane = const ROW % 4,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            acc
        }
    };
}

by_lane! {
    /// Signed times signed.
    ///
    /// # Safety
    /// The CPU has the dot product instructions.
    sdot, int8x16_t, "dotprod"
}
by_lane! {
    /// Unsigned times signed.
    ///
    /// # Safety
    /// The CPU has i8mm.
    usdot, uint8x16_t, "i8mm"
}
