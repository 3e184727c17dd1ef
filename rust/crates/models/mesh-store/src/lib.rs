//! Models on disk: their contents, their location, and their signatures.
//!
//! - [`Manifest`]: the files of a model with SHA-256 digests of pieces of at most 4 MiB and of every tensor;
//!   its own digest is the model's *fingerprint*. [`Manifest::pieces_for`] tells what a stage needs.
//! - [`SignedManifest`], [`SigningKey`] and [`Policy`]: the operator's ML-DSA-65 signature over it.
//! - [`Store`]: a folder with blobs named by their digest, partial files that survive a kill
//!   ([`PartialFile`]), pins for what is loaded, admission by free space, eviction. Several processes may use
//!   one store at once.
//! - [`local`] and [`names`]: models that lie in folders, and what a name means.
//!
//! Nothing here is async, and nothing touches the network. All of it blocks for as long as the disk takes.

#![forbid(unsafe_code)]

pub mod digest;
pub mod error;
mod files;
pub mod layout;
pub mod local;
pub mod manifest;
pub mod names;
pub mod partial;
pub mod ranges;
pub mod room;
pub mod signature;
pub mod store;
#[cfg(test)]
mod testing;

pub use digest::{Digest, DigestError, Hasher};
pub use error::{NoRoom, StoreError};
pub use layout::{Layout, LayoutError, Selection};
pub use local::{FingerprintCache, LocalError};
pub use manifest::{
    BuildError, Manifest, ManifestError, ManifestFile, Piece, PieceId, TensorRange, VerifyError,
};
pub use names::{NameError, Places, Resolved, Target, default_store};
pub use partial::{PartialFile, PartialKey};
pub use ranges::RangeSet;
pub use room::GcReport;
pub use signature::{
    Policy, PublicKey, Signature, SignatureError, SignedManifest, SigningKey, Verdict,
};
pub use store::{
    Begun, Contents, DamagedModel, Limits, Named, Pin, Presence, Store, StoredModel, Work,
};
