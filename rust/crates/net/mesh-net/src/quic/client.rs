//! Sessions for clients: a key or token is shown over TLS, and the keys of a [`SealedSession`] come from it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use dcf::{ErrorCode, Message, MsgType};
use mesh_base::addresses::race;
use mesh_base::clock::timestamp_us;
use mesh_base::listen;
use mesh_proto::{ClientHello, ClientWelcome};
use prost::Message as _;
use quinn::Connection;

use super::config::LinkConfig;
use super::connector::{dial, peer_member, within};
use super::endpoint::LinkEndpoint;
use super::error::{Closed, ConnectError, StreamFailure};
use super::join::{self, ANSWER_TIMEOUT, GOODBYE_TIMEOUT, MAX_EXCHANGE};
use super::link::canonical;
use super::stream::MsgStream;
use super::tls::{self, CLIENT_PROTOCOL, PinVerifier};
use crate::sealed::{End, SealedSession, SessionKeys};
use crate::trust::{Role, TrustError};

/// Decides which clients get a session.
pub trait ClientDoor: Send + Sync + fmt::Debug {
    /// Admits a client and takes its session, or refuses it.
    ///
    /// # Errors
    /// [`NoSession`], in words for the client.
    fn enter(
        &self,
        ask: &SessionAsk<'_>,
        session: SealedSession,
    ) -> Result<SessionTerms, NoSession>;
}

/// A client's request for a session.
#[derive(Clone, Copy)]
pub struct SessionAsk<'a> {
    /// Text of its API key or curtain token.
    pub credential: &'a str,
    /// Tenant that it means to act for; empty if it names none.
    pub tenant: &'a str,
    /// Address that its handshake came from. The address was validated.
    pub from: SocketAddr,
}

impl fmt::Debug for SessionAsk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionAsk")
            .field("tenant", &self.tenant)
            .field("from", &self.from)
            .finish_non_exhaustive()
    }
}

/// What a client is told about its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionTerms {
    /// Time after which it ends.
    pub lifetime: Duration,
    /// Silence of the client after which it ends.
    pub idle: Duration,
    /// Address for sealed datagrams. An unspecified address is the one at which the client reached the head.
    pub udp: SocketAddr,
}

/// The reason for which a client gets no session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct NoSession {
    /// Code of the refusal.
    pub code: ErrorCode,
    /// Reason, for the client.
    pub text: String,
}

/// Errors of asking for a session.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The connection to the head failed.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The mesh at the address has another root.
    #[error(
        "{address} is of another mesh: its root is {}, and {} is expected; check the address, and the root with `hydramesh root show` at the head",
        presented.map_or("not shown".to_owned(), |root| HEXLOWER.encode(&root)), HEXLOWER.encode(expected)
    )]
    ForeignMesh {
        /// Address of the head.
        address: SocketAddr,
        /// SHA-256 of the expected root.
        expected: [u8; 32],
        /// SHA-256 of the root at the address, if it showed one.
        presented: Option<[u8; 32]>,
    },
    /// The head opens no session.
    #[error("the head refused: {text}")]
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
    /// Keys cannot be made.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

/// Asks a head for a session with an API key or a curtain token. The key or token is sent only after the head
/// has shown a certificate of the mesh root with this SHA-256. `head` is the addresses of one head; the first
/// that answers counts.
///
/// # Errors
/// [`SessionError`] says why there is no session.
pub async fn open_session(
    head: &[SocketAddr],
    root: &[u8; 32],
    credential: &str,
    tenant: &str,
) -> Result<(SealedSession, SessionTerms), SessionError> {
    let config = LinkConfig {
        max_message: MAX_EXCHANGE,
        ..LinkConfig::default()
    };
    let verifier = Arc::new(PinVerifier::new(*root));
    let (config, verifier) = (&config, &verifier);
    let attempt = |address| async move {
        let carrier = LinkEndpoint::bind(listen::toward(address), None)?;
        let tls = tls::anonymous(verifier.clone(), CLIENT_PROTOCOL, config.classical)?;
        let dialled = dial(&carrier, tls, address, config);
        let connection = within(config.handshake_timeout, address, dialled).await?;
        peer_member(&connection, address, Role::Head)?;
        Ok::<_, ConnectError>((carrier, connection))
    };
    let raced = race(head, attempt).await.map_err(ConnectError::of_all);
    let (address, (carrier, connection)) = raced.map_err(|error| match error {
        ConnectError::PeerNotTrusted { address, .. } if !verifier.matched() => {
            SessionError::ForeignMesh {
                address,
                expected: *root,
                presented: verifier.foreign(),
            }
        }
        error => error.into(),
    })?;
    let hello = ClientHello {
        credential: credential.to_owned(),
        tenant: tenant.to_owned(),
    };
    let asked = exchange(&connection, &hello, address);
    let answer = within(ANSWER_TIMEOUT, address, asked).await;
    connection.close(0u32.into(), b"");
    // The head waits for the close; a moment is enough.
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, carrier.endpoint.wait_idle()).await;
    answer
}

async fn exchange(
    connection: &Connection,
    hello: &ClientHello,
    head: SocketAddr,
) -> Result<(SealedSession, SessionTerms), SessionError> {
    let halves = connection.open_bi().await.map_err(StreamFailure::from)?;
    let mut stream = MsgStream::new(halves, MAX_EXCHANGE);
    let asked_at = timestamp_us();
    let hello = Message::new(MsgType::CLIENT_HELLO, 0, asked_at, hello.encode_to_vec());
    stream.send(hello).await?;
    stream.finish()?;
    let answer = match stream.recv().await {
        Ok(Some(answer)) => answer,
        Ok(None) => return Err(SessionError::Answer("there is none".to_owned())),
        // The head closes the connection when it does not want to talk at all.
        Err(StreamFailure::Link(Closed::ByPeer { code, text })) => {
            return Err(SessionError::Refused { code, text });
        }
        Err(failure) => return Err(failure.into()),
    };
    if let Some(error) = answer.error_body() {
        let (code, text) = (error.code, error.text.into_owned());
        return Err(SessionError::Refused { code, text });
    }
    if answer.kind != MsgType::CLIENT_WELCOME {
        return Err(SessionError::Answer(format!("it is a {}", answer.kind)));
    }
    let welcome = ClientWelcome::decode(answer.payload);
    let welcome = welcome.map_err(|error| SessionError::Answer(error.to_string()))?;
    let terms = terms(&welcome, head)?;
    let keys = session_keys(connection, welcome.session)?;
    let began = (asked_at, answer.timestamp_us);
    let session = SealedSession::new(welcome.session, End::Client, &keys, began, Instant::now());
    Ok((session, terms))
}

fn terms(welcome: &ClientWelcome, head: SocketAddr) -> Result<SessionTerms, SessionError> {
    let port = u16::try_from(welcome.port).ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| SessionError::Answer(format!("UDP port {}", welcome.port)))?;
    let ip = match welcome.address.as_str() {
        "" => head.ip(),
        text => text
            .parse()
            .map_err(|_| SessionError::Answer(format!("UDP address {text:?}")))?,
    };
    Ok(SessionTerms {
        lifetime: Duration::from_secs(welcome.lifetime_seconds.into()),
        idle: Duration::from_secs(welcome.idle_seconds.into()),
        udp: SocketAddr::new(ip, port),
    })
}

/// The head's side of the exchange. The error is for the log.
pub(super) async fn answer(
    connection: &Connection,
    door: Arc<dyn ClientDoor>,
) -> Result<(), String> {
    let (mut stream, request) = join::request(connection).await?;
    let from = canonical(connection.remote_address());
    let (answer, result) = match enter(connection, &*door, request, from) {
        Ok(welcome) => (welcome, Ok(())),
        Err(NoSession { code, text }) => {
            (Message::error(0, timestamp_us(), code, &text), Err(text))
        }
    };
    // A peer that takes nothing is not waited for.
    let sent = tokio::time::timeout(GOODBYE_TIMEOUT, stream.send(answer)).await;
    sent.map_err(|_| "the answer was not taken".to_owned())?
        .map_err(|error| error.to_string())?;
    stream.finish().map_err(|error| error.to_string())?;
    // The answer must arrive before the connection goes: the other side closes.
    let _ = tokio::time::timeout(GOODBYE_TIMEOUT, connection.closed()).await;
    connection.close(0u32.into(), b"");
    result
}

fn enter(
    connection: &Connection,
    door: &dyn ClientDoor,
    request: Message,
    from: SocketAddr,
) -> Result<Message, NoSession> {
    let refused = |code, text| NoSession { code, text };
    if request.kind != MsgType::CLIENT_HELLO {
        let text = format!("{} asks for no session: send a ClientHello", request.kind);
        return Err(refused(ErrorCode::INVALID_PAYLOAD, text));
    }
    let hello = ClientHello::decode(request.payload).map_err(|error| {
        let text = format!("unreadable ClientHello: {error}");
        refused(ErrorCode::INVALID_PAYLOAD, text)
    })?;
    let internal = |text: String| refused(ErrorCode::INTERNAL, text);
    let mut id = [0; 8];
    aws_lc_rs::rand::fill(&mut id).map_err(|_| internal("no random numbers".to_owned()))?;
    let id = u64::from_be_bytes(id);
    let keys = session_keys(connection, id).map_err(|error| internal(error.to_string()))?;
    let began = timestamp_us();
    let times = (request.timestamp_us, began);
    let session = SealedSession::new(id, End::Head, &keys, times, Instant::now());
    let ask = SessionAsk {
        credential: &hello.credential,
        tenant: &hello.tenant,
        from,
    };
    let terms = door.enter(&ask, session)?;
    let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    let udp = terms.udp;
    let welcome = ClientWelcome {
        session: id,
        lifetime_seconds: seconds(terms.lifetime),
        idle_seconds: seconds(terms.idle),
        port: udp.port().into(),
        address: match udp.ip() {
            ip if ip.is_unspecified() => String::new(),
            ip => IpAddr::to_canonical(&ip).to_string(),
        },
    };
    let body = welcome.encode_to_vec();
    Ok(Message::new(MsgType::CLIENT_WELCOME, 0, began, body))
}

/// The keys that only the two ends of this TLS session can compute (RFC 8446, section 7.5).
fn session_keys(connection: &Connection, session: u64) -> Result<SessionKeys, TrustError> {
    let context = session.to_be_bytes();
    let export = |label: &str| {
        let mut key = [0; 32];
        connection
            .export_keying_material(&mut key, label.as_bytes(), &context)
            .map_err(|error| TrustError::Crypto(format!("no key for `{label}`: {error:?}")))?;
        Ok::<_, TrustError>(key)
    };
    Ok(SessionKeys {
        client: export(CLIENT_LABEL)?,
        head: export(HEAD_LABEL)?,
    })
}

/// Label of the exported key for what the client sends; the context is the session, 8 bytes, big-endian.
const CLIENT_LABEL: &str = "hydramesh dcf client";
/// The same for what the head sends.
const HEAD_LABEL: &str = "hydramesh dcf head";

/// Time for the close to leave.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
