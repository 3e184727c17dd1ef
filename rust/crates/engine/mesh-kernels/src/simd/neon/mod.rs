//! Four 128-bit registers per vector: NEON, of which every aarch64 has the floats.
//!
//! The sets differ in their integer products: [`v8`] multiplies and adds in 16 bits, [`dot`] has the dot
//! product instructions.

pub(crate) mod dot;
pub(crate) mod v8;

use std::arch::aarch64::*;
use std::arch::asm;

/// Four registers: lanes 0..4, 4..8, 8..12, 12..16.
type F = [float32x4_t; 4];
/// As [`F`].
type I = [int32x4_t; 4];
/// 16 columns of 4 bytes.
type B = [uint8x16_t; 4];

/// The methods other than products, which are the same for all sets.
macro_rules! shared_methods {
    () => {
        methods! {
            fn splat(v: f32) -> F { [vdupq_n_f32(v); 4] }
            fn add(a: F, b: F) -> F { four!(i => vaddq_f32(a[i], b[i])) }
            fn sub(a: F, b: F) -> F { four!(i => vsubq_f32(a[i], b[i])) }
            fn mul(a: F, b: F) -> F { four!(i => vmulq_f32(a[i], b[i])) }
            fn div(a: F, b: F) -> F { four!(i => vdivq_f32(a[i], b[i])) }
            fn fma(a: F, b: F, c: F) -> F { four!(i => vfmaq_f32(c[i], a[i], b[i])) }
            fn max(a: F, b: F) -> F {
                // As on x86: the second where the first is not greater.
                four!(i => vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i]))
            }
            fn abs(a: F) -> F { four!(i => vabsq_f32(a[i])) }
            fn keep_first(a: F, n: usize, fill: f32) -> F {
                let (n, fill) = (vdupq_n_u32(n.min(16) as u32), vdupq_n_f32(fill));
                let first = [0_u32, 1, 2, 3];
                let first = vld1q_u32(first.as_ptr());
                four!(i => {
                    let index = vaddq_u32(first, vdupq_n_u32(4 * i));
                    vbslq_f32(vcltq_u32(index, n), a[i as usize], fill)
                })
            }
            fn scale2(a: F, n: I) -> F {
                four!(i => {
                    let shifted = vshlq_n_s32::<23>(n[i]);
                    vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a[i]), shifted))
                })
            }
            fn sum(a: F) -> f32 {
                let c = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
                let d = vadd_f32(vget_low_f32(c), vget_high_f32(c));
                vget_lane_f32::<0>(d) + vget_lane_f32::<1>(d)
            }
            fn largest(a: F) -> f32 {
                let c = vmaxq_f32(vmaxq_f32(a[0], a[2]), vmaxq_f32(a[1], a[3]));
                vmaxvq_f32(c)
            }
            fn isplat(v: i32) -> I { [vdupq_n_s32(v); 4] }
            fn isub(a: I, b: I) -> I { four!(i => vsubq_s32(a[i], b[i])) }
            fn to_f(a: I) -> F { four!(i => vcvtq_f32_s32(a[i])) }
            fn round(a: F) -> I { four!(i => vcvtnq_s32_f32(a[i])) }
            fn ishl<const N: u32>(a: I) -> I { four!(i => vshlq_s32(a[i], vdupq_n_s32(N as i32))) }
            fn band(a: B, mask: u8) -> B { four!(i => vandq_u8(a[i], vdupq_n_u8(mask))) }
            fn bor(a: B, b: B) -> B { four!(i => vorrq_u8(a[i], b[i])) }
            fn bshl<const N: u32>(a: B) -> B { four!(i => vshlq_u8(a[i], vdupq_n_s8(N as i8))) }
            fn bshr<const N: u32>(a: B) -> B { four!(i => vshlq_u8(a[i], vdupq_n_s8(-(N as i8)))) }
            fn lookup(table: B, codes: B) -> B { four!(i => vqtbl1q_u8(table[i], codes[i])) }
        }

        pointer_methods! {
            fn load(p: *const f32) -> F { four!(i => vld1q_f32(p.add(4 * i))) }
            fn store(p: *mut f32, v: F) {
                vst1q_f32(p, v[0]);
                vst1q_f32(p.add(4), v[1]);
                vst1q_f32(p.add(8), v[2]);
                vst1q_f32(p.add(12), v[3]);
            }
            fn load_f16(p: *const u16) -> F { four!(i => widen(vld1_u16(p.add(4 * i)))) }
            fn load_bf16(p: *const u16) -> F {
                four!(i => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.add(4 * i)))))
            }
            fn store_f16(p: *mut u16, v: F) {
                vst1_u16(p, narrow(v[0]));
                vst1_u16(p.add(4), narrow(v[1]));
                vst1_u16(p.add(8), narrow(v[2]));
                vst1_u16(p.add(12), narrow(v[3]));
            }
            fn load_u8(p: *const u8) -> I {
                let bytes = vld1q_u8(p);
                let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_u8(vget_high_u8(bytes)));
                [
                    vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
                    vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
                    vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                    vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high))),
                ]
            }
            fn load_i8(p: *const i8) -> I {
                let bytes = vld1q_s8(p);
                let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes)));
                [
                    vmovl_s16(vget_low_s16(low)),
                    vmovl_s16(vget_high_s16(low)),
                    vmovl_s16(vget_low_s16(high)),
                    vmovl_s16(vget_high_s16(high)),
                ]
            }
            fn store_i8(p: *mut i8, v: I) {
                let low = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]));
                let high = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
                vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
            }
            fn load_b(p: *const u8) -> B { four!(i => vld1q_u8(p.add(16 * i))) }
        }
    };
}

use shared_methods;

/// Four halves to floats; part of every aarch64.
#[inline(always)]
unsafe fn widen(half: uint16x4_t) -> float32x4_t {
    let out: float32x4_t;
    // SAFETY: FCVTL is in the base instruction set.
    unsafe {
        asm!(
            "fcvtl {out:v}.4s, {half:v}.4h",
            out = out(vreg) out, half = in(vreg) half,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    out
}

/// Four floats to halves, to nearest even.
#[inline(always)]
unsafe fn narrow(v: float32x4_t) -> uint16x4_t {
    let out: uint16x4_t;
    // SAFETY: FCVTN is in the base instruction set.
    unsafe {
        asm!(
            "fcvtn {out:v}.4h, {v:v}.4s",
            out = out(vreg) out, v = in(vreg) v,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    out
}
