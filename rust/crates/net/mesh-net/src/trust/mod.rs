//! Membership in a mesh: its root, its nodes' certificates, and the tokens that admit new nodes.
//!
//! The head holds a [`MeshRoot`] made at its first start, and an [`Admission`] (`arcanum-attestor`), which decides who gets
//! a certificate of it. A node holds a [`NodeIdentity`]: its keys, its certificate and the root. A node's id is the SHA-256
//! of its ML-DSA key. When the node joins or renews its certificate, it proves that it holds this key, by a signature that
//! is bound to the TLS session; the certificate then names the id (subjectAltName, `hydramesh:node:ID`), and the root's
//! ML-DSA key signs a [`Document`](mesh_identity::Document) about it. Nodes of earlier versions have no such key: their id
//! is the SHA-256 of the certificate's key ([`Member::key_id`]) until they renew.
//!
//! Certificates live for a week and are renewed at two thirds of that; a node that was switched off for longer may still
//! renew for a month, and needs a new token after that.
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
//! | `root.key` | the root's private keys, unless systemd hands them over (credential `root-key`), and a copy of its certificate; while it is rotated, those of the former one, too (head only) | owner |
//! | `intermediate.key` | where the root's keys are kept elsewhere: the keys of the intermediate that issues instead, and its papers (head only) | owner |
//! | `intermediate.key.next` | keys of an intermediate that the root has not signed yet | owner |
//! | `root.crt` | the root's certificate | all |
//! | `root.history` | the statements by which the root took the place of earlier ones | owner |
//! | `identity.key` | the node's ML-DSA key, unless systemd hands it over (credential `identity-key`) | owner |
//! | `identity.key.next` | the one that takes its place at the next start | owner |
//! | `identity.doc` | the root's document about the node | owner |
//! | `node.key` | the private key of the node's certificate | owner |
//! | `node.crt` | the node's certificate | all |
//! | `tokens.json` | hashes of join tokens (head only) | owner |
//! | `members.json` | names and certificates' ends of the nodes that joined (head only) | owner |
//! | `expelled.json` | nodes that were expelled; at workers a copy of the head's | owner |
//!
//! None of these is created anew while others of its set exist, unless the result is the same: replacing the
//! root would lose the mesh, and an empty list of expelled nodes would readmit all of them.

mod admission;
mod certificate;
mod certified;
mod clock;
mod deny;
mod digest;
mod error;
mod evidence;
mod identity;
mod identity_keys;
mod identity_text;
mod intermediate;
mod issued;
pub(crate) mod names;
mod node_key;
mod refusal;
mod root;
mod root_history;
mod root_identity;
mod root_keys;
mod roots;
mod succession;
mod succession_error;
mod token;

pub use crate::files::{read_json, write_json};
pub use admission::{Admission, JoinAsk, RenewAsk};
pub use certificate::{LONGEST_NAME, Member, Role, check_name, requested_key_id, root_digest};
pub(crate) use certificate::{algorithms, verify_issued_by};
pub use clock::MeshClock;
pub(crate) use deny::Expellable;
pub use deny::{DenyList, Expulsion, MOST_EXPELLED};
pub(crate) use digest::sha256;
pub use error::TrustError;
pub use evidence::{EvidenceSource, LONGEST_EVIDENCE, Newcomer, Vouched};
pub(crate) use evidence::{vouch, vouched};
pub(crate) use identity::move_identity;
pub use identity::{Applicant, NodeIdentity, Signer, set_aside};
pub use identity_keys::{IdentityIds, identity_ids, read_papers, rotate_identity};
pub use identity_text::{describe_identity, rotate_and_describe};
pub use intermediate::{
    INTERMEDIATE_LIFE, install_intermediate, request_intermediate, requested_intermediate,
    sign_intermediate,
};
pub use issued::{Issued, Subject, Validity};
pub use names::NODE_CERTIFICATE as NODE_CERTIFICATE_FILE;
pub use names::{EXPELLED as EXPELLED_FILE, MEMBERS as MEMBERS_FILE, TOKENS as TOKENS_FILE};
pub(crate) use node_key::NodeKey;
pub use refusal::{
    AWAITING_APPROVAL, CERTIFICATE_DATES, DUPLICATE_IDENTITY, EVIDENCE_REFUSED, EXPELLED, Refusal,
    TOKEN_EXPIRED, TOKEN_UNKNOWN, TOKEN_USED,
};
pub use root::MeshRoot;
pub(crate) use roots::root_hint;
pub use roots::{Former, Roots};
pub use succession::{LONGEST_SUCCESSION, Succession};
pub use succession_error::SuccessionError;
pub use token::{JoinToken, ParseTokenError};
