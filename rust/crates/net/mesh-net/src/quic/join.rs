//! Becoming a member with a token, and remaining one by renewal.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use data_encoding::HEXLOWER;
use dcf::{ErrorCode, Message, MsgType};
use mesh_base::addresses::race;
use mesh_base::clock::timestamp_us;
use mesh_base::listen;
use mesh_identity::{IdentityKey, PublicKey, Purpose, Transcript};
use mesh_proto::{IdentityProof, JoinRequest, JoinResponse, RenewRequest};
use prost::Message as _;
use quinn::Connection;
use quinn::crypto::rustls::QuicClientConfig;
use rustls::pki_types::CertificateDer;

use super::config::LinkConfig;
use super::connector::{dial, peer_member, within};
use super::endpoint::LinkEndpoint;
use super::error::{Closed, ConnectError, JoinError, StreamFailure};
use super::link::close;
use super::stream::MsgStream;
use super::tls::{self, JOIN_PROTOCOL, PinVerifier};
use crate::files;
use crate::trust::{
    Admission, Applicant, DenyList, Issued, JoinAsk, JoinToken, Member, Newcomer, NodeIdentity,
    NodeKey, Refusal, RenewAsk, Role, TrustError, move_identity, names, set_aside, sha256, vouch,
    vouched,
};

/// Joins the mesh of the token at its head, and stores the identity in the state directory.
///
/// The key is made on this machine, in the state directory, and does not leave it; a join that broke off can be repeated
/// with the same directory and token. `head` is the addresses of one head; the first that answers counts.
pub async fn join(
    head: &[SocketAddr],
    token: &JoinToken,
    state_dir: &Path,
    node: impl Into<Newcomer<'_>>,
) -> Result<NodeIdentity, JoinError> {
    let node = node.into();
    // What cannot be read is found out before the token is used.
    let deny_list = DenyList::open(state_dir)?;
    let applicant = Applicant::open(state_dir)?;
    let (csr, token_id) = (applicant.request()?, token.id());
    let verifier = Arc::new(PinVerifier::new(*token.root_sha256()));
    let tls = |classical| tls::anonymous(verifier.clone(), JOIN_PROTOCOL, classical);
    let request = async |session: [u8; 32]| {
        let transcript = Transcript {
            purpose: Purpose::Join,
            session: &session,
            root: token.root_sha256(),
            request: &csr,
            token: &token_id,
            name: node.name,
            successor: None,
            evidence: None,
        };
        let key = applicant.identity_key();
        let evidence = match key.zip(node.evidence) {
            Some((key, source)) => Some(vouch(&transcript, key, source).await),
            None => None,
        };
        let request = JoinRequest {
            token_id: token_id.clone(),
            token_secret: token.secret().to_vec(),
            csr: csr.clone(),
            node_name: node.name.to_owned(),
            identity: key.map(|key| transcript.prove(key)),
            evidence,
            root: token.root_sha256().to_vec(),
        };
        (MsgType::JOIN_REQUEST, request.encode_to_vec())
    };
    let asked = ask_admission(head, token.root_sha256(), request, tls).await;
    let (issued, said_at) = asked.map_err(|error| match error {
        JoinError::Connect(ConnectError::PeerNotTrusted { address, .. }) if !verifier.matched() => {
            JoinError::ForeignMesh {
                address,
                pinned: *token.root_sha256(),
                presented: verifier.foreign(),
            }
        }
        error => error,
    })?;
    let root = issued
        .certificates
        .iter()
        .skip(1)
        .last()
        .map(|root| sha256(root));
    if root.as_ref() != Some(token.root_sha256()) {
        let reason = "the root in it is not the token's";
        return Err(JoinError::Answer(reason.to_owned()));
    }
    let identity = NodeIdentity::store(state_dir, applicant, issued, deny_list)?;
    identity.clock().heard(said_at);
    Ok(identity)
}

/// The identity in the state directory. Joins first if there is no usable one, or if the token is for another
/// mesh than the identity's. A token that was used for this directory is not needed again. The head decides
/// whether a certificate is still valid: see [`join_again`].
///
/// # Errors
/// Incomplete files are replaced by a join only: without a token, or with one that the head refuses, the
/// error names them.
pub async fn load_or_join(
    head: &[SocketAddr],
    token: Option<&JoinToken>,
    state_dir: &Path,
    node: impl Into<Newcomer<'_>>,
) -> Result<NodeIdentity, JoinError> {
    let node = node.into();
    let loaded = NodeIdentity::load(state_dir);
    let Some(token) = token else {
        return Ok(loaded?);
    };
    match loaded {
        Ok(identity) if identity.roots().is_of_mesh(token.root_sha256()) => Ok(identity),
        Ok(_) | Err(TrustError::NoIdentity { .. }) => join(head, token, state_dir, node).await,
        Err(identity) => join_again(head, token, state_dir, node)
            .await
            .map_err(|source| JoinError::Unusable {
                identity,
                source: Box::new(source),
            }),
    }
}

/// Joins with a new token where the certificate cannot be used any more. The node stays the same one if its key is whole. If
/// not, it becomes another one once the head has admitted it, and the old files are set aside.
pub async fn join_again(
    head: &[SocketAddr],
    token: &JoinToken,
    state_dir: &Path,
    node: impl Into<Newcomer<'_>>,
) -> Result<NodeIdentity, JoinError> {
    let node = node.into();
    match NodeKey::load(state_dir) {
        Ok(Some(_)) => return join(head, token, state_dir, node).await,
        Ok(None) | Err(TrustError::Damaged { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    DenyList::open(state_dir)?;
    let joining = state_dir.join(names::JOINING);
    files::create_private_dir(&joining)?;
    let joined = join(head, token, &joining, node).await?;
    let said_at = joined.clock().clone();
    settle(state_dir)?;
    let identity = NodeIdentity::load(state_dir)?;
    identity.clock().adopt(&said_at);
    Ok(identity)
}

/// Completes an interrupted join as another node if the head had admitted it, and removes the files of joins
/// that are not needed any more. Call it when a node starts.
///
/// # Errors
/// If a file cannot be moved.
pub fn settle(state_dir: &Path) -> Result<(), TrustError> {
    let joining = state_dir.join(names::JOINING);
    if !joining.is_dir() {
        return Ok(());
    }
    let has = |name| joining.join(name).exists();
    if has(names::NODE_CERTIFICATE) {
        // While the new key is still there, the old files may be, too.
        if has(names::NODE_KEY)
            && let Some(folder) = set_aside(state_dir)?
        {
            tracing::warn!(
                old = %folder.display(),
                "this node's key was missing or damaged: it has joined as another node, and the old files are set aside"
            );
        }
        move_identity(&joining, state_dir)?;
    } else if NodeIdentity::load(state_dir).is_err() {
        // The key of a join that is tried again.
        return Ok(());
    }
    std::fs::remove_dir_all(&joining).map_err(|error| TrustError::io("remove", &joining, error))
}

/// Exchanges the node's certificate for a fresh one, and takes it into use. A node of an earlier version gets its identity
/// signed by that, and a rotated key takes the place of the old one.
pub async fn renew(head: &[SocketAddr], identity: &NodeIdentity) -> Result<(), JoinError> {
    let renewal = identity.renewal()?;
    let (csr, root) = (renewal.request()?, identity.root_sha256());
    let request = async |session: [u8; 32]| {
        let transcript = Transcript {
            purpose: Purpose::Renew,
            session: &session,
            root: &root,
            request: &csr,
            token: "",
            name: "",
            successor: renewal.successor.as_ref().map(|key| key.node_id()),
            evidence: None,
        };
        let prove = |key: &Arc<IdentityKey>| transcript.prove(key);
        let evidence = match renewal.identity.as_ref().zip(identity.evidence()) {
            Some((key, source)) => Some(vouch(&transcript, key, source).await),
            None => None,
        };
        let request = RenewRequest {
            csr: csr.clone(),
            identity: renewal.identity.as_ref().map(prove),
            successor: renewal.successor.as_ref().map(prove),
            root: root.to_vec(),
            evidence,
        };
        (MsgType::RENEW_REQUEST, request.encode_to_vec())
    };
    let tls = |classical| tls::client(identity, JOIN_PROTOCOL, classical);
    let (issued, said_at) = ask_admission(head, &root, request, tls).await?;
    identity.clock().heard(said_at);
    Ok(identity.install_for(renewal, issued)?)
}

/// Renews the node's certificate whenever two thirds of its life are over. Never returns; run it beside the service.
pub async fn keep_renewed(head: SocketAddr, identity: NodeIdentity) -> std::convert::Infallible {
    loop {
        // The head's time: this machine's own clock may be wrong, and may be set at any moment.
        let now = identity.clock().now();
        expire_roots(&identity).await;
        if !identity.is_renewal_due(now) {
            let due = identity.renew_at().duration_since(now).unwrap_or_default();
            // In small steps: the head's clock may be set, too.
            let _ = tokio::time::timeout(due.min(RENEWAL_CHECK), identity.renewal_wanted()).await;
            continue;
        }
        match renew(&[head], &identity).await {
            Ok(()) => tracing::info!(
                certificate = identity.member().dates(),
                "certificate renewed"
            ),
            Err(error) => tracing::warn!(%error, "certificate not renewed, trying again"),
        }
        // A certificate that is due at once again must not be renewed without a pause.
        if identity.is_renewal_due(identity.clock().now()) {
            tokio::time::sleep(RENEWAL_RETRY).await;
        }
    }
}

/// Drops a former root whose time is over.
pub(super) async fn expire_roots(identity: &NodeIdentity) {
    let (node, now) = (identity.clone(), identity.clock().now());
    let expired = tokio::task::spawn_blocking(move || node.expire_roots(now)).await;
    match expired {
        Ok(Ok(true)) => tracing::info!(
            root = HEXLOWER.encode(&identity.root_sha256()),
            "the former mesh root is not accepted any more"
        ),
        Ok(Ok(false)) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the former root's certificate is not removed"),
        Err(error) => tracing::warn!(%error, "the former root's certificate is not removed"),
    }
}

/// Sends one request to a head's admission; it is made for the session's exported key. Returns the papers in the answer, and
/// when it was given by the head's clock.
async fn ask_admission(
    head: &[SocketAddr],
    root: &[u8; 32],
    request: impl AsyncFnOnce([u8; 32]) -> (MsgType, Vec<u8>),
    tls: impl Fn(bool) -> Result<QuicClientConfig, TrustError>,
) -> Result<(Issued, u64), JoinError> {
    let config = LinkConfig {
        max_message: MAX_EXCHANGE,
        ..LinkConfig::default()
    };
    // Only the handshake is raced: the request may be made once.
    let (tls, config) = (&tls, &config);
    let attempt = |address| async move {
        let carrier = LinkEndpoint::bind(listen::toward(address), None)?;
        let dialled = dial(&carrier, tls(config.classical)?, address, config);
        let connection = within(config.handshake_timeout, address, dialled).await?;
        peer_member(&connection, address, Role::Head)?;
        Ok::<_, ConnectError>((carrier, connection))
    };
    let raced = race(head, attempt).await;
    let (address, (carrier, connection)) = raced.map_err(ConnectError::of_all)?;
    let answer = within(ANSWER_TIMEOUT, address, async {
        let request = request(session_key(&connection, root)?).await;
        let answer = exchange(&connection, request).await;
        connection.close(0u32.into(), b"");
        answer
    })
    .await;
    // The head waits for the close; a moment is enough, and an unreachable head must not hold us.
    let _ = tokio::time::timeout(Duration::from_millis(500), carrier.endpoint.wait_idle()).await;
    let (response, said_at) = answer?;
    let certificates = response.certificates.into_iter();
    let issued = Issued {
        certificates: certificates.map(CertificateDer::from).collect(),
        document: response.identity,
        root: response.root.unwrap_or_default(),
        former: Some(response.former)
            .filter(|former| !former.is_empty())
            .map(CertificateDer::from),
        succession: response.succession,
    };
    Ok((issued, said_at))
}

/// The key that proofs of identities are bound to: only the two ends of this session can compute it.
fn session_key(connection: &Connection, root: &[u8; 32]) -> Result<[u8; 32], TrustError> {
    let mut key = [0; 32];
    let exported = connection.export_keying_material(&mut key, PROOF_LABEL.as_bytes(), root);
    exported.map_err(|error| TrustError::Crypto(format!("the session has no key: {error:?}")))?;
    Ok(key)
}

async fn exchange(
    connection: &Connection,
    (kind, body): (MsgType, Vec<u8>),
) -> Result<(JoinResponse, u64), JoinError> {
    let halves = connection.open_bi().await.map_err(StreamFailure::from)?;
    let mut stream = MsgStream::new(halves, MAX_EXCHANGE);
    stream
        .send(Message::new(kind, 0, timestamp_us(), body))
        .await?;
    stream.finish()?;
    let answer = match stream.recv().await {
        Ok(Some(answer)) => answer,
        Ok(None) => return Err(JoinError::Answer("there is none".to_owned())),
        // The head closes the connection when it does not want to talk at all.
        Err(StreamFailure::Link(Closed::ByPeer { code, text })) => {
            return Err(JoinError::Refused { code, text });
        }
        Err(failure) => return Err(failure.into()),
    };
    match (answer.kind, answer.error_body()) {
        (MsgType::JOIN_RESPONSE, _) => JoinResponse::decode(answer.payload)
            .map(|response| (response, answer.timestamp_us))
            .map_err(|error| JoinError::Answer(error.to_string())),
        (MsgType::ERROR, Some(error)) => {
            let (code, text) = (error.code, error.text.into_owned());
            Err(JoinError::Refused { code, text })
        }
        (kind, _) => Err(JoinError::Answer(format!("it is a {kind}"))),
    }
}

/// First half of an exchange at the head. The time limit is for the whole request, in however many pieces it
/// arrives. The error is for the log.
pub(super) async fn request(connection: &Connection) -> Result<(MsgStream, Message), String> {
    let received = async {
        let halves = connection.accept_bi().await;
        let halves = halves.map_err(|error| error.to_string())?;
        let mut stream = MsgStream::new(halves, MAX_EXCHANGE);
        let received = stream.recv().await.map_err(|error| error.to_string())?;
        Ok((stream, received.ok_or("no request")?))
    };
    match tokio::time::timeout(REQUEST_TIMEOUT, received).await {
        Ok(received) => received,
        Err(_) => {
            let text = "no request in time";
            close(connection, ErrorCode::TIMEOUT, text);
            Err(text.to_owned())
        }
    }
}

/// Second half of the exchange at the head. The error is for the log.
pub(super) async fn answer(
    connection: &Connection,
    (stream, request): (MsgStream, Message),
    admission: Arc<dyn Admission>,
    member: Option<Member>,
    own: &NodeIdentity,
) -> Result<(), String> {
    let named = named_root(&request);
    let root = own.roots().named(&named, SystemTime::now());
    // A root that is unknown here is refused in words.
    let context = root.or_else(|| named.try_into().ok());
    let context = context.unwrap_or_else(|| own.root_sha256());
    let session = session_key(connection, &context).map_err(|error| error.to_string())?;
    let asker = Asker {
        member,
        root: context,
        session,
    };
    let result = decide_and_send(stream, request, admission, asker).await;
    // The answer must arrive before the connection goes: the other side closes.
    let _ = tokio::time::timeout(GOODBYE_TIMEOUT, connection.closed()).await;
    connection.close(0u32.into(), b"");
    result
}

/// The peer of an exchange.
struct Asker {
    /// The contents of its certificate, if it showed one.
    member: Option<Member>,
    /// SHA-256 of the root that the request names.
    root: [u8; 32],
    /// Key that proofs are bound to.
    session: [u8; 32],
}

async fn decide_and_send(
    mut stream: MsgStream,
    request: Message,
    admission: Arc<dyn Admission>,
    asker: Asker,
) -> Result<(), String> {
    let sequence = request.sequence;
    let mesh = admission.mesh();
    let decided = tokio::task::spawn_blocking(move || decide(&*admission, request, &asker));
    let decided = decided
        .await
        .unwrap_or_else(|error| Err(Refusal::Internal(error.to_string())));
    let (answer, result) = match decided {
        Ok(issued) => {
            let certificates = issued.certificates.iter().map(|one| one.to_vec());
            let body = JoinResponse {
                certificates: certificates.collect(),
                mesh,
                root: (!issued.document.is_empty()).then_some(issued.root),
                identity: issued.document,
                former: issued.former.map(|one| one.to_vec()).unwrap_or_default(),
                succession: issued.succession,
            };
            let body = body.encode_to_vec();
            let answer = Message::new(MsgType::JOIN_RESPONSE, sequence, timestamp_us(), body);
            (answer, Ok(()))
        }
        Err(refusal) => {
            let text = refusal.to_string();
            let answer = Message::error(sequence, timestamp_us(), refusal.code(), &text);
            (answer, Err(text))
        }
    };
    // A peer that takes nothing is not waited for.
    let sent = tokio::time::timeout(GOODBYE_TIMEOUT, stream.send(answer)).await;
    sent.map_err(|_| "the answer was not taken".to_owned())?
        .map_err(|error| error.to_string())?;
    stream.finish().map_err(|error| error.to_string())?;
    result
}

/// The digest of the root that a request names; empty in those of earlier versions, and where it cannot be
/// read.
fn named_root(request: &Message) -> Vec<u8> {
    let payload = request.payload.clone();
    match request.kind {
        MsgType::JOIN_REQUEST => JoinRequest::decode(payload).map(|body| body.root),
        MsgType::RENEW_REQUEST => RenewRequest::decode(payload).map(|body| body.root),
        _ => Ok(Vec::new()),
    }
    .unwrap_or_default()
}

/// Blocks: the admission may write to disk.
fn decide(admission: &dyn Admission, request: Message, asker: &Asker) -> Result<Issued, Refusal> {
    let now = SystemTime::now();
    let unreadable =
        |error: prost::DecodeError| Refusal::Invalid(format!("unreadable request: {error}"));
    match request.kind {
        MsgType::JOIN_REQUEST => {
            let body = JoinRequest::decode(request.payload).map_err(unreadable)?;
            let transcript = Transcript {
                purpose: Purpose::Join,
                session: &asker.session,
                root: &asker.root,
                request: &body.csr,
                token: &body.token_id,
                name: &body.node_name,
                successor: None,
                evidence: None,
            };
            let identity = proven(&transcript, body.identity.as_ref())?;
            let evidence = vouched(&transcript, body.evidence.as_ref(), identity.as_ref())?;
            let ask = JoinAsk {
                token_id: &body.token_id,
                token_secret: &body.token_secret,
                request: &body.csr,
                node_name: &body.node_name,
                identity: identity.as_ref(),
                root: asker.root,
                evidence,
            };
            admission.join(&ask, now)
        }
        MsgType::RENEW_REQUEST => {
            let body = RenewRequest::decode(request.payload).map_err(unreadable)?;
            let without = "a renewal needs the certificate that is to be renewed";
            let member = asker.member.as_ref();
            let member = member.ok_or_else(|| Refusal::NotAdmitted(without.to_owned()))?;
            let claimed = body.successor.as_ref();
            let claimed = claimed.map(|proof| PublicKey::from_bytes(&proof.public_key));
            let claimed = claimed.transpose();
            let claimed = claimed.map_err(|error| Refusal::Invalid(error.to_string()))?;
            let transcript = Transcript {
                purpose: Purpose::Renew,
                session: &asker.session,
                root: &asker.root,
                request: &body.csr,
                token: "",
                name: "",
                successor: claimed.map(|key| key.node_id()),
                evidence: None,
            };
            let identity = proven(&transcript, body.identity.as_ref())?;
            let successor = proven(&transcript, body.successor.as_ref())?;
            let evidence = vouched(&transcript, body.evidence.as_ref(), identity.as_ref())?;
            let ask = RenewAsk {
                member,
                request: &body.csr,
                identity: identity.as_ref(),
                successor: successor.as_ref(),
                root: asker.root,
                evidence,
            };
            admission.renew(&ask, now)
        }
        kind => Err(Refusal::Invalid(format!("{kind} is no request to join"))),
    }
}

/// The identity whose possession a peer has proven.
fn proven(
    transcript: &Transcript<'_>,
    proof: Option<&IdentityProof>,
) -> Result<Option<PublicKey>, Refusal> {
    let verified = proof.map(|proof| transcript.verify(proof)).transpose();
    verified.map_err(|error| Refusal::Invalid(error.to_string()))
}

/// Label of the exported key that proofs are bound to; the context is the SHA-256 of the root.
pub(super) const PROOF_LABEL: &str = "hydramesh identity proof";

/// Maximum bytes of a request or answer. Both have up to 11,000, a request 30,000 more with evidence; while the root is
/// rotated, an answer has 24,000.
pub(super) const MAX_EXCHANGE: usize = 64 << 10;

/// Time limit for the head's answer.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Time limit for the request of a connected node, which has it at hand.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// Time limit for a node to read the answer and to close.
pub(super) const GOODBYE_TIMEOUT: Duration = Duration::from_secs(3);

/// Interval of checks whether renewal is due.
const RENEWAL_CHECK: Duration = Duration::from_secs(60);

/// Pause after a renewal that failed.
const RENEWAL_RETRY: Duration = Duration::from_secs(60);
