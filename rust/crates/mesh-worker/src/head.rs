//! The link to the head: joins, connects, says Hello, reports load, takes requests; connects again when the head is gone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use dcf::{ErrorCode, Message, MsgType};
use mesh_net::quic::{self, Link, LinkConfig, MsgStream, StreamFailure, timestamp_us};
use mesh_net::seal::Sealer;
use mesh_net::trust::{JoinToken, NodeIdentity, Role};
use mesh_proto::{Hello, Load, ModelCard, PROTOCOL_VERSION, Ring, Served, Sources, Welcome};
use mesh_service::health::Health;
use mesh_service::shutdown::Shutdown;
use prost::Message as _;
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer;
use crate::backoff::{Backoff, random};
use crate::config::Config;
use crate::error::WorkerError;
use crate::host::Host;
use crate::lan::{HeadPlace, Lan};
use crate::loading::Loading;
use crate::metrics::Counters;

/// The worker's side of its link to the head.
pub(crate) struct HeadLink {
    pub(crate) config: Arc<Config>,
    pub(crate) head: HeadPlace,
    pub(crate) lan: Option<Lan>,
    pub(crate) host: Arc<Host>,
    pub(crate) health: Health,
    pub(crate) loading: Arc<Loading>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) shutdown: Shutdown,
    /// Answers in progress.
    pub(crate) answers: TaskTracker,
    /// Ends the link, when nothing is left to say.
    pub(crate) stop: CancellationToken,
}

/// Loads the identity in the state directory, or joins with the token. `None` means that the head does not answer yet.
pub(crate) async fn identify(
    config: &Config,
    head: &HeadPlace,
) -> Result<Option<NodeIdentity>, WorkerError> {
    let token = read_token(config)?;
    let loaded = NodeIdentity::load(&config.state_dir);
    if loaded.is_err() && token.is_none() {
        return Err(WorkerError::NoToken);
    }
    let same_mesh = |identity: &NodeIdentity| {
        token
            .as_ref()
            .is_none_or(|token| identity.root_sha256() == *token.root_sha256())
    };
    if let Ok(identity) = loaded
        && same_mesh(&identity)
    {
        return Ok(Some(identity));
    }
    let Some(address) = head.resolve().await else {
        tracing::warn!(%head, "the head has no address yet, trying again");
        return Ok(None);
    };
    let name = config.node_name();
    match quic::load_or_join(address, token.as_ref(), &config.state_dir, &name).await {
        Ok(identity) => {
            tracing::info!(node = identity.node_id(), "joined the mesh");
            Ok(Some(identity))
        }
        Err(error) if error.is_transient() => {
            tracing::warn!(%error, "cannot join yet, trying again");
            Ok(None)
        }
        Err(error) => Err(WorkerError::Join {
            head: head.to_string(),
            source: Box::new(error),
        }),
    }
}

impl HeadLink {
    /// Keeps the link up until it is to stop, or until an error that trying again does not help.
    pub(crate) async fn run(self, mut identity: Option<NodeIdentity>) -> Result<(), WorkerError> {
        let mut backoff = Backoff::new();
        while !self.stop.is_cancelled() {
            if identity.is_none() {
                identity = identify(&self.config, &self.head).await?;
            }
            if let Some(identity) = &identity {
                if let Some(port) = self.host.rings().listen(identity)?
                    && let Some(lan) = &self.lan
                {
                    lan.announce(identity, &self.config.node_name(), port);
                }
                let started = Instant::now();
                let reason = match self.session(identity).await {
                    Ok(reason) => reason,
                    Err(failure) => failure,
                };
                self.counters.set_connected(false);
                self.loading.linked(false);
                self.host.rings().unlinked();
                if self.stop.is_cancelled() {
                    break;
                }
                self.health
                    .set_unready(format!("no link to the head at {}: {reason}", self.head));
                tracing::warn!(
                    head = %self.head,
                    reason,
                    "no link to the head, trying again"
                );
                if started.elapsed() > STEADY {
                    backoff.reset();
                }
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.next(random())) => {}
                () = self.stop.cancelled() => {}
            }
        }
        Ok(())
    }

    /// One link from its making to its end, with the reason of that.
    async fn session(&self, identity: &NodeIdentity) -> Result<String, String> {
        let address = self.head.resolve().await.ok_or("it has no address")?;
        if identity.renew_at() <= SystemTime::now() {
            // A node that was switched off for long comes back with an old certificate.
            if let Err(error) = quic::renew(address, identity).await {
                tracing::warn!(%error, "certificate not renewed");
            }
        }
        let connector = quic::Connector::toward(address, identity.clone(), LinkConfig::default())
            .map_err(|error| error.to_string())?;
        let link = connector
            .connect(address, Role::Head)
            .await
            .map_err(|error| error.to_string())?;
        let cards = self.host.cards();
        let (control, welcome) = self.hello(&link, cards.clone()).await?;
        let heartbeats = Heartbeats::new(&link, &welcome).await?;
        tracing::info!(
            head = link.node_name(),
            address = %address,
            mesh = welcome.mesh,
            version = welcome.version,
            "linked to the head"
        );
        self.counters.set_connected(true);
        self.loading.linked(true);
        let renewal = quic::keep_renewed(address, identity.clone());
        tokio::select! {
            reason = self.attend(&link, control, heartbeats, cards) => Ok(reason),
            never = renewal => match never {},
            never = self.host.rings().keep_paths_known(&link) => match never {},
            () = self.stop.cancelled() => {
                let goodbye = connector.shutdown(ErrorCode::OK, "the worker was shut down");
                let _ = tokio::time::timeout(GOODBYE, goodbye).await;
                Ok("this worker stops".to_owned())
            }
        }
    }

    async fn hello(
        &self,
        link: &Link,
        models: Vec<ModelCard>,
    ) -> Result<(MsgStream, Welcome), String> {
        let hello = Hello {
            node_name: self.config.node_name(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            models,
            protocol: PROTOCOL_VERSION,
            reserved_for: self.config.reserved_for.clone(),
            request_revision: mesh_proto::REQUEST_REVISION,
        };
        let exchange = async {
            let mut control = link.open().await?;
            control
                .send(Message::new(
                    MsgType::HELLO,
                    0,
                    timestamp_us(),
                    hello.encode_to_vec(),
                ))
                .await?;
            let answer = control.recv().await?;
            Ok::<_, StreamFailure>((control, answer))
        };
        let answered = tokio::time::timeout(WELCOME_TIMEOUT, exchange).await;
        let (control, answer) = answered
            .map_err(|_| "no welcome in time".to_owned())?
            .map_err(|failure| failure.to_string())?;
        let answer = answer.ok_or("it ended the control stream instead of a welcome")?;
        match (answer.kind, answer.error_body()) {
            (MsgType::WELCOME, _) => {
                let welcome = Welcome::decode(answer.payload).map_err(|error| error.to_string())?;
                Ok((control, welcome))
            }
            (_, Some(error)) => Err(format!("it refused: {}", error.text)),
            (kind, None) => Err(format!("it answered Hello with a {kind}")),
        }
    }

    /// Serves the link until it is over; returns why it is.
    async fn attend(
        &self,
        link: &Link,
        control: MsgStream,
        mut heartbeats: Heartbeats,
        mut cards: Vec<ModelCard>,
    ) -> String {
        let defaults = Arc::new(self.config.sampling.clone());
        let (mut send, mut recv) = control.split();
        let (ring_outbox, mut ring_messages) = tokio::sync::mpsc::unbounded_channel();
        self.host.rings().linked(ring_outbox, link.rtt());
        let mut look = tokio::time::interval(LOAD_INTERVAL);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut reported = None;
        let mut models_reported: Option<(u64, Instant)> = None;
        loop {
            let now_draining = self.shutdown.is_draining();
            tokio::select! {
                accepted = link.accept() => match accepted {
                    Ok(stream) => {
                        self.counters.requests.inc();
                        self.answers.spawn(answer::serve(stream, self.host.clone(), defaults.clone()));
                    }
                    Err(failure) => return failure.to_string(),
                },
                () = self.shutdown.draining(), if !now_draining => {}
                _ = look.tick() => {}
                Some(message) = ring_messages.recv() => {
                    if let Err(failure) = send.send(message).await {
                        return failure.to_string();
                    }
                }
                () = heartbeats.due() => {
                    heartbeats.send(self.host.load_report(now_draining)).await;
                }
                received = recv.recv() => match received {
                    Ok(Some(message)) if message.kind == MsgType::DRAIN || message.kind == MsgType::SHUTDOWN => {
                        tracing::info!(kind = %message.kind, "the head asks this worker to stop");
                        self.shutdown.begin();
                    }
                    Ok(Some(message)) if message.kind == MsgType::RING => match Ring::decode(message.payload) {
                        Ok(ring) => self.host.rings().configure(ring),
                        Err(error) => tracing::warn!(%error, "a Ring that cannot be read"),
                    },
                    Ok(Some(message)) if message.kind == MsgType::SOURCES => match Sources::decode(message.payload) {
                        Ok(sources) => self.host.stored().sources(sources),
                        Err(error) => tracing::warn!(%error, "Sources that cannot be read"),
                    },
                    Ok(Some(message)) => tracing::debug!(kind = %message.kind, "message on the control stream"),
                    Ok(None) => return "it ended the control stream".to_owned(),
                    Err(failure) => return failure.to_string(),
                },
            }
            let load = self.host.load_report(self.shutdown.is_draining());
            if is_news(reported.as_ref(), &load) {
                let message = Message::new(MsgType::LOAD, 0, timestamp_us(), load.encode_to_vec());
                if let Err(failure) = send.send(message).await {
                    return failure.to_string();
                }
                reported = Some((load, Instant::now()));
            }
            let served = self.host.cards();
            if served != cards {
                let body = Served {
                    models: served.clone(),
                };
                let message =
                    Message::new(MsgType::SERVED, 0, timestamp_us(), body.encode_to_vec());
                if let Err(failure) = send.send(message).await {
                    return failure.to_string();
                }
                cards = served;
            }
            let rested = models_reported.is_none_or(|(_, at)| at.elapsed() >= MODELS_INTERVAL);
            let known = models_reported.map(|(version, _)| version);
            if rested && let Some((message, version)) = self.host.stored().report(known) {
                if let Err(failure) = send.send(message).await {
                    return failure.to_string();
                }
                models_reported = Some((version, Instant::now()));
            }
        }
    }
}

/// Whether the head should hear of this: a drain at once, other changes at most four times a second.
fn is_news(reported: Option<&(Load, Instant)>, load: &Load) -> bool {
    let Some((last, at)) = reported else {
        return true;
    };
    let same = Load {
        resident_bytes: last.resident_bytes,
        ..load.clone()
    };
    load.draining != last.draining || (same != *last && at.elapsed() >= LOAD_INTERVAL)
}

/// Sealed heartbeats over UDP.
struct Heartbeats {
    socket: UdpSocket,
    sealer: Sealer,
    interval: tokio::time::Interval,
    sequence: u32,
}

impl Heartbeats {
    async fn new(link: &Link, welcome: &Welcome) -> Result<Self, String> {
        let context = welcome.session.to_be_bytes();
        let key = link
            .export_key("hydramesh heartbeat", &context)
            .map_err(|error| error.to_string())?;
        let port = u16::try_from(welcome.heartbeat_port)
            .map_err(|_| format!("its heartbeat port {} is none", welcome.heartbeat_port))?;
        let target = SocketAddr::new(link.remote_addr().ip(), port);
        let socket = connected_socket(target)
            .await
            .map_err(|error| format!("no socket for heartbeats: {error}"))?;
        let seconds = f64::from(welcome.heartbeat_seconds);
        let every = if (0.1..=60.0).contains(&seconds) {
            Duration::from_secs_f64(seconds)
        } else {
            HEARTBEAT
        };
        let mut interval = tokio::time::interval(every);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        Ok(Heartbeats {
            socket,
            sealer: Sealer::new(&key, welcome.session),
            interval,
            sequence: 0,
        })
    }

    async fn due(&mut self) {
        self.interval.tick().await;
    }

    async fn send(&mut self, load: Load) {
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(1);
        let sealed = self.sealer.seal(
            MsgType::SEALED_HEARTBEAT,
            sequence,
            timestamp_us(),
            &load.encode_to_vec(),
        );
        let sent = match sealed {
            Ok(message) => self
                .socket
                .send(&message.encode_datagram())
                .await
                .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = sent {
            // It may be lost on the way as well; the next one follows.
            tracing::debug!(error, "heartbeat not sent");
        }
    }
}

async fn connected_socket(target: SocketAddr) -> std::io::Result<UdpSocket> {
    let any: IpAddr = match target {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(target).await?;
    Ok(socket)
}

pub(crate) fn read_token(config: &Config) -> Result<Option<JoinToken>, WorkerError> {
    let (text, origin) = match (&config.join_token, &config.join_token_file) {
        (Some(text), _) => (text.clone(), "`join_token`".to_owned()),
        (None, Some(path)) => match std::fs::read_to_string(path) {
            Ok(text) => (text, path.display().to_string()),
            // Tokens are used once; who has joined may have thrown the file away.
            Err(_) if NodeIdentity::load(&config.state_dir).is_ok() => return Ok(None),
            Err(source) => {
                return Err(WorkerError::TokenFile {
                    path: path.clone(),
                    source,
                });
            }
        },
        (None, None) => return Ok(None),
    };
    match text.trim().parse() {
        Ok(token) => Ok(Some(token)),
        Err(error) => Err(WorkerError::Token {
            origin,
            reason: format!("{error}"),
        }),
    }
}

const HEARTBEAT: Duration = Duration::from_secs(2);
const LOAD_INTERVAL: Duration = Duration::from_millis(250);
/// The head hears at most so often of what is held and sought.
const MODELS_INTERVAL: Duration = Duration::from_millis(200);
const WELCOME_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the head has to hear that the worker goes.
const GOODBYE: Duration = Duration::from_millis(500);

/// A link that held this long was no failed attempt.
const STEADY: Duration = Duration::from_secs(2);
