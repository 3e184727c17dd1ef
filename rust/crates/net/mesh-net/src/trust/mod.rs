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
mod certificate;
mod clock;
mod deny;
mod digest;
mod error;
mod identity;
pub(crate) mod names;
mod refusal;
mod root;
mod roster;
mod store;
mod token;

pub use admission::{Admission, Authority, JoinAsk};
pub use certificate::{Member, Role};
pub(crate) use certificate::{algorithms, verify_issued_by};
pub use clock::MeshClock;
pub(crate) use deny::Expellable;
pub use deny::{DenyList, Expulsion, MOST_EXPELLED};
pub(crate) use digest::sha256;
pub use error::TrustError;
pub use identity::{NodeIdentity, set_aside};
pub(crate) use identity::{NodeKey, move_identity};
pub use refusal::{
    CERTIFICATE_DATES, DUPLICATE_IDENTITY, EXPELLED, Refusal, TOKEN_EXPIRED, TOKEN_UNKNOWN,
    TOKEN_USED,
};
pub use root::{MeshRoot, Validity};
pub use roster::KnownMember;
pub use store::{RETRY_WINDOW, Revocation, TokenRecord, TokenStore, TokenUse};
pub use token::{JoinToken, ParseTokenError};

/// A certificate as [`Admission`] gives it.
pub use rustls::pki_types::CertificateDer;
