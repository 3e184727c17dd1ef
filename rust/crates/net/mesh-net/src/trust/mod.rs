//! Membership in a mesh: its root, its nodes' certificates, and the tokens that admit new nodes.
//!
//! The head holds an [`Authority`]: a [`MeshRoot`] made at its first start, and a [`TokenStore`]. A node holds a
//! [`NodeIdentity`]: its key, its certificate and the root. A node's id is the SHA-256 of its public key. Certificates
//! live for a week and are renewed at two thirds of that; a node that was switched off for longer may still renew for a
//! month, and needs a new token after that.
//!
//! Dates are judged by the head's clock alone: it issued them. A node takes any certificate that the root signed for the
//! head, learns the head's time from it ([`MeshClock`]), and renews its own by that time. The root's own dates do not
//! count: it is pinned. So a machine with a wrong clock joins and works, and a head whose clock was wrong for a while
//! issues new certificates once it is right.
//!
//! State directory:
//!
//! | file | holds | readable by |
//! |---|---|---|
//! | `root.key` | the root's private key, and a copy of its certificate (head only) | owner |
//! | `root.crt` | the root's certificate | all |
//! | `node.key` | the node's private key | owner |
//! | `node.crt` | the node's certificate | all |
//! | `tokens.json` | hashes of join tokens (head only) | owner |
//! | `members.json` | names and certificates' ends of the nodes that joined (head only) | owner |
//! | `expelled.json` | nodes that were expelled; at workers a copy of the head's | owner |
//!
//! None of these is created anew while others of its set exist, unless the result is the same: replacing the
//! root would lose the mesh, and an empty list of expelled nodes would readmit all of them.

mod admission;
mod clock;
mod deny;
mod error;
mod identity;
mod root;
mod roster;
mod store;
mod token;

pub use admission::{
    Admission, Authority, CERTIFICATE_DATES, DUPLICATE_IDENTITY, EXPELLED, JoinAsk, Refusal,
    TOKEN_EXPIRED, TOKEN_UNKNOWN, TOKEN_USED,
};
pub use clock::MeshClock;
pub use deny::{DenyList, Expulsion, MOST_EXPELLED};
pub use error::TrustError;
pub(crate) use identity::NodeKey;
pub(crate) use identity::move_identity;
pub use identity::{NodeIdentity, set_aside};
pub use root::{Member, MeshRoot, Role, Validity};
pub use roster::KnownMember;
pub use store::{RETRY_WINDOW, Revocation, TokenRecord, TokenStore, Use};
pub use token::{JoinToken, ParseTokenError};

use sha2::{Digest, Sha256};

/// File names in the state directory.
pub(crate) mod names {
    pub(crate) const ROOT_KEY: &str = "root.key";
    pub(crate) const ROOT_CERTIFICATE: &str = "root.crt";
    pub(crate) const NODE_KEY: &str = "node.key";
    pub(crate) const NODE_CERTIFICATE: &str = "node.crt";
    pub(crate) const TOKENS: &str = "tokens.json";
    pub(crate) const MEMBERS: &str = "members.json";
    pub(crate) const EXPELLED: &str = "expelled.json";
    /// A folder: a node whose own files cannot be used joins in it.
    pub(crate) const JOINING: &str = "joining";
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}
