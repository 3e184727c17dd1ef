//! Macros for the implementations of [`Simd`](super::Simd) that consist of intrinsics.
//!
//! No closures: they do not inherit the target features of the function that they are inlined into.

/// Methods over register values.
macro_rules! methods {
    ($(fn $name:ident $(<const $n:ident: u32>)? ($($arg:ident: $ty:ty),*) $(-> $out:ty)? $body:block)*) => {
        $(
            #[inline(always)]
            fn $name $(<const $n: u32>)? (self, $($arg: $ty),*) $(-> $out)? {
                // SAFETY: the token proves that the CPU has the features.
                unsafe { $body }
            }
        )*
    };
}

/// Methods over pointers.
macro_rules! pointer_methods {
    ($(fn $name:ident $(<$(const $n:ident: usize),*>)? ($($arg:ident: $ty:ty),*) $(-> $out:ty)? $body:block)*) => {
        $(
            #[inline(always)]
            unsafe fn $name $(<$(const $n: usize),*>)? (self, $($arg: $ty),*) $(-> $out)? {
                // SAFETY: the token proves the features; the caller vouches for the pointer.
                unsafe { $body }
            }
        )*
    };
}

/// A value for each of two registers.
#[cfg(target_arch = "x86_64")]
macro_rules! two {
    ($i:ident => $value:expr) => {
        [
            {
                let $i = 0;
                $value
            },
            {
                let $i = 1;
                $value
            },
        ]
    };
}

/// A value for each of four registers.
macro_rules! four {
    ($i:ident => $value:expr) => {
        [
            {
                let $i = 0;
                $value
            },
            {
                let $i = 1;
                $value
            },
            {
                let $i = 2;
                $value
            },
            {
                let $i = 3;
                $value
            },
        ]
    };
}

/// An intrinsic with a constant shift count: counts are `i32` in these intrinsics and `u32` in the trait, and
/// const generics do not convert.
#[cfg(target_arch = "x86_64")]
macro_rules! shift {
    ($op:ident, $a:expr, $n:expr) => {
        match $n {
            0 => $a,
            1 => $op::<1>($a),
            2 => $op::<2>($a),
            3 => $op::<3>($a),
            4 => $op::<4>($a),
            5 => $op::<5>($a),
            6 => $op::<6>($a),
            _ => $op::<7>($a),
        }
    };
}

/// The methods of sets whose integers are four 128-bit registers, and whose products take one of them at a time.
#[cfg(target_arch = "x86_64")]
macro_rules! quarter_methods {
    () => {
        methods! {
            fn isplat(v: i32) -> I { [_mm_set1_epi32(v); 4] }
            fn isub(a: I, b: I) -> I { four!(i => _mm_sub_epi32(a[i], b[i])) }
            fn ishl<const N: u32>(a: I) -> I { four!(i => shift!(_mm_slli_epi32, a[i], N)) }
            fn band(a: __m128i, mask: u8) -> __m128i {
                _mm_and_si128(a, _mm_set1_epi8(mask.cast_signed()))
            }
            fn bor(a: __m128i, b: __m128i) -> __m128i { _mm_or_si128(a, b) }
            fn bshl<const N: u32>(a: __m128i) -> __m128i { shift!(_mm_slli_epi16, a, N) }
            fn bshr<const N: u32>(a: __m128i) -> __m128i { shift!(_mm_srli_epi16, a, N) }
            fn open(_acc: &I, _part: usize) -> __m128i { _mm_setzero_si128() }
            fn close(acc: &mut I, part: usize, p: __m128i) {
                acc[part] = _mm_add_epi32(acc[part], _mm_madd_epi16(p, _mm_set1_epi16(1)));
            }
        }

        pointer_methods! {
            fn store_i8(p: *mut i8, v: I) {
                let words = [_mm_packs_epi32(v[0], v[1]), _mm_packs_epi32(v[2], v[3])];
                _mm_storeu_si128(p.cast(), _mm_packs_epi16(words[0], words[1]));
            }
            fn load_b(p: *const u8) -> __m128i { _mm_loadu_si128(p.cast()) }
        }
    };
}

/// The methods beside [`quarter_methods`] that need SSSE3 and SSE4.1: products of bytes, their conversion, and
/// tables of 16.
#[cfg(target_arch = "x86_64")]
macro_rules! byte_methods {
    () => {
        methods! {
            fn lookup(table: __m128i, codes: __m128i) -> __m128i { _mm_shuffle_epi8(table, codes) }
        }

        pointer_methods! {
            fn load_u8(p: *const u8) -> I {
                four!(i => _mm_cvtepu8_epi32(_mm_loadu_si32(p.add(4 * i))))
            }
            fn load_i8(p: *const i8) -> I {
                four!(i => _mm_cvtepi8_epi32(_mm_loadu_si32(p.cast::<u8>().add(4 * i))))
            }
            fn dot<const R: usize, const ROW: usize>(p: __m128i, w: __m128i, a: *const i8) -> __m128i {
                let a = _mm_set1_epi32(a.cast::<i32>().add(ROW).read_unaligned());
                _mm_add_epi16(p, _mm_maddubs_epi16(w, a))
            }
            fn dot_wide<const R: usize, const ROW: usize>(p: __m128i, w: __m128i, a: *const i8) -> __m128i {
                let a = _mm_set1_epi32(a.cast::<i32>().add(ROW).read_unaligned());
                let w = _mm_xor_si128(w, _mm_set1_epi8(-128));
                _mm_add_epi16(p, _mm_maddubs_epi16(_mm_abs_epi8(w), _mm_sign_epi8(a, w)))
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) use {byte_methods, quarter_methods, shift, two};
pub(super) use {four, methods, pointer_methods};
