//! What a machine does in a mesh that it boots into: for a live image that nobody has configured.
//!
//! [`choose`](choice::choose) picks a backend from what was found, a pure function, with the reason in words
//! for a newcomer. [`join`] reads the three places where a machine can be told its head, token and role: the
//! console, the kernel command line and a partition. [`plan`] puts all that together and says what is
//! missing; [`run_dir`] writes the outcome where the services' units look for it.
//!
//! All that is read came from outside. At most 64 KiB of a file are read, nothing panics on its content, and
//! a token is never printed.

pub mod choice;
pub mod join;
pub mod plan;
pub mod run_dir;
