//! Integer products without the dot product instructions: Cortex-A53, A57, A72 and other ARMv8.0 CPUs.
//!
//! SMLAL and SMLAL2 multiply bytes and add in 16 bits. A column's sum is spread over four lanes, which are
//! added together once for a chain of products. Tiles have two rows: the sums of two fill half of the
//! registers.

use std::arch::aarch64::*;
use std::arch::asm;

use super::super::methods::{four, methods, pointer_methods};
use super::super::{Kernel, Simd};
use super::{B, F, I, narrow, shared_methods, widen};

/// Proof that the CPU has NEON.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NeonV8(());

impl NeonV8 {
    /// The token, where the CPU has the features.
    pub(crate) fn detect() -> Option<NeonV8> {
        crate::Isa::NeonV8.is_available().then_some(NeonV8(()))
    }
}

/// Runs `kernel` in a function with the features.
///
/// # Safety
/// The CPU must have them, which the token proves.
#[inline(never)]
#[target_feature(enable = "neon")]
pub(crate) unsafe fn enter<K: Kernel>(s: NeonV8, kernel: K) {
    kernel.run(s);
}

/// For each register of a [`B`] the products of its halves: four lanes per column.
type P = [[int16x8_t; 2]; 4];

impl Simd for NeonV8 {
    type F = F;
    type I = I;
    type B = B;
    type P = P;

    const PARTS: usize = 1;
    const SIGNED_WIDE: bool = true;
    const WIDE: bool = false;
    const ROWS: usize = 2;
    const FLOAT_ROWS: usize = 4;
    const QUERIES: usize = 6;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) {
        // SAFETY: the token proves that the CPU has the features.
        unsafe { enter(self, kernel) }
    }

    shared_methods! {}

    methods! {
        fn open(_acc: &I, _part: usize) -> P { [[vdupq_n_s16(0); 2]; 4] }
        fn close(acc: &mut I, _part: usize, p: P) {
            *acc = four!(i => vpadalq_s16(acc[i], vpaddq_s16(p[i][0], p[i][1])));
        }
    }

    pointer_methods! {
        fn dot<const R: usize, const ROW: usize>(p: P, w: B, a: *const i8) -> P {
            let a = repeated(a.add(4 * ROW));
            // Weights below 128 are the same signed.
            four!(i => multiply(p[i], vreinterpretq_s8_u8(w[i]), a))
        }
        fn dot_wide<const R: usize, const ROW: usize>(p: P, w: B, a: *const i8) -> P {
            let a = repeated(a.add(4 * ROW));
            let flip = vdupq_n_u8(0x80);
            four!(i => multiply(p[i], vreinterpretq_s8_u8(veorq_u8(w[i], flip)), a))
        }
    }
}

/// Adds the products of 16 bytes to those of a register's halves.
#[inline(always)]
unsafe fn multiply(p: [int16x8_t; 2], w: int8x16_t, a: int8x16_t) -> [int16x8_t; 2] {
    // SAFETY: NEON is part of every aarch64.
    unsafe {
        [
            vmlal_s8(p[0], vget_low_s8(w), vget_low_s8(a)),
            vmlal_high_s8(p[1], w, a),
        ]
    }
}

/// The four bytes at `a`, for each of four columns. In assembly because the compiler would see that both
/// halves are equal: it would then move the weights' upper half down instead of multiplying upper halves.
///
/// # Safety
/// Four bytes are readable.
#[inline(always)]
unsafe fn repeated(a: *const i8) -> int8x16_t {
    let all: int8x16_t;
    // SAFETY: NEON is part of every aarch64; the caller vouches for the pointer.
    unsafe {
        asm!(
            "ld1r {{ {all:v}.4s }}, [{a}]",
            all = out(vreg) all, a = in(reg) a,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    all
}
