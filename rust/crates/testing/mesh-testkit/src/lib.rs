//! Test fixtures around real services; `mesh-launcher` starts the services themselves.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use mesh_testkit::Mesh;
//!
//! let mesh = Mesh::builder().workers(2).shim().start().await?;
//! println!("{:?}", mesh.registry().await?);
//! mesh.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! - [`Mesh`] and [`Service`] are `mesh-launcher`'s;
//! - [`Namespaces`] gives each service a network of its own, whose cable can be pulled;
//! - [`conformance`] has the contracts of engines as checks;
//! - [`hub`] is a Hugging Face hub with repositories made in the test, and with everything that goes wrong;
//! - [`lavapipe`] runs tests on WebGPU without a GPU;
//! - [`Swtpm`] is a TPM 2.0 in software;
//! - [`v5`] holds a v5.0.0 client, worker and head written from the wire format alone, without the `dcf` crate.

#![forbid(unsafe_code)]

pub mod conformance;
pub mod hub;
pub mod lavapipe;
pub mod namespaces;
mod swtpm;
pub mod v5;

pub use mesh_client as client;
pub use mesh_launcher::{Launcher, Mesh, MeshBuilder, Service, paths, process, until_signal};
pub use namespaces::Namespaces;
pub use swtpm::Swtpm;
