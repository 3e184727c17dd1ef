//! The store: a folder of blobs, partial files and manifests.
//!
//! ```text
//! blobs/<sha256>                  whole files; never written to once they are there
//! partial/<sha256>, .have         files in the making, with their have-maps (see `partial`)
//! partial/source-<sha256>, .have  the same for files whose digest is not known yet
//! manifests/<fingerprint>.json    manifests in canonical form
//! manifests/<fingerprint>.sig     their signatures
//! models/<fingerprint>/…          a model's folder: links to its blobs and partial files
//! names/<sha256 of name>.json     a name, the fingerprint that it means, where it comes from
//! pins/<fingerprint>              locked while a process has the model loaded; modified at its last use
//! local.json                      fingerprints of files outside the store
//! tmp/, lock
//! ```
//!
//! Files come into being under `tmp/` and are renamed to where they belong once they are on disk. Whatever a
//! crash leaves behind is either used again (partial files) or removed by [`Store::gc`].

mod contents;
mod manifests;
mod named;
mod pins;
mod read;
mod root;
mod write;

pub use contents::{Contents, DamagedModel, StoredModel};
pub use named::Named;
pub use pins::Pin;
pub use read::Presence;
pub(crate) use root::WORK;
pub use root::{Limits, Store};
pub use write::{Begun, Work};

#[cfg(test)]
mod tests;
