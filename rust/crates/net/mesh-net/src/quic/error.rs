//! Errors of making links, causes of their end, and errors of streams.

use std::io;
use std::net::SocketAddr;

use data_encoding::HEXLOWER;
use dcf::{ErrorCode, StreamError};
use quinn::{ConnectionError, VarInt};

use crate::trust::{
    AWAITING_APPROVAL, CERTIFICATE_DATES, EXPELLED, Role, TOKEN_EXPIRED, TOKEN_UNKNOWN, TOKEN_USED,
    TrustError,
};

/// Errors of making a link.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The local socket cannot be bound.
    #[error("cannot open a UDP socket on {address}: {source}")]
    Socket {
        /// Local address of the socket.
        address: SocketAddr,
        /// Error from the operating system.
        source: io::Error,
    },
    /// An address that cannot be dialled.
    #[error("cannot connect to {address}: {reason}")]
    Address {
        /// Address of the peer.
        address: SocketAddr,
        /// Reason for which it cannot be dialled.
        reason: String,
    },
    /// The peer does not answer.
    #[error("no answer from {address}/udp; is it running, and is the port open?")]
    NoAnswer {
        /// Address of the peer.
        address: SocketAddr,
    },
    /// None of several addresses could be reached.
    #[error("none of its {} addresses can be reached: {}", tried.len(), listed(tried))]
    Nowhere {
        /// Each address with its error, in the order of failure.
        tried: Vec<(SocketAddr, ConnectError)>,
    },
    /// The peer's certificate is not of our mesh.
    #[error("{address} does not prove that it belongs to this mesh: {reason}")]
    PeerNotTrusted {
        /// Address of the peer.
        address: SocketAddr,
        /// Error of the certificate check.
        reason: String,
    },
    /// The peer is of our mesh but has another role than expected.
    #[error("{address} is a {found} of the mesh, not a {expected}")]
    WrongRole {
        /// Address of the peer.
        address: SocketAddr,
        /// Role that was expected.
        expected: Role,
        /// Role in the peer's certificate.
        found: Role,
    },
    /// The peer was expelled from our mesh.
    #[error("{address} is not called: {text}")]
    Expelled {
        /// Address of the peer.
        address: SocketAddr,
        /// Name of the peer and time of its expulsion.
        text: String,
    },
    /// The peer does not admit us.
    #[error("{address} refused the connection: {text}")]
    Refused {
        /// Address of the peer.
        address: SocketAddr,
        /// Code of the refusal.
        code: ErrorCode,
        /// Reason that the peer gave.
        text: String,
    },
    /// The connection ended while it was being made.
    #[error("the connection to {address} failed: {reason}")]
    Failed {
        /// Address of the peer.
        address: SocketAddr,
        /// Cause of the end.
        reason: Closed,
    },
    /// Our own keys or certificates cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

fn listed(tried: &[(SocketAddr, ConnectError)]) -> String {
    let texts: Vec<String> = tried.iter().map(|(_, error)| error.to_string()).collect();
    texts.join("; ")
}

impl ConnectError {
    /// Selects one error of several addresses: that of a peer which answered, if there is one.
    pub(super) fn of_all(mut tried: Vec<(SocketAddr, ConnectError)>) -> Self {
        let answered = tried.iter().position(|(_, error)| !error.is_transient());
        match answered {
            Some(at) => tried.swap_remove(at).1,
            None if tried.len() == 1 => tried.swap_remove(0).1,
            None => Self::Nowhere { tried },
        }
    }

    /// True if the peer did not answer, so that another address or a later attempt may help.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::NoAnswer { .. }
                | Self::Failed { .. }
                | Self::Socket { .. }
                | Self::Address { .. }
                | Self::Nowhere { .. }
                | Self::Refused {
                    code: ErrorCode::RATE_LIMITED,
                    ..
                }
        )
    }

    pub(super) fn new(address: SocketAddr, error: ConnectionError) -> Self {
        match error {
            ConnectionError::TimedOut => Self::NoAnswer { address },
            ConnectionError::TransportError(error) if is_tls_alert(error.code) => {
                let reason = match error.reason.contains("UnknownIssuer") {
                    true => format!("{}; {ROOT_ADVICE}", error.reason),
                    false => error.reason,
                };
                Self::PeerNotTrusted { address, reason }
            }
            ref error if is_date_alert(error) => Self::Refused {
                address,
                code: CERTIFICATE_DATES,
                text: "it judges our certificate by its own clock, which is wrong, or the certificate has ended".to_owned(),
            },
            ConnectionError::ConnectionClosed(close)
                if u64::from(close.error_code) == TLS_ALERTS + NO_APPLICATION_PROTOCOL =>
            {
                Self::Refused {
                    address,
                    code: ErrorCode::VERSION_MISMATCH,
                    text: "it is of an earlier version and does not know this protocol; update it"
                        .to_owned(),
                }
            }
            ConnectionError::ConnectionClosed(close) if is_tls_alert(close.error_code) => {
                Self::Refused {
                    address,
                    code: ErrorCode::UNAUTHORIZED,
                    text: format!("it does not accept our certificate ({close}); {ROOT_ADVICE}"),
                }
            }
            error => match Closed::from(error) {
                Closed::ByPeer { code, text } => Self::Refused {
                    address,
                    code,
                    text,
                },
                reason => Self::Failed { address, reason },
            },
        }
    }
}

/// Errors of joining a mesh or renewing a certificate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The connection to the head failed.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The token is for another mesh than the one at this address.
    #[error(
        "this token is for another mesh: it names the root {}…, and the head at {address} has {}…; check the address, or make a token at that head",
        &HEXLOWER.encode(pinned)[..16], presented.map_or("none to show".to_owned(), |root| HEXLOWER.encode(&root)[..16].to_owned())
    )]
    ForeignMesh {
        /// Address of the head.
        address: SocketAddr,
        /// SHA-256 of the root in the token.
        pinned: [u8; 32],
        /// SHA-256 of the root at the address, if it showed one.
        presented: Option<[u8; 32]>,
    },
    /// The head refused; the codes [`TOKEN_UNKNOWN`], [`TOKEN_USED`] and [`TOKEN_EXPIRED`] are about the token.
    #[error("{}{text}", if is_about_token(*code) { "" } else { "the head refused: " })]
    Refused {
        /// Code of the refusal.
        code: ErrorCode,
        /// Reason that the head gave.
        text: String,
    },
    /// The exchange ended early.
    #[error("the exchange with the head broke off: {0}")]
    Broken(#[from] StreamFailure),
    /// The head's answer is invalid.
    #[error("the head's answer makes no sense: {0}")]
    Answer(String),
    /// Our own keys or certificates cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The identity in the state directory is unusable, and the token does not yield another one.
    #[error("{identity}. Its join token does not help: {source}")]
    Unusable {
        /// Error of the identity.
        identity: TrustError,
        /// Error of the attempt to join again.
        source: Box<JoinError>,
    },
}

impl JoinError {
    /// True if trying again later, with the same token, can help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect(error) => error.is_transient(),
            Self::Broken(_) => true,
            Self::Refused { code, .. } => matches!(
                *code,
                ErrorCode::INTERNAL
                    | ErrorCode::DRAINING
                    | ErrorCode::RATE_LIMITED
                    | AWAITING_APPROVAL
            ),
            Self::Unusable { source, .. } => source.is_transient(),
            _ => false,
        }
    }

    /// True if the head reports that this node was expelled.
    pub fn is_expulsion(&self) -> bool {
        match self {
            Self::Refused { code, .. } | Self::Connect(ConnectError::Refused { code, .. }) => {
                *code == EXPELLED
            }
            Self::Unusable { source, .. } => source.is_expulsion(),
            _ => false,
        }
    }
}

fn is_about_token(code: ErrorCode) -> bool {
    [TOKEN_UNKNOWN, TOKEN_USED, TOKEN_EXPIRED].contains(&code)
}

/// Causes of the end of a link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Closed {
    /// The peer closed it.
    #[error("closed by the peer: {text} ({code})")]
    ByPeer {
        /// Code that the peer gave.
        code: ErrorCode,
        /// Reason that the peer gave.
        text: String,
    },
    /// This side closed it.
    #[error("closed by this side")]
    ByUs,
    /// The peer's process is gone: its port answers with ICMP errors and nothing else.
    #[error("the peer's process is gone")]
    Gone,
    /// The peer was silent for the idle timeout.
    #[error("the peer went silent")]
    Silent,
    /// The peer restarted and does not know the connection.
    #[error("the peer restarted")]
    Restarted,
    /// QUIC or TLS failed.
    #[error("{0}")]
    Failed(String),
}

impl From<ConnectionError> for Closed {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => Self::ByPeer {
                code: error_code(close.error_code),
                text: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            ConnectionError::LocallyClosed => Self::ByUs,
            ConnectionError::TimedOut => Self::Silent,
            ConnectionError::Reset => Self::Restarted,
            other => Self::Failed(other.to_string()),
        }
    }
}

/// Errors that end a stream early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamFailure {
    /// The bytes are not DCF messages, or a message is over the limit. The stream has been closed.
    #[error(transparent)]
    Codec(StreamError),
    /// The peer reset its half, or no longer wants to read ours.
    #[error("the peer cancelled the stream ({0})")]
    Cancelled(ErrorCode),
    /// The link has ended.
    #[error("the link ended: {0}")]
    Link(Closed),
    /// This side finished or reset its half before.
    #[error("the stream was already finished on this side")]
    Finished,
}

impl From<ConnectionError> for StreamFailure {
    fn from(error: ConnectionError) -> Self {
        Self::Link(error.into())
    }
}

impl From<quinn::WriteError> for StreamFailure {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::Stopped(code) => Self::Cancelled(error_code(code)),
            quinn::WriteError::ConnectionLost(error) => error.into(),
            quinn::WriteError::ClosedStream | quinn::WriteError::ZeroRttRejected => Self::Finished,
        }
    }
}

impl From<quinn::ReadError> for StreamFailure {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::Reset(code) => Self::Cancelled(error_code(code)),
            quinn::ReadError::ConnectionLost(error) => error.into(),
            _ => Self::Finished,
        }
    }
}

/// The codec hides quinn's errors in `io::Error`; takes them out again.
impl From<StreamError> for StreamFailure {
    fn from(error: StreamError) -> Self {
        let StreamError::Io(io) = error else {
            return Self::Codec(error);
        };
        let written = io.downcast::<quinn::WriteError>().map(Self::from);
        written
            .or_else(|io| io.downcast::<quinn::ReadError>().map(Self::from))
            .unwrap_or_else(|io| Self::Codec(StreamError::Io(io)))
    }
}

/// Converts QUIC's application code to DCF's; codes that do not fit are a fault of the peer.
pub(super) fn error_code(code: VarInt) -> ErrorCode {
    u8::try_from(code.into_inner()).map_or(ErrorCode::INTERNAL, ErrorCode)
}

/// True if the peer's TLS reports that our certificate has expired or is not valid yet: rustls sends
/// certificate_expired (RFC 8446, section 6.2) for both.
pub(super) fn is_date_alert(error: &ConnectionError) -> bool {
    matches!(error, ConnectionError::ConnectionClosed(close)
        if u64::from(close.error_code) == TLS_ALERTS + CERTIFICATE_EXPIRED)
}

/// True if the peer's certificate, or its proof of having the key, was not accepted here (RFC 8446, section
/// 6.2).
pub(super) fn is_bad_certificate(error: &ConnectionError) -> bool {
    matches!(error, ConnectionError::TransportError(error)
        if BAD_CERTIFICATE.contains(&u64::from(error.code).wrapping_sub(TLS_ALERTS)))
}

/// RFC 9001, section 4.8: TLS alerts are the codes 0x100 to 0x1ff.
fn is_tls_alert(code: quinn::TransportErrorCode) -> bool {
    (TLS_ALERTS..TLS_ALERTS + 0x100).contains(&u64::from(code))
}

/// For peers that have no root in common.
const ROOT_ADVICE: &str = "if the mesh root was rotated while this node was away, it has to join again with a token \
    (`hydramesh token create`)";
const TLS_ALERTS: u64 = 0x100;
const CERTIFICATE_EXPIRED: u64 = 45;
/// bad_certificate, unsupported_certificate, certificate_unknown, unknown_ca, access_denied, decrypt_error.
const BAD_CERTIFICATE: [u64; 6] = [42, 43, 46, 48, 49, 51];
const NO_APPLICATION_PROTOCOL: u64 = 120;
