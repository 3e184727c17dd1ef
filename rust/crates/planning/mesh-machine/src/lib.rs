//! What a machine is, and what it shall do in a mesh: for a live image that nobody has configured.
//!
//! [`probe`] reads sysfs and procfs below any root, so that tests use made-up trees. [`choose`] is a pure function from
//! what was found to a backend, with the reason in words for a newcomer. [`join`] reads the three places where a machine can be
//! told its head, token and role: the console, the kernel command line and a partition. [`plan`] puts all that
//! together and says what is missing; [`run_dir`] writes the outcome where the services' units look for it.
//!
//! Everything that is read came from outside. At most 64 KiB of a file are read, nothing panics on its content, and a
//! token is never printed.

#![forbid(unsafe_code)]

pub mod choice;
pub mod files;
pub mod hardware;
pub mod join;
pub mod nvidia;
pub mod plan;
pub mod run_dir;

pub use choice::{Backend, Choice, Wish, choose};
pub use hardware::{Gpu, Hardware, probe};
pub use plan::Plan;
