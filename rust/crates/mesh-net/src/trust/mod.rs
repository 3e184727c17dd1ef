//! Who belongs to a mesh: its root, its nodes' certificates, and the tokens that let new nodes in.
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
//! | `root.key` | the root's private key (head only) | owner |
//! | `root.crt` | the root's certificate | all |
//! | `node.key` | the node's private key | owner |
//! | `node.crt` | the node's certificate | all |
//! | `tokens.json` | hashes of join tokens (head only) | owner |

mod admission;
mod clock;
mod error;
mod identity;
mod root;
mod store;
mod token;

pub use admission::{
    Admission, Authority, CERTIFICATE_DATES, DUPLICATE_IDENTITY, JoinAsk, Refusal, TOKEN_EXPIRED,
    TOKEN_UNKNOWN, TOKEN_USED,
};
pub use clock::MeshClock;
pub use error::TrustError;
pub(crate) use identity::NodeKey;
pub use identity::{NodeIdentity, set_aside};
pub use root::{Member, MeshRoot, Role, Validity};
pub use store::{RETRY_WINDOW, TokenRecord, TokenStore, Use};
pub use token::{JoinToken, ParseTokenError};

use sha2::{Digest, Sha256};

/// File names in the state directory.
mod names {
    pub(super) const ROOT_KEY: &str = "root.key";
    pub(super) const ROOT_CERTIFICATE: &str = "root.crt";
    pub(super) const NODE_KEY: &str = "node.key";
    pub(super) const NODE_CERTIFICATE: &str = "node.crt";
    pub(super) const TOKENS: &str = "tokens.json";
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Random bytes for secrets.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system's random number generator works");
    bytes
}
