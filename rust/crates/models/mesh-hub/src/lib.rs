//! The Hugging Face hub: which files a model needs, and their bytes, whole or in ranges, with resume.
//!
//! - [`Settings`] are what the hub's own programs read from the environment: endpoint, token, cache, offline;
//! - [`Hub::open`] pins a revision to its commit and lists the files; [`choose`] picks those that a model needs;
//! - [`Hub::fetch`] brings ranges of a file into a [`Sink`]: retries with pauses, goes on where it was cut off, checks that it is
//!   the same file still;
//! - [`Hub::expected`] tells what a model consists of, for bytes that come from elsewhere;
//! - [`pull`] brings a model, or the layers that are wanted of it, into a [`mesh_store::Store`].
//!
//! The pauses between attempts are decided by [`Retry`], which has no clock of its own. What is fetched is checked against the digests that
//! the hub tells: SHA-256 of large files, git's blob id of small ones.

#![forbid(unsafe_code)]

mod answer;
mod cache;
mod choose;
mod client;
mod error;
mod expected;
mod fetch;
mod listing;
mod name;
mod partial;
mod pull;
mod retry;
mod settings;

pub use choose::{Chosen, Format, choose};
pub use client::Hub;
pub use error::HubError;
pub use expected::{Expected, Unchecked};
pub use fetch::{Sink, Watch};
pub use listing::{Repo, RepoFile};
pub use name::HubName;
pub use partial::wanted_ranges;
pub use pull::{PullOptions, Pulled, pull};
pub use retry::{Retry, RetryPolicy};
pub use settings::{Secret, Settings};
