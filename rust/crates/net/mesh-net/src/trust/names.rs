//! File names in the state directory.

pub(crate) const ROOT_KEY: &str = "root.key";
pub(crate) const ROOT_CERTIFICATE: &str = "root.crt";
pub(crate) const NODE_KEY: &str = "node.key";
/// A node's certificate.
pub const NODE_CERTIFICATE: &str = "node.crt";
/// The key of a certificate that is being renewed for another key.
pub(crate) const NEXT_NODE_KEY: &str = "node.key.next";
pub(crate) const IDENTITY_KEY: &str = "identity.key";
/// The identity that takes the place of the present one when the node starts.
pub(crate) const NEXT_IDENTITY_KEY: &str = "identity.key.next";
pub(crate) const IDENTITY_DOCUMENT: &str = "identity.doc";
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
