//! Portable lanes, and the reference that the others are tested against.

use half::{bf16, f16};

use super::{Kernel, LANES, Simd};

/// Arrays and loops; multiplication and addition round separately.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scalar;

type F = [f32; LANES];
type I = [i32; LANES];

#[inline(never)]
fn run_apart<K: Kernel>(kernel: K) {
    kernel.run(Scalar);
}

#[inline(always)]
fn zip(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|i| f(a[i], b[i]))
}

// SAFETY of every block below: the caller of an unsafe method gives a pointer that is valid for the elements
// named in the trait; reads and writes are unaligned.
impl Simd for Scalar {
    type F = F;
    type I = I;
    type B = [u8; 64];
    type P = I;

    const PARTS: usize = 1;
    const SIGNED_WIDE: bool = true;
    const WIDE: bool = false;
    const ROWS: usize = 1;
    const FLOAT_ROWS: usize = 4;
    const QUERIES: usize = 3;

    #[inline(always)]
    fn apart<K: Kernel>(self, kernel: K) {
        run_apart(kernel);
    }
    #[inline(always)]
    fn splat(self, v: f32) -> F {
        [v; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> F {
        // SAFETY: see the head of this impl.
        unsafe { p.cast::<F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: F) {
        // SAFETY: see the head of this impl.
        unsafe { p.cast::<F>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> F {
        // SAFETY: see the head of this impl.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32_const())
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> F {
        // SAFETY: see the head of this impl.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| bf16::from_bits(b).to_f32_const())
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, v: F) {
        let bits = v.map(|v| f16::from_f32_const(v).to_bits());
        // SAFETY: see the head of this impl.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(bits) }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: F) -> F {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn keep_first(self, a: F, n: usize, fill: f32) -> F {
        std::array::from_fn(|i| if i < n { a[i] } else { fill })
    }
    #[inline(always)]
    fn scale2(self, a: F, n: I) -> F {
        std::array::from_fn(|i| {
            f32::from_bits(a[i].to_bits().wrapping_add((n[i] as u32).wrapping_shl(23)))
        })
    }
    #[inline(always)]
    fn sum(self, a: F) -> f32 {
        let b: [f32; 8] = std::array::from_fn(|i| a[i] + a[i + 8]);
        let c: [f32; 4] = std::array::from_fn(|i| b[i] + b[i + 4]);
        (c[0] + c[2]) + (c[1] + c[3])
    }
    #[inline(always)]
    fn largest(self, a: F) -> f32 {
        let max = |a: f32, b: f32| if a > b { a } else { b };
        let b: [f32; 8] = std::array::from_fn(|i| max(a[i], a[i + 8]));
        let c: [f32; 4] = std::array::from_fn(|i| max(b[i], b[i + 4]));
        max(max(c[0], c[2]), max(c[1], c[3]))
    }
    #[inline(always)]
    fn isplat(self, v: i32) -> I {
        [v; LANES]
    }
    #[inline(always)]
    fn isub(self, a: I, b: I) -> I {
        std::array::from_fn(|i| a[i].wrapping_sub(b[i]))
    }
    #[inline(always)]
    fn ishl<const N: u32>(self, a: I) -> I {
        a.map(|v| v.wrapping_shl(N))
    }
    #[inline(always)]
    fn to_f(self, a: I) -> F {
        a.map(|v| v as f32)
    }
    #[inline(always)]
    fn round(self, a: F) -> I {
        // Adding and taking away 1.5 * 2^23 rounds half to even for |v| < 2^22, which is all that the kernels
        // ask for.
        const MAGIC: f32 = 12_582_912.0;
        a.map(|v| ((v + MAGIC) - MAGIC) as i32)
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> I {
        // SAFETY: see the head of this impl.
        let bytes = unsafe { p.cast::<[u8; LANES]>().read_unaligned() };
        bytes.map(i32::from)
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> I {
        // SAFETY: see the head of this impl.
        let bytes = unsafe { p.cast::<[i8; LANES]>().read_unaligned() };
        bytes.map(i32::from)
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: I) {
        let bytes = v.map(|v| v as i8);
        // SAFETY: see the head of this impl.
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(bytes) }
    }
    #[inline(always)]
    unsafe fn load_b(self, p: *const u8) -> [u8; 64] {
        // SAFETY: see the head of this impl.
        unsafe { p.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    fn band(self, a: [u8; 64], mask: u8) -> [u8; 64] {
        a.map(|v| v & mask)
    }
    #[inline(always)]
    fn bor(self, a: [u8; 64], b: [u8; 64]) -> [u8; 64] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    fn bshl<const N: u32>(self, a: [u8; 64]) -> [u8; 64] {
        a.map(|v| v << N)
    }
    #[inline(always)]
    fn bshr<const N: u32>(self, a: [u8; 64]) -> [u8; 64] {
        a.map(|v| v >> N)
    }
    #[inline(always)]
    fn open(self, acc: &I, _part: usize) -> I {
        *acc
    }
    #[inline(always)]
    fn close(self, acc: &mut I, _part: usize, p: I) {
        *acc = p;
    }
    #[inline(always)]
    unsafe fn dot<const R: usize, const ROW: usize>(self, p: I, w: [u8; 64], a: *const i8) -> I {
        // SAFETY: see the head of this impl.
        let a = unsafe { a.cast::<[i8; 4]>().add(ROW).read_unaligned() };
        std::array::from_fn(|c| {
            (0..4).fold(p[c], |sum, i| {
                sum + i32::from(w[4 * c + i]) * i32::from(a[i])
            })
        })
    }
    #[inline(always)]
    unsafe fn dot_wide<const R: usize, const ROW: usize>(
        self,
        p: I,
        w: [u8; 64],
        a: *const i8,
    ) -> I {
        // SAFETY: see the head of this impl.
        let a = unsafe { a.cast::<[i8; 4]>().add(ROW).read_unaligned() };
        std::array::from_fn(|c| {
            (0..4).fold(p[c], |sum, i| {
                sum + i32::from((w[4 * c + i] ^ 0x80).cast_signed()) * i32::from(a[i])
            })
        })
    }
}
