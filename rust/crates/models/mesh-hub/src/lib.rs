//! The Hugging Face hub: selection of a model's files, and their download, whole or in ranges, with resume.
//!
//! - [`Settings`] come from the environment variables of the hub's own programs: endpoint, token, cache,
//!   offline;
//! - [`Hub::open`] pins a revision to its commit and lists the files; [`choose`] selects those that a model
//!   needs;
//! - [`Hub::fetch`] fetches ranges of a file into a [`Sink`]: it retries after pauses, continues where it was
//!   cut off, and checks that the file is still the same;
//! - [`Hub::expected`] describes a model's files, to check bytes that come from elsewhere;
//! - [`pull`] fetches a model, or some layers of it, into a [`mesh_store::Store`].
//!
//! [`Retry`] decides the pauses between attempts and has no clock of its own. Downloads are checked against
//! the digests that the hub lists: SHA-256 of large files, git's blob id of small ones.

#![forbid(unsafe_code)]

mod answer;
mod blocking;
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
mod watch;

pub use choose::{Chosen, Format, choose};
pub use client::Hub;
pub use error::HubError;
pub use expected::{Expected, Unchecked};
pub use fetch::Sink;
pub use listing::{Repo, RepoFile};
pub use name::HubName;
pub use partial::wanted_ranges;
pub use pull::{PullOptions, Pulled, pull};
pub use retry::{Retry, RetryPolicy};
pub use settings::{Secret, Settings};
pub use watch::Watch;
