//! Starts services as processes, and a whole mesh of them on this machine: for `hydramesh demo`, benchmarks and tests.
//!
//! - [`Launcher`] holds the executables to start, with their environment and wrapper; [`Service`] is one of
//!   the processes: its addresses, its log, signals to it;
//! - [`Mesh`] is a head, workers and a shim on loopback, on ports the system chooses, gone when it is dropped;
//! - [`until_signal`] makes sure that it is dropped when the program is told to end;
//! - [`paths`] finds the files that `make fetch` and cargo put into a source tree.

#![forbid(unsafe_code)]

pub mod mesh;
pub mod paths;
pub mod process;
mod signals;

pub use mesh::{Mesh, MeshBuilder};
pub use process::{Launcher, Service};
pub use signals::until_signal;
