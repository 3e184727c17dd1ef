//! File names in the state directory.

pub(crate) const ROOT_KEY: &str = "root.key";
pub(crate) const ROOT_CERTIFICATE: &str = "root.crt";
pub(crate) const NODE_KEY: &str = "node.key";
pub(crate) const NODE_CERTIFICATE: &str = "node.crt";
pub(crate) const TOKENS: &str = "tokens.json";
pub(crate) const MEMBERS: &str = "members.json";
pub(crate) const EXPELLED: &str = "expelled.json";
/// A folder: a node whose own files cannot be used joins in it.
pub(crate) const JOINING: &str = "joining";
