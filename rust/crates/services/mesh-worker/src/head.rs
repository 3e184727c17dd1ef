//! The link to the head: joins, connects, says Hello, reports load, takes requests; connects again when the
//! head is gone.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dcf::{ErrorCode, Message, MsgType};
use mesh_base::backoff::Backoff;
use mesh_base::{clock, listen, random};
use mesh_net::quic::{
    self, Closed, ConnectError, Connector, JoinError, Link, LinkConfig, MsgStream, StreamFailure,
    timestamp_us,
};
use mesh_net::seal::Sealer;
use mesh_net::trust::{
    CERTIFICATE_DATES, DUPLICATE_IDENTITY, EXPELLED, Expulsion, JoinToken, NodeIdentity, Role,
    TrustError,
};
use mesh_proto::{
    Expelled, Hello, Load, ModelCard, PROTOCOL_VERSION, Ring, Served, Sources, Welcome,
};
use mesh_service::files::{self, Readers};
use mesh_service::health::Health;
use mesh_service::shutdown::Shutdown;
use prost::Message as _;
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer;
use crate::config::{Config, host_name};
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
    /// Names this process among those with the same identity.
    pub(crate) instance: u64,
    /// Ends the link, when nothing is left to say.
    pub(crate) stop: CancellationToken,
    /// The identity for other parts of the worker, once there is one.
    pub(crate) known: Arc<OnceLock<NodeIdentity>>,
}

/// Loads the identity in the state directory, or joins with the token. `None` means that the head does not
/// answer yet.
///
/// # Errors
/// If there is neither; if the identity's files are not whole and the token does not mend that; if the head
/// refuses.
pub(crate) async fn identify(
    config: &Config,
    head: &HeadPlace,
) -> Result<Option<NodeIdentity>, WorkerError> {
    let token = read_token(config)?;
    let loaded = NodeIdentity::load(&config.state_dir);
    match (loaded, &token) {
        (Ok(identity), token)
            if token
                .as_ref()
                .is_none_or(|token| identity.root_sha256() == *token.root_sha256()) =>
        {
            return Ok(Some(identity));
        }
        (Ok(_), _) => {}
        (Err(error), None) => return Err(unusable(error)),
        (Err(TrustError::NoIdentity { .. }), _) => {}
        (Err(error), Some(_)) => {
            tracing::warn!(%error, "this worker's identity cannot be used; it tries to join again with its token");
        }
    }
    look_at_token_file(config);
    let addresses = match head.resolve().await {
        Ok(addresses) => addresses,
        Err(reason) => {
            tracing::warn!(%head, reason, "the head has no address yet, trying again");
            return Ok(None);
        }
    };
    let name = config.node_name();
    match quic::load_or_join(&addresses, token.as_ref(), &config.state_dir, &name).await {
        Ok(identity) => {
            tracing::info!(
                node = identity.node_id(),
                name = identity.member().name,
                "joined the mesh"
            );
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

/// Error of a worker that has neither an identity nor a token, or whose identity is damaged.
pub(crate) fn unusable(error: TrustError) -> WorkerError {
    match error {
        TrustError::NoIdentity { .. } => WorkerError::NoToken,
        error => WorkerError::Identity(error),
    }
}

impl HeadLink {
    /// Keeps the link up until shutdown, or until an error that a retry does not help.
    pub(crate) async fn run(self, mut identity: Option<NodeIdentity>) -> Result<(), WorkerError> {
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        // Refusals that trying again soon does not end.
        let mut refusals = 0;
        while !self.stop.is_cancelled() {
            let mut pause = Duration::ZERO;
            if identity.is_none() {
                identity = match identify(&self.config, &self.head).await {
                    Err(error) if error.is_expulsion() => {
                        refusals += 1;
                        pause = refusal_pause(refusals);
                        self.health.set_unready(error.to_string());
                        self.explain(&Standing::Expelled, pause);
                        None
                    }
                    identified => identified?,
                };
            }
            if let Some(identity) = &identity {
                let _ = self.known.set(identity.clone());
                if let Some(port) = self.host.rings().listen(identity)?
                    && let Some(lan) = &self.lan
                {
                    lan.announce(identity, port);
                }
                let started = Instant::now();
                let ended = match self.session(identity).await {
                    Ok(reason) => reason.into(),
                    Err(failure) => failure,
                };
                let reason = ended.reason;
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
                match ended.refusal {
                    Some(refusal) => {
                        refusals += 1;
                        pause = refusal_pause(refusals);
                        self.explain(&refusal, pause);
                    }
                    None => refusals = 0,
                }
            }
            pause = pause.max(backoff.failed(random::fraction()));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.stop.cancelled() => {}
            }
        }
        Ok(())
    }

    /// Tells the operator how to end a refusal.
    fn explain(&self, refusal: &Standing, pause: Duration) {
        let state_dir = self.config.state_dir.display();
        match refusal {
            Standing::Duplicate => tracing::error!(
                %state_dir,
                "this worker's identity is in use on another machine: its state directory is a copy. On one of the two run \
                 `mesh-worker new-identity` and restart it with a new token (`hydramesh token create`)"
            ),
            Standing::Expelled => tracing::error!(
                %state_dir,
                next_try_seconds = pause.as_secs(),
                "this worker was expelled from its mesh: it works for nobody until `hydramesh nodes readmit` at the head"
            ),
        }
    }

    /// One link from its making to its end, with the reason of that.
    async fn session(&self, identity: &NodeIdentity) -> Result<String, Ended> {
        let (address, connector, link) = self.connect(identity).await?;
        self.head.remember(address);
        compare_clocks(identity);
        let cards = self.host.cards();
        let (control, welcome) = self.hello(&link, cards.clone()).await?;
        let heartbeats = Heartbeats::new(&link, &welcome)?;
        tracing::info!(
            head = link.node_name(),
            address = %address,
            mesh = welcome.mesh,
            version = welcome.version,
            name = identity.member().name,
            "linked to the head"
        );
        self.counters.set_connected(true);
        self.loading.linked(true);
        let renewal = quic::keep_renewed(address, identity.clone());
        tokio::select! {
            reason = self.attend(&link, identity, control, heartbeats, cards) => Ok(reason),
            never = renewal => match never {},
            never = self.host.rings().keep_paths_known(&link) => match never {},
            () = self.stop.cancelled() => {
                let goodbye = connector.shutdown(ErrorCode::OK, "the worker was shut down");
                let _ = tokio::time::timeout(GOODBYE, goodbye).await;
                Ok("this worker stops".to_owned())
            }
        }
    }

    /// A link to the head at the first of its addresses that answers. The head judges dates: a certificate
    /// that it refuses, after this machine was switched off for long or either clock was set, is renewed
    /// first.
    async fn connect(
        &self,
        identity: &NodeIdentity,
    ) -> Result<(SocketAddr, Connector, Link), Ended> {
        let addresses = self.head.resolve().await?;
        let config = LinkConfig::default();
        let connect = || Connector::to_any(&addresses, Role::Head, identity, &config);
        match connect().await {
            // Older heads have one code for all refusals.
            Err(ConnectError::Refused { code, text, .. })
                if [CERTIFICATE_DATES, ErrorCode::UNAUTHORIZED].contains(&code) =>
            {
                tracing::info!(reason = text, "renewing the certificate");
                if let Err(error) = quic::renew(&addresses, identity).await {
                    self.join_again(&addresses, identity, &text, error).await?;
                }
                connect().await
            }
            connected => connected,
        }
        .map_err(|error| {
            let refusal = match error {
                ConnectError::Refused { code: EXPELLED, .. } => Some(Standing::Expelled),
                _ => None,
            };
            Ended {
                reason: error.to_string(),
                refusal,
            }
        })
    }

    /// The certificate is of no use and cannot be renewed: a token that the configuration names by now can
    /// mend that. It is read each time, so that a worker which waits takes a new one.
    async fn join_again(
        &self,
        addresses: &[SocketAddr],
        identity: &NodeIdentity,
        refused: &str,
        not_renewed: JoinError,
    ) -> Result<(), Ended> {
        let text = format!("{refused}; certificate not renewed: {not_renewed}");
        if not_renewed.is_expulsion() {
            return Err(Ended {
                reason: not_renewed.to_string(),
                refusal: Some(Standing::Expelled),
            });
        }
        // If this machine or the path to the head fails, a token would be used up for nothing.
        if not_renewed.is_transient() || !matches!(not_renewed, JoinError::Refused { .. }) {
            return Err(text.into());
        }
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY");
        let advice = token_advice(&self.config, credentials.as_deref().map(Path::new));
        let token = match read_token(&self.config) {
            Ok(Some(token)) => token,
            Ok(None) => return Err(format!("{text}{advice}").into()),
            Err(error) => return Err(format!("{text}; {error}{advice}").into()),
        };
        if *token.root_sha256() != identity.root_sha256() {
            let foreign = "the join token is for another mesh: restart the worker to join that one";
            return Err(format!("{text}; {foreign}").into());
        }
        look_at_token_file(&self.config);
        let (state_dir, name) = (&self.config.state_dir, self.config.node_name());
        let joined = quic::join_again(addresses, &token, state_dir, &name).await;
        let joined = joined.and_then(|_| Ok(identity.reload()?));
        match joined {
            Ok(_) => {
                tracing::info!(
                    node = identity.node_id(),
                    "joined again with a new token: the old certificate could not be renewed"
                );
                Ok(())
            }
            Err(error) => Err(Ended {
                refusal: error.is_expulsion().then_some(Standing::Expelled),
                reason: format!("{text}; its join token does not help: {error}{advice}"),
            }),
        }
    }

    async fn hello(
        &self,
        link: &Link,
        models: Vec<ModelCard>,
    ) -> Result<(MsgStream, Welcome), Ended> {
        let hello = Hello {
            node_name: self.config.node_name(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            models,
            protocol: PROTOCOL_VERSION,
            reserved_for: self.config.reserved_for.clone(),
            instance: self.instance,
            host: host_name().unwrap_or_default(),
            addresses: own_addresses(),
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
        let (control, answer) = match answered.map_err(|_| "no welcome in time")? {
            Ok(answered) => answered,
            Err(failure) => return Err(why(link, failure).await),
        };
        let answer = answer.ok_or("it ended the control stream instead of a welcome")?;
        match (answer.kind, answer.error_body()) {
            (MsgType::WELCOME, _) => {
                let welcome = Welcome::decode(answer.payload).map_err(|error| error.to_string())?;
                Ok((control, welcome))
            }
            (_, Some(error)) => Err(Ended {
                reason: format!("it refused: {}", error.text),
                refusal: Standing::of(error.code),
            }),
            (kind, None) => Err(format!("it answered Hello with a {kind}").into()),
        }
    }

    /// Serves the link until it is over; returns why it is.
    async fn attend(
        &self,
        link: &Link,
        identity: &NodeIdentity,
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
                received = recv.recv() => match received.inspect(|message| {
                    if let Some(message) = message {
                        identity.clock().heard(message.timestamp_us);
                    }
                }) {
                    Ok(Some(message)) if message.kind == MsgType::DRAIN || message.kind == MsgType::SHUTDOWN => {
                        tracing::info!(kind = %message.kind, "the head asks this worker to stop");
                        self.shutdown.begin();
                    }
                    Ok(Some(message)) if message.kind == MsgType::RING => match Ring::decode(message.payload) {
                        Ok(ring) => self.host.rings().configure(ring),
                        Err(error) => tracing::warn!(%error, "a Ring that cannot be read"),
                    },
                    Ok(Some(message)) if message.kind == MsgType::SOURCES => match Sources::decode(message.payload) {
                        Ok(sources) => self.host.stored().core().change(|core| core.catalogue.sources_told(sources)),
                        Err(error) => tracing::warn!(%error, "Sources that cannot be read"),
                    },
                    Ok(Some(message)) if message.kind == MsgType::EXPELLED => match Expelled::decode(message.payload) {
                        Ok(list) => take_expelled(identity, list),
                        Err(error) => tracing::warn!(%error, "a list of expelled nodes that cannot be read"),
                    },
                    Ok(Some(message)) if message.kind == MsgType::ERROR => {
                        let text = message.error_body().map(|error| error.text.into_owned());
                        tracing::error!(text, "the head reports a problem with this worker");
                    }
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

/// Returns true if the head should hear of this load now: a drain at once, other changes at most four times a
/// second.
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

/// The head names the expelled nodes. Their links end at once; the list is written beside.
fn take_expelled(identity: &NodeIdentity, list: Expelled) {
    let usable = list
        .nodes
        .into_iter()
        .filter(|node| node.node_id.len() <= 64);
    let nodes = usable.map(|node| {
        let plain = node.name.chars().filter(|c| !c.is_control());
        let expulsion = Expulsion {
            name: plain.take(64).collect(),
            reason: String::new(),
            since: node.since,
        };
        (node.node_id, expulsion)
    });
    if !identity.deny_list().replace(nodes) {
        return;
    }
    let identity = identity.clone();
    tokio::task::spawn_blocking(move || {
        let list = identity.deny_list();
        match list.save() {
            Ok(()) => tracing::info!(
                nodes = list.list().len(),
                "the list of expelled nodes has changed"
            ),
            Err(error) => {
                tracing::warn!(%error, "expelled nodes are forgotten at the next start, until the head names them again")
            }
        }
    });
}

/// A refusal that lasts until an operator does something.
enum Standing {
    /// Another machine has this worker's identity.
    Duplicate,
    /// This worker is no longer part of the mesh.
    Expelled,
}

impl Standing {
    fn of(code: ErrorCode) -> Option<Self> {
        match code {
            DUPLICATE_IDENTITY => Some(Self::Duplicate),
            EXPELLED => Some(Self::Expelled),
            _ => None,
        }
    }
}

/// The reason why there is no link, or no longer one.
struct Ended {
    reason: String,
    refusal: Option<Standing>,
}

impl<T: Into<String>> From<T> for Ended {
    fn from(reason: T) -> Self {
        Ended {
            reason: reason.into(),
            refusal: None,
        }
    }
}

/// The reason why the exchange of Hello and Welcome failed. A stream that was cancelled is often followed by
/// the reason of the link.
async fn why(link: &Link, failure: StreamFailure) -> Ended {
    let text = failure.to_string();
    let closed = match failure {
        StreamFailure::Link(closed) => Some(closed),
        StreamFailure::Cancelled(_) => tokio::time::timeout(GOODBYE, link.closed()).await.ok(),
        _ => None,
    };
    match closed {
        Some(Closed::ByPeer { code, text }) => Ended {
            reason: text,
            refusal: Standing::of(code),
        },
        Some(closed) => closed.to_string().into(),
        None => text.into(),
    }
}

/// The wait of a worker before it asks again after a refusal that lasts, the `times`th time.
fn refusal_pause(times: u32) -> Duration {
    REFUSAL_PAUSE
        .saturating_mul(1 << (times.clamp(1, 8) - 1))
        .min(LONGEST_REFUSAL_PAUSE)
}

/// Warns if this machine's clock and the head's are far apart. The mesh works nevertheless.
fn compare_clocks(identity: &NodeIdentity) {
    let offset = identity.clock().offset();
    if offset.abs() > CLOCK_TOLERANCE.as_secs_f64() {
        tracing::warn!(
            clock = clock::utc(std::time::SystemTime::now()),
            head = clock::utc(identity.clock().now()),
            "this machine's clock is {} by the head's; set the one that is wrong, for example with `timedatectl set-ntp true`",
            clock::offset(offset)
        );
    }
}

/// Addresses of this machine, at which other workers may reach it where they cannot reach it at the one that
/// the head sees.
fn own_addresses() -> Vec<String> {
    // A service that may not use AF_NETLINK cannot list them, and does without.
    let Ok(all) = nix::ifaddrs::getifaddrs() else {
        return Vec::new();
    };
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let storage = interface.address?;
        let v4 = storage
            .as_sockaddr_in()
            .map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| Some(IpAddr::V6(storage.as_sockaddr_in6()?.ip())))
    };
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    };
    let usable = all.filter_map(address).filter(usable);
    usable
        .map(|ip| ip.to_string())
        .take(MOST_ADDRESSES)
        .collect()
}

/// Sealed heartbeats over UDP, from whichever address this machine has at the moment.
struct Heartbeats {
    socket: UdpSocket,
    target: SocketAddr,
    sealer: Sealer,
    interval: tokio::time::Interval,
    sequence: u32,
}

impl Heartbeats {
    fn new(link: &Link, welcome: &Welcome) -> Result<Self, String> {
        let context = welcome.session.to_be_bytes();
        let key = link
            .export_key("hydramesh heartbeat", &context)
            .map_err(|error| error.to_string())?;
        let port = u16::try_from(welcome.heartbeat_port)
            .map_err(|_| format!("its heartbeat port {} is none", welcome.heartbeat_port))?;
        let target = SocketAddr::new(link.remote_addr().ip(), port);
        let socket = unconnected_socket(target)
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
            target,
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
                .send_to(&message.encode_datagram(), self.target)
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

/// A connected socket would keep the address that this machine had at first.
fn unconnected_socket(target: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = listen::udp(listen::toward(target), |_| Ok(()))?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

fn has_never_joined(state_dir: &Path) -> bool {
    let loaded = NodeIdentity::load(state_dir);
    matches!(loaded, Err(TrustError::NoIdentity { .. }))
}

/// Tells of a token that is still to be used and that others can read.
fn look_at_token_file(config: &Config) {
    if let Some(path) = &config.join_token_file {
        files::warn_if_exposed(path, Readers::Group);
    }
}

/// Further advice where the token file is systemd's copy of another one, in `credentials`.
fn token_advice(config: &Config, credentials: Option<&Path>) -> &'static str {
    let path = config.join_token_file.as_deref();
    match (path, credentials) {
        (Some(path), Some(credentials)) if path.starts_with(credentials) => {
            "; systemd copied the token file when this unit started: restart the unit when a new token is there"
        }
        _ => "",
    }
}

pub(crate) fn read_token(config: &Config) -> Result<Option<JoinToken>, WorkerError> {
    let (text, origin) = match (&config.join_token, &config.join_token_file) {
        (Some(text), _) => (text.clone(), "`join_token`".to_owned()),
        (None, Some(path)) => match std::fs::read_to_string(path) {
            Ok(text) => (text, path.display().to_string()),
            // Tokens are used once; after the join their file may be gone. A worker that cannot use its
            // identity is told of that.
            Err(_) if !has_never_joined(&config.state_dir) => return Ok(None),
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

/// Clocks that are further apart are reported.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(60);

/// A head that restarts is back within a second.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A worker that an operator has to help asks again after this time, and then more rarely.
const REFUSAL_PAUSE: Duration = Duration::from_secs(30);
const LONGEST_REFUSAL_PAUSE: Duration = Duration::from_secs(300);

const MOST_ADDRESSES: usize = 8;

const HEARTBEAT: Duration = Duration::from_secs(2);
const LOAD_INTERVAL: Duration = Duration::from_millis(250);
/// Least interval between reports to the head of the models that are held and sought.
const MODELS_INTERVAL: Duration = Duration::from_millis(200);
const WELCOME_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for which the worker waits to tell the head that it goes.
const GOODBYE: Duration = Duration::from_millis(500);

/// A link that held this long was no failed attempt.
const STEADY: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_file_of_systemds_needs_a_restart() {
        let config = |path: &str| Config {
            join_token_file: Some(path.into()),
            ..Config::default()
        };
        let credentials = Path::new("/run/credentials/mesh-worker.service");
        let copied = config("/run/credentials/mesh-worker.service/join-token");
        assert!(token_advice(&copied, Some(credentials)).contains("restart the unit"));
        let own = config("/etc/hydramesh/join-token");
        assert_eq!(token_advice(&own, Some(credentials)), "");
        assert_eq!(token_advice(&own, None), "");
    }

    #[test]
    fn who_is_refused_for_good_asks_rarely() {
        let pauses: Vec<u64> = (1..=6)
            .map(|times| refusal_pause(times).as_secs())
            .collect();
        assert_eq!(pauses, [30, 60, 120, 240, 300, 300]);
    }
}
