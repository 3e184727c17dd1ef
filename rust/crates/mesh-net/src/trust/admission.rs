//! Who may become and remain a member: the seam for stricter policies, and today's one.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use dcf::ErrorCode;
use rustls::pki_types::CertificateDer;

use super::identity::NodeKey;
use super::root::requested_node_id;
use super::{
    JoinToken, Member, MeshRoot, NodeIdentity, Role, TokenRecord, TokenStore, TrustError, Validity,
};

/// Decides who becomes a member and who remains one. A [`quic::Listener`](crate::quic::Listener) asks it.
///
/// The methods may block on the disk; the listener calls them on blocking threads. Certificates are DER, the node's
/// first, then the root's.
pub trait Admission: Send + Sync + 'static {
    /// A node without certificate hands in a token.
    fn join(
        &self,
        ask: &JoinAsk<'_>,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal>;

    /// A member, authenticated by its certificate, which may have ended, asks for a fresh one for the key in `request`
    /// (PKCS#10, DER).
    fn renew(
        &self,
        member: &Member,
        request: &[u8],
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal>;

    /// A node with a valid certificate connects. Refuse it here when it has been expelled.
    fn connect(&self, member: &Member, now: SystemTime) -> Result<(), Refusal> {
        let _ = (member, now);
        Ok(())
    }

    /// Name of the mesh.
    fn mesh(&self) -> String;
}

/// What a joining node hands in.
#[derive(Clone, Copy, Debug)]
pub struct JoinAsk<'a> {
    /// Public part of the token.
    pub token_id: &'a str,
    /// Secret part of the token.
    pub token_secret: &'a [u8],
    /// PKCS#10 request for the node's key, DER.
    pub request: &'a [u8],
    /// Name of the node.
    pub node_name: &'a str,
}

/// Why a node is not admitted. Travels as an Error message: a code and a text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// No such token here.
    #[error(
        "the head does not know this token: it was withdrawn, or its text was made up; make one with `hydramesh token create`"
    )]
    TokenUnknown,
    /// Its one use is over.
    #[error(
        "this token was used by `{node_name}` {seconds_ago} s ago, and a token is good for one node; make another with `hydramesh token create`"
    )]
    TokenUsed {
        /// Who used it.
        node_name: String,
        /// How long ago, seconds.
        seconds_ago: u64,
    },
    /// Its time is over.
    #[error("this token expired {seconds_ago} s ago; make another with `hydramesh token create`")]
    TokenExpired {
        /// How long ago, seconds.
        seconds_ago: u64,
    },
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// Not, or no longer, a member.
    #[error("{0}")]
    NotAdmitted(String),
    /// The head failed.
    #[error("the head could not do it: {0}")]
    Internal(String),
}

impl Refusal {
    /// The code on the wire.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::TokenUnknown => TOKEN_UNKNOWN,
            Self::TokenUsed { .. } => TOKEN_USED,
            Self::TokenExpired { .. } => TOKEN_EXPIRED,
            Self::Invalid(_) => ErrorCode::INVALID_PAYLOAD,
            Self::NotAdmitted(_) => ErrorCode::UNAUTHORIZED,
            Self::Internal(_) => ErrorCode::INTERNAL,
        }
    }
}

impl From<TrustError> for Refusal {
    fn from(error: TrustError) -> Self {
        match error {
            TrustError::Name(_) | TrustError::Request(_) => Self::Invalid(error.to_string()),
            _ => Self::Internal(error.to_string()),
        }
    }
}

/// Error code of [`Refusal::TokenUnknown`].
pub const TOKEN_UNKNOWN: ErrorCode = ErrorCode(0x50);
/// Error code of [`Refusal::TokenUsed`].
pub const TOKEN_USED: ErrorCode = ErrorCode(0x51);
/// Error code of [`Refusal::TokenExpired`].
pub const TOKEN_EXPIRED: ErrorCode = ErrorCode(0x52);

/// Today's policy: whoever brings an unused token of this mesh is a worker, and stays one.
#[derive(Debug)]
pub struct Authority {
    root: MeshRoot,
    tokens: Mutex<TokenStore>,
    validity: Validity,
}

impl Authority {
    /// Opens the head's state directory; makes a root for a mesh of this name at the first start.
    pub fn open(dir: &Path, mesh: &str, validity: Validity) -> Result<Self, TrustError> {
        let root = MeshRoot::load_or_create(dir, mesh)?;
        let tokens = Mutex::new(TokenStore::open(dir, root.sha256())?);
        Ok(Self {
            root,
            tokens,
            validity,
        })
    }

    /// The mesh's root.
    pub fn root(&self) -> &MeshRoot {
        &self.root
    }

    /// The head's own identity, kept in `dir`: loaded when it is of this mesh and holds, else issued.
    pub fn head_identity(
        &self,
        dir: &Path,
        name: &str,
        now: SystemTime,
    ) -> Result<NodeIdentity, TrustError> {
        match NodeIdentity::load(dir) {
            Ok(identity)
                if identity.root() == self.root.certificate() && now < identity.renew_at() =>
            {
                Ok(identity)
            }
            // A missing, foreign or ending certificate is replaced: the root is here.
            _ => {
                let key = NodeKey::load_or_create(dir)?;
                let chain =
                    self.root
                        .issue(&key.request()?, name, Role::Head, self.validity.life, now)?;
                NodeIdentity::store(dir, key, chain)
            }
        }
    }

    /// Creates a join token; its text form goes to the operator and nowhere else.
    pub fn create_token(
        &self,
        lifetime: Duration,
        note: &str,
        now: SystemTime,
    ) -> Result<JoinToken, TrustError> {
        self.tokens().create(lifetime, note, now)
    }

    /// Withdraws an unused token; true if there was one.
    pub fn revoke_token(&self, id: &str) -> Result<bool, TrustError> {
        self.tokens().revoke(id)
    }

    /// The tokens that are remembered.
    pub fn token_records(&self) -> Vec<TokenRecord> {
        self.tokens().records().to_vec()
    }

    fn tokens(&self) -> MutexGuard<'_, TokenStore> {
        // The store changes only after the file did, in one assignment.
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Admission for Authority {
    fn join(
        &self,
        ask: &JoinAsk<'_>,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        // The certificate is made before the token is used up, so that a bad request costs no token; it goes out after.
        let chain = self.root.issue(
            ask.request,
            ask.node_name,
            Role::Worker,
            self.validity.life,
            now,
        )?;
        let node_id = requested_node_id(ask.request)?;
        self.tokens()
            .redeem(ask.token_id, ask.token_secret, &node_id, ask.node_name, now)?;
        Ok(chain)
    }

    fn renew(
        &self,
        member: &Member,
        request: &[u8],
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        if now > member.not_after + self.validity.renewal_grace {
            let reason =
                "the certificate ended too long ago to be renewed; join again with a new token";
            return Err(Refusal::NotAdmitted(reason.to_owned()));
        }
        if requested_node_id(request)? != member.node_id {
            return Err(Refusal::Invalid(
                "a renewal is for the key of the old certificate".to_owned(),
            ));
        }
        Ok(self
            .root
            .issue(request, &member.name, member.role, self.validity.life, now)?)
    }

    fn mesh(&self) -> String {
        self.root.mesh().to_owned()
    }
}
