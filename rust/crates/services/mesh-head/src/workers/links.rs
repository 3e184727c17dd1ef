//! Workers on their QUIC links: Hello and Welcome, load reports, offers for rings and the state of their
//! parts.

use std::sync::Arc;
use std::time::Duration;

use arcanum_attestor::Attestor;
use bytes::Bytes;
use dcf::{ErrorCode, Message, MsgType};
use mesh_control::registry::WorkerId;
use mesh_net::quic::{Link, Listener, MsgStream, StreamFailure, probe};
use mesh_net::seal::Opener;
use mesh_net::trust::{DUPLICATE_IDENTITY, Refusal, Role};
use mesh_proto::{
    GossipFrame, GossipIdentities, Hello, Load, Models, Offer, PROTOCOL_VERSION, RingState, Served,
    SignedEvidence, Welcome,
};
use prost::{DecodeError, Message as _};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::evidence;
use super::proofs::prove;
use crate::ids;
use crate::mesh::{Mesh, message, timestamp_us};

/// Serves every worker that connects, until the listener is shut down.
pub(crate) async fn serve(
    mesh: Arc<Mesh>,
    authority: Arc<Attestor>,
    listener: Arc<Listener>,
    heartbeat_port: u16,
) {
    while let Some(link) = listener.accept().await {
        let (mesh, authority) = (mesh.clone(), authority.clone());
        tokio::spawn(async move {
            let (name, address) = (link.node_name().to_owned(), link.remote_addr());
            match serve_link(&mesh, &authority, &link, heartbeat_port).await {
                Ok(reason) => {
                    mesh.audit.left(link.node_id(), &name, &reason);
                    info!(worker = name, %address, reason, "worker left");
                }
                Err(error) => {
                    let (from, reason) = (address.to_string(), error.to_string());
                    // Decisions on evidence have a record of their own.
                    if !matches!(error, LinkError::Evidence(_)) {
                        mesh.audit.refused(link.node_id(), &name, &from, &reason);
                    }
                    warn!(worker = name, %address, %error, "worker not taken in");
                    link.close(error.code(), &error.to_string());
                }
            }
        });
    }
}

/// Reasons for which a link does not become a worker.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("a {0} connects here; only workers do")]
    Role(&'static str),
    #[error("no Hello within {} s", HELLO_TIMEOUT.as_secs())]
    Silent,
    #[error("the first message is {0}, not a Hello that can be read")]
    NoHello(MsgType),
    #[error(
        "the worker speaks version {0} of the protocol, this head {PROTOCOL_VERSION}; update the older one"
    )]
    Version(u32),
    #[error(transparent)]
    Stream(#[from] StreamFailure),
    #[error("the session has no key: {0}")]
    Key(String),
    #[error("{0}")]
    Duplicate(String),
    #[error("the worker's earlier process still finishes its answers")]
    StillDraining,
    #[error(transparent)]
    Evidence(#[from] Refusal),
}

impl LinkError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Role(_) => ErrorCode::UNAUTHORIZED,
            Self::Silent => ErrorCode::TIMEOUT,
            Self::NoHello(_) => ErrorCode::INVALID_PAYLOAD,
            Self::Version(_) => ErrorCode::VERSION_MISMATCH,
            Self::Stream(_) | Self::Key(_) => ErrorCode::INTERNAL,
            Self::Duplicate(_) => DUPLICATE_IDENTITY,
            Self::StillDraining => ErrorCode::DRAINING,
            Self::Evidence(refusal) => refusal.code(),
        }
    }
}

/// Serves one worker for as long as its control stream lasts, and says why that ended.
async fn serve_link(
    mesh: &Arc<Mesh>,
    authority: &Arc<Attestor>,
    link: &Link,
    heartbeat_port: u16,
) -> Result<String, LinkError> {
    if link.role() != Role::Worker {
        return Err(LinkError::Role(link.role().as_str()));
    }
    let (mut control, mut hello, said_at) = timeout(HELLO_TIMEOUT, receive_hello(link))
        .await
        .map_err(|_| LinkError::Silent)??;
    if hello.protocol != PROTOCOL_VERSION {
        return Err(LinkError::Version(hello.protocol));
    }
    let admitted = async {
        evidence::judge(authority, link, hello.evidence.take()).await?;
        admit_one(mesh, link, &hello).await
    };
    if let Err(refusal) = admitted.await {
        let text = refusal.to_string();
        let message = Message::error(0, timestamp_us(), refusal.code(), &text);
        // The words that a worker of any version shows, before the link goes.
        if control.send(message).await.is_ok() && control.finish().is_ok() {
            let _ = timeout(REFUSAL_TIMEOUT, link.closed()).await;
        }
        return Err(refusal);
    }
    let session = ids::unique();
    let key = link
        .export_key(HEARTBEAT_LABEL, &session.to_be_bytes())
        .map_err(|error| LinkError::Key(error.to_string()))?;
    let welcome = Welcome {
        mesh: mesh.config.mesh_name.clone(),
        heartbeat_seconds: heartbeat(mesh.config.worker_timeout).as_secs_f32(),
        heartbeat_port: u32::from(heartbeat_port),
        session,
        version: env!("CARGO_PKG_VERSION").into(),
    };
    control.send(message(MsgType::WELCOME, 0, &welcome)).await?;

    let models = hello.models.iter().chain(&hello.image_models);
    let models: Vec<&str> = models.map(|model| model.name.as_str()).collect();
    info!(worker = link.node_name(), node = link.node_id(), address = %link.remote_addr(), ?models, "worker joined");
    let from = link.remote_addr().to_string();
    mesh.audit
        .joined(link.node_id(), link.node_name(), "connected", &from, None);
    mesh.audit.models(
        link.node_id(),
        link.node_name(),
        "serves",
        models.into_iter(),
    );
    let (sender, orders) = mpsc::channel(ORDERS);
    let id = mesh.join(link, hello, sender);
    mesh.clock_heard(id, said_at);
    mesh.sessions.open(session, id, Opener::new(&key, session));
    let prober = tokio::spawn(prove(mesh.clone(), id, link.clone()));
    let probed = tokio::spawn(answer_probes(link.clone()));
    let reason = match follow_control(mesh, authority, (id, link), control, orders).await {
        Ok(()) => "the control stream ended".to_owned(),
        Err(error) => error.to_string(),
    };
    prober.abort();
    probed.abort();
    mesh.sessions.close(session);
    mesh.leave(id);
    mesh.gossip_left(link.node_id());
    // Without its control stream a worker can say nothing any more.
    link.close(ErrorCode::OK, "the control stream ended");
    Ok(reason)
}

/// Refuses a worker whose identity another machine uses that is connected and answers. A worker that comes
/// back, after a crash or from another address, finds its earlier link dead or its own.
async fn admit_one(mesh: &Mesh, link: &Link, hello: &Hello) -> Result<(), LinkError> {
    let Some(rival) = mesh.rival(link.node_id(), hello.instance) else {
        return Ok(());
    };
    if !rival.link.answers(RIVAL_TIMEOUT).await {
        return Ok(());
    }
    if rival.draining {
        return Err(LinkError::StillDraining);
    }
    let text = mesh.refused_duplicate(&rival, link.remote_addr(), &hello.host);
    Err(LinkError::Duplicate(text))
}

async fn receive_hello(link: &Link) -> Result<(MsgStream, Hello, u64), LinkError> {
    let mut control = link.accept().await?;
    control.limit(CONTROL_MESSAGE);
    let message = control.recv().await?.ok_or(LinkError::Silent)?;
    if message.kind != MsgType::HELLO || fields_of(&message.payload) > MOST_FIELDS {
        return Err(LinkError::NoHello(message.kind));
    }
    let hello = Hello::decode(message.payload).map_err(|_| LinkError::NoHello(MsgType::HELLO))?;
    Ok((control, hello, message.timestamp_us))
}

async fn follow_control(
    mesh: &Mesh,
    authority: &Arc<Attestor>,
    (id, link): (WorkerId, &Link),
    control: MsgStream,
    mut orders: mpsc::Receiver<Message>,
) -> Result<(), StreamFailure> {
    let (mut send, mut recv) = control.split();
    recv.limit(CONTROL_MESSAGE);
    let mut judged = tokio::time::Instant::now();
    // Messages that a worker may send in a while; more of them wait, and in the end the worker itself.
    let mut credit = CONTROL_BURST;
    let mut refill = tokio::time::interval(CONTROL_WINDOW);
    refill.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let first = tokio::time::Instant::now() + CLOCK_INTERVAL;
    let mut clock = tokio::time::interval_at(first, CLOCK_INTERVAL);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = refill.tick() => credit = CONTROL_BURST,
            received = recv.recv(), if credit > 0 => {
                let Some(message) = received? else { return Ok(()) };
                credit -= 1;
                if fields_of(&message.payload) > MOST_FIELDS {
                    debug!(kind = %message.kind, "dropped: it has more parts than such a message can have");
                    continue;
                }
                let (kind, bytes) = (message.kind, message.payload.len());
                if kind == MsgType::EVIDENCE {
                    // Each is verified and may be written down.
                    tokio::time::sleep_until(judged + EVIDENCE_INTERVAL).await;
                    judged = tokio::time::Instant::now();
                    let Ok(said) = SignedEvidence::decode(message.payload) else {
                        debug!("evidence that cannot be read");
                        continue;
                    };
                    if let Err(refusal) = evidence::judge(authority, link, Some(said)).await {
                        link.close(refusal.code(), &refusal.to_string());
                        return Ok(());
                    }
                    mesh.audit.message("link", kind, link.node_id(), bytes);
                    continue;
                }
                match take(mesh, (id, link.node_id()), message) {
                    Ok(()) => mesh.audit.message("link", kind, link.node_id(), bytes),
                    Err(error) => debug!(%kind, %error, "a message on a control stream cannot be read"),
                }
            }
            // Its timestamp tells the worker this head's time, by which its certificate is renewed.
            _ = clock.tick() => {
                let message = Message::new(MsgType::HEALTH, 0, timestamp_us(), Bytes::new());
                if let Ok(sent) = timeout(ORDER_TIMEOUT, send.send(message)).await {
                    sent?;
                }
            }
            order = orders.recv() => match order {
                // While it waits here it is not heard either: a worker that leaves its orders unread is gone.
                Some(message) => match timeout(ORDER_TIMEOUT, send.send(message)).await {
                    Ok(sent) => sent?,
                    Err(_) => {
                        warn!("worker dropped: it does not take its orders");
                        return Ok(());
                    }
                },
                // The entry was replaced or pruned.
                None => return Ok(()),
            },
        }
    }
}

/// Takes in a message of a worker.
fn take(mesh: &Mesh, (id, node): (WorkerId, &str), message: Message) -> Result<(), DecodeError> {
    let body = message.payload;
    match message.kind {
        MsgType::LOAD => mesh.report(id, Load::decode(body)?),
        MsgType::OFFER => {
            let mut offer = Offer::decode(body)?;
            let paths = offer
                .profile
                .iter_mut()
                .flat_map(|profile| &mut profile.paths);
            mesh.name_nodes(id, paths.map(|path| &mut path.node_id));
            mesh.offered(id, offer);
        }
        MsgType::RING_STATE => {
            let mut state = RingState::decode(body)?;
            mesh.name_nodes(id, state.suspects.iter_mut().chain(&mut state.severed));
            mesh.ring_state(id, state);
        }
        MsgType::MODELS => {
            let mut models = Models::decode(body)?;
            mesh.name_nodes(id, models.bad.iter_mut().map(|bad| &mut bad.node_id));
            mesh.models_said(id, models);
        }
        MsgType::SERVED => mesh.served(id, Served::decode(body)?),
        MsgType::GOSSIP => mesh.gossip_frame(node, GossipFrame::decode(body)?),
        MsgType::GOSSIP_IDENTITIES => {
            mesh.gossip_identities(node, GossipIdentities::decode(body)?);
        }
        // A newer worker may say more than this head understands.
        other => debug!(kind = %other, "unexpected on a control stream"),
    }
    Ok(())
}

/// Fields at the top of a protobuf message, counted without reading them: an empty part is two bytes there
/// and hundreds in memory.
fn fields_of(mut body: &[u8]) -> usize {
    let mut fields = 0;
    while let Some((key, rest)) = varint(body) {
        fields += 1;
        body = match key & 7 {
            0 => varint(rest).map(|(_, rest)| rest),
            1 => rest.get(8..),
            2 => varint(rest).and_then(|(length, rest)| rest.get(usize::try_from(length).ok()?..)),
            5 => rest.get(4..),
            _ => None,
        }
        .unwrap_or_default();
    }
    fields
}

fn varint(body: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (index, byte) in body.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7F) << (7 * index).min(63);
        if byte & 0x80 == 0 {
            return Some((value, &body[index + 1..]));
        }
    }
    None
}

/// Lets the worker measure its bandwidth to here; nothing else comes on streams of its own. One after the
/// other, so that useless data from a worker is bounded.
async fn answer_probes(link: Link) {
    while let Ok(mut stream) = link.accept().await {
        stream.limit(PROBE_MESSAGE);
        let first = match timeout(HELLO_TIMEOUT, stream.recv()).await {
            Ok(Ok(Some(first))) if first.kind == MsgType::PROBE => first,
            _ => {
                stream.reset(ErrorCode::INVALID_PAYLOAD);
                continue;
            }
        };
        if let Err(error) = probe::answer(&first, stream).await {
            debug!(worker = link.node_name(), %error, "probe not answered");
        }
    }
}

/// Label of the exported key of a session's heartbeats; the context is the session, big-endian.
pub(crate) const HEARTBEAT_LABEL: &str = "hydramesh heartbeat";

/// Interval of a worker's heartbeats: a few may be lost or late before it is pruned for its silence.
fn heartbeat(worker_timeout: Duration) -> Duration {
    Duration::from_secs(2).min(worker_timeout / 4)
}
/// Interval at which a worker is told this head's time.
const CLOCK_INTERVAL: Duration = Duration::from_secs(10);
/// Time that the connected worker has to show that it lives, when another one comes with its identity.
const RIVAL_TIMEOUT: Duration = Duration::from_secs(1);
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Payload bytes of a message on a control stream: the pieces of 64 large models fit.
const CONTROL_MESSAGE: usize = 1 << 20;
/// The same on a stream by which a worker measures its bandwidth.
const PROBE_MESSAGE: usize = 1 << 20;
/// Fields at the top of a message on a control stream.
const MOST_FIELDS: usize = 1024;
/// Messages that are read of a control stream in [`CONTROL_WINDOW`]. A busy worker sends about ten a second.
const CONTROL_BURST: u32 = 100;
const CONTROL_WINDOW: Duration = Duration::from_secs(1);
/// Pause between two evidences of a link; a worker that sends more is read more slowly.
const EVIDENCE_INTERVAL: Duration = Duration::from_secs(1);
/// Orders that wait to be sent to a worker. They come with decisions, not with requests.
const ORDERS: usize = 64;
const ORDER_TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_proto::ModelCard;

    #[test]
    fn fields_are_counted_before_they_take_memory() {
        let hello = Hello {
            node_name: "w".into(),
            models: vec![ModelCard::default(); 5],
            protocol: PROTOCOL_VERSION,
            instance: 7,
            ..Default::default()
        };
        assert_eq!(fields_of(&hello.encode_to_vec()), 8);
        // Two bytes each, which would be hundreds.
        let bomb = [0x1A, 0].repeat(100_000);
        assert_eq!(fields_of(&bomb), 100_000);
        for junk in [&[0xFF; 64][..], &[0x0A, 0xFF, 0xFF, 3], &[7, 1, 2], &[]] {
            assert!(fields_of(junk) <= 2, "{junk:?}");
        }
    }
}
