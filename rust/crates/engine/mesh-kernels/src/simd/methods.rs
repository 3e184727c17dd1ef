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
    ($(fn $name:ident ($($arg:ident: $ty:ty),*) $(-> $out:ty)? $body:block)*) => {
        $(
            #[inline(always)]
            unsafe fn $name (self, $($arg: $ty),*) $(-> $out)? {
                // SAFETY: the token proves the features; the caller vouches for the pointer.
                unsafe { $body }
            }
        )*
    };
}

/// A value for each of two registers.
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

pub(super) use {four, methods, pointer_methods, shift, two};
