//! src/simd/halves.rs by itself.

#[path = "../../src/simd/halves.rs"]
mod source;

use std::arch::x86_64::*;

use half::f16;

use source::{narrow, widen};

#[target_feature(enable = "sse2")]
fn widened(h: [u16; 8]) -> [u32; 8] {
    let mut out = [0; 8];
    // SAFETY: arrays of 8; the function has the feature.
    unsafe {
        let [low, high] = widen(_mm_loadu_si128(h.as_ptr().cast()));
        _mm_storeu_ps(out.as_mut_ptr().cast(), low);
        _mm_storeu_ps(out.as_mut_ptr().add(4).cast(), high);
    }
    out
}

#[target_feature(enable = "sse2")]
fn narrowed(v: [f32; 8]) -> [u16; 8] {
    let mut out = [0; 8];
    // SAFETY: arrays of 8; the function has the feature.
    unsafe {
        let v = [_mm_loadu_ps(v.as_ptr()), _mm_loadu_ps(v.as_ptr().add(4))];
        _mm_storeu_si128(out.as_mut_ptr().cast(), narrow(v));
    }
    out
}

fn check_narrow(v: [f32; 8]) {
    // SAFETY: every x86-64 CPU has SSE2.
    let got = unsafe { narrowed(v) };
    let want = v.map(|v| f16::from_f32_const(v).to_bits());
    assert_eq!(got, want, "{v:?}");
}

#[test]
fn every_half_is_widened_exactly() {
    for first in (0..=u16::MAX).step_by(8) {
        let h: [u16; 8] = std::array::from_fn(|i| first + i as u16);
        // SAFETY: every x86-64 CPU has SSE2.
        let got = unsafe { widened(h) };
        let want = h.map(|h| f16::from_bits(h).to_f32_const().to_bits());
        assert_eq!(got, want, "{first:#x}");
    }
}

#[test]
fn floats_are_narrowed_to_the_nearest_half() {
    // Every half, the floats halfway to the next, and their neighbours.
    for h in 0..0x7c00_u16 {
        let v = f16::from_bits(h).to_f32_const();
        let next = if h == 0x7bff {
            65536.0
        } else {
            f16::from_bits(h + 1).to_f32_const()
        };
        let middle = f32::midpoint(v, next);
        let near = [v, middle.next_down(), middle, middle.next_up()];
        check_narrow(std::array::from_fn(|i| {
            if i < 4 { near[i] } else { -near[i - 4] }
        }));
    }
    for bits in (0..u32::MAX - 0x0123_4567).step_by(0x0001_2345) {
        check_narrow(std::array::from_fn(|i| {
            f32::from_bits(bits + 0x0123 * i as u32)
        }));
    }
    let odd = [
        f32::NAN,
        -f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
    ];
    check_narrow(std::array::from_fn(|i| {
        odd.get(i).copied().unwrap_or(1e-45)
    }));
}
