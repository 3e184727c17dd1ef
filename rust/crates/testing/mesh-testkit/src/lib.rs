//! Finds fetched models and libraries, starts real services and speaks to them, for tests, benchmarks and the demo.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use mesh_testkit::Mesh;
//!
//! let mesh = Mesh::builder().workers(2).shim().start().await?;
//! let answer = mesh
//!     .client()?
//!     .complete(&serde_json::json!({"prompt": "Once upon a time", "max_tokens": 8}))
//!     .await?;
//! println!("{answer}");
//! mesh.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! - [`Mesh`] is a head, workers and a shim on loopback, on ports the system chooses, gone when it is dropped;
//! - [`Service`] is one of these processes: its addresses, its log, signals to it;
//! - [`Namespaces`] gives each of them a network of its own, whose cable can be pulled;
//! - [`hub`] is a Hugging Face hub with repositories made in the test, and with everything that goes wrong;
//! - [`v5`] holds a v5.0.0 client, worker and head written from the wire format alone, without the `dcf` crate;
//! - [`paths`] finds what `make fetch` brought.

#![forbid(unsafe_code)]

pub mod hub;
pub mod mesh;
pub mod namespaces;
pub mod paths;
pub mod process;
pub mod v5;

pub use mesh::{Mesh, MeshBuilder};
pub use mesh_client as client;
pub use namespaces::Namespaces;
pub use process::{Launcher, Service};
