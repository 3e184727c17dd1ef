//! Reasons for not admitting a node, and their codes in Error messages.

use dcf::ErrorCode;

use super::error::TrustError;

/// Reasons for not admitting a node. A refusal travels as an Error message: a code and a text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The head does not know the token.
    #[error(
        "the head does not know this token: it was withdrawn, or its text was made up; make one with `hydramesh token create`"
    )]
    TokenUnknown,
    /// The token was used before.
    #[error(
        "this token was used by `{node_name}` {seconds_ago} s ago, and it is good for {}; make another with `hydramesh token create`",
        node_count(.nodes)
    )]
    TokenUsed {
        /// Name of the node that used it.
        node_name: String,
        /// Seconds since the use.
        seconds_ago: u64,
        /// Number of nodes that the token is good for.
        nodes: u32,
    },
    /// The token has expired.
    #[error(
        "this token expired {seconds_ago} s ago by the head's clock, which says {now}; make another with `hydramesh token create`, and set the head's clock if that date is wrong"
    )]
    TokenExpired {
        /// Seconds since the expiry.
        seconds_ago: u64,
        /// Date by the head's clock.
        now: String,
    },
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The node is not, or no longer, a member.
    #[error("{0}")]
    NotAdmitted(String),
    /// An operator has expelled the node.
    #[error("{0}")]
    Expelled(String),
    /// An operator has to approve the node first.
    #[error("{0}")]
    AwaitingApproval(String),
    /// The node's evidence does not meet the head's policy.
    #[error("{0}")]
    Evidence(String),
    /// An internal error of the head.
    #[error("the head could not do it: {0}")]
    Internal(String),
}

fn node_count(nodes: &u32) -> String {
    match nodes {
        1 => "one node".to_owned(),
        more => format!("{more} nodes"),
    }
}

impl Refusal {
    /// Code of the refusal in an Error message.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::TokenUnknown => TOKEN_UNKNOWN,
            Self::TokenUsed { .. } => TOKEN_USED,
            Self::TokenExpired { .. } => TOKEN_EXPIRED,
            Self::Invalid(_) => ErrorCode::INVALID_PAYLOAD,
            Self::NotAdmitted(_) => ErrorCode::UNAUTHORIZED,
            Self::Expelled(_) => EXPELLED,
            Self::AwaitingApproval(_) => AWAITING_APPROVAL,
            Self::Evidence(_) => EVIDENCE_REFUSED,
            Self::Internal(_) => ErrorCode::INTERNAL,
        }
    }
}

impl From<TrustError> for Refusal {
    fn from(error: TrustError) -> Self {
        match error {
            TrustError::Name(_) | TrustError::Request(_) => Self::Invalid(error.to_string()),
            TrustError::RootReplaced { .. } => Self::NotAdmitted(error.to_string()),
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
/// A certificate's dates do not fit the clock of the node that looks at it: renew it at the head.
pub const CERTIFICATE_DATES: ErrorCode = ErrorCode(0x53);
/// Another machine is connected with the same identity.
pub const DUPLICATE_IDENTITY: ErrorCode = ErrorCode(0x54);
/// The node was expelled from the mesh.
pub const EXPELLED: ErrorCode = ErrorCode(0x55);
/// An operator has to approve the node; it may ask again.
pub const AWAITING_APPROVAL: ErrorCode = ErrorCode(0x56);
/// The node's evidence does not meet the head's policy.
pub const EVIDENCE_REFUSED: ErrorCode = ErrorCode(0x58);
