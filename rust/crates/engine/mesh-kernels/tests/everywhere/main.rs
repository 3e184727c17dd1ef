//! The tests that also run on emulated CPUs (scripts/test_isa.sh, scripts/test_arm.sh), as one program.
//!
//! Two private files of the library are compiled into it. The library has no unit tests: its kernels would be compiled once more
//! for them.

mod golden;
mod grouping;
#[cfg(target_arch = "x86_64")]
mod halves;
mod isa;
mod norm;
mod pool;
mod rope;
#[path = "../support/mod.rs"]
mod support;
