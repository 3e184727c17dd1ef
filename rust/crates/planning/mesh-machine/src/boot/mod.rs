//! Decides the role of a machine that boots a live image without configuration.
//!
//! [`choose`](choice::choose) picks a backend for the hardware found; it is a pure function and gives a
//! reason that a newcomer understands. [`join`] reads the three places that can hold the head, token and
//! role: the console, the kernel command line and a partition. [`plan`] combines the two and names the
//! missing settings; [`run_dir`] writes the result where the services' units look for it.
//!
//! All input is untrusted. At most 64 KiB of a file are read, nothing panics on its content, and a token is
//! never printed.

pub mod choice;
pub mod join;
pub mod plan;
pub mod run_dir;
