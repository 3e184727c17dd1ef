//! File names in the state directory, and those that systemd hands over.

use std::path::{Path, PathBuf};

pub(crate) const ROOT_KEY: &str = "root.key";
/// The same as a systemd credential.
pub(crate) const ROOT_CREDENTIAL: &str = "root-key";
pub(crate) const ROOT_CERTIFICATE: &str = "root.crt";
/// The head's intermediate: its keys, and its papers from the root.
pub(crate) const INTERMEDIATE: &str = "intermediate.key";
/// Keys of an intermediate that the root has not signed yet.
pub(crate) const NEXT_INTERMEDIATE: &str = "intermediate.key.next";
pub(crate) const NODE_KEY: &str = "node.key";
/// A node's certificate.
pub const NODE_CERTIFICATE: &str = "node.crt";
/// The key of a certificate that is being renewed for another key.
pub(crate) const NEXT_NODE_KEY: &str = "node.key.next";
pub(crate) const IDENTITY_KEY: &str = "identity.key";
/// The identity that takes the place of the present one when the node starts.
pub(crate) const NEXT_IDENTITY_KEY: &str = "identity.key.next";
pub(crate) const IDENTITY_DOCUMENT: &str = "identity.doc";
/// The successions of mesh roots that the node knows.
pub(crate) const ROOT_HISTORY: &str = "root.history";
/// The same key as a systemd credential.
pub(crate) const IDENTITY_CREDENTIAL: &str = "identity-key";
/// Join tokens.
pub const TOKENS: &str = "tokens.json";
/// The members of the mesh.
pub const MEMBERS: &str = "members.json";
/// Expelled nodes.
pub const EXPELLED: &str = "expelled.json";
/// A folder: a node whose own files cannot be used joins in it.
pub(crate) const JOINING: &str = "joining";

/// Path of a credential that systemd handed to this unit, if it did.
pub(super) fn credential(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("CREDENTIALS_DIRECTORY")?;
    let path = Path::new(&folder).join(name);
    path.exists().then_some(path)
}
