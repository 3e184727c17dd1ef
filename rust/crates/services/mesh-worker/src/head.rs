//! The link to the head: joins, connects, says Hello, reports load, takes requests; connects again when the
//! head is gone.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dcf::{ErrorCode, Message, MsgType};
use mesh_base::{clock, random};
use mesh_net::quic::{
    self, Closed, ConnectError, Connector, Link, LinkConfig, MsgStream, StreamFailure,
};
use mesh_net::trust::{
    CERTIFICATE_DATES, DUPLICATE_IDENTITY, EXPELLED, EvidenceSource, Expulsion, NodeIdentity, Role,
};
use mesh_proto::{
    Expelled, GossipFrame, GossipIdentities, Hello, ModelCard, PROTOCOL_VERSION, Ring, Served,
    SignedSuccession, Sources, Welcome, part_cards,
};
use mesh_service::health::Health;
use mesh_service::shutdown::Shutdown;
use mesh_worker_core::{Lease, Refusal};
use prost::{DecodeError, Message as _};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer;
use crate::codec::message;
use crate::config::{Config, host_name};
use crate::core::CoreHandle;
use crate::error::WorkerError;
use crate::evidence::NodeEvidence;
use crate::gossip::WorkerGossip;
use crate::heartbeats::Heartbeats;
use crate::host::Host;
use crate::join::{Ended, identify, join_again};
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
    pub(crate) gossip: Arc<WorkerGossip>,
    pub(crate) shutdown: Shutdown,
    pub(crate) answers: TaskTracker,
    /// Names this process among those with the same identity.
    pub(crate) instance: u64,
    /// Ends the link, when nothing is left to say.
    pub(crate) stop: CancellationToken,
    /// What the node states about itself, if it is to.
    pub(crate) evidence: Option<Arc<NodeEvidence>>,
    /// The identity for other parts of the worker, once there is one.
    pub(crate) known: Arc<OnceLock<NodeIdentity>>,
}

impl HeadLink {
    /// Keeps the link up until shutdown, or until an error that a retry does not help.
    pub(crate) async fn run(self, mut identity: Option<NodeIdentity>) -> Result<(), WorkerError> {
        while !self.stop.is_cancelled() {
            let mut refusal = None;
            if identity.is_none() {
                let evidence = self.source();
                let identified =
                    identify(&self.config, &self.head, &self.health, evidence.as_ref()).await;
                identity = match identified {
                    Err(error) if error.is_expulsion() => {
                        refusal = Some(Refusal::Expelled);
                        self.health.set_unready(error.to_string());
                        None
                    }
                    identified => identified?,
                };
            }
            if let Some(identity) = &identity {
                let _ = self.known.set(identity.clone());
                if let Some(evidence) = self.source() {
                    identity.set_evidence(evidence);
                }
                if let Some(port) = self.host.rings.listen(identity)?
                    && let Some(lan) = &self.lan
                {
                    lan.announce(identity, port);
                }
                self.core().with(|core| core.head.tries(Instant::now()));
                let ended = match self.session(identity).await {
                    Ok(reason) => reason.into(),
                    Err(failure) => failure,
                };
                refusal = ended.refusal;
                self.counters.set_connected(false);
                self.loading.linked(false);
                self.host.rings.unlinked();
                self.gossip.unlinked();
                if !self.stop.is_cancelled() {
                    let (head, reason) = (&self.head, ended.reason);
                    self.health
                        .set_unready(format!("no link to the head at {head}: {reason}"));
                    tracing::warn!(%head, reason, "no link to the head, trying again");
                }
            }
            let (now, random) = (Instant::now(), random::fraction());
            let core = self.core();
            let pause = core.change(|core| core.head_lost(refusal, now, random));
            if let Some(refusal) = refusal.filter(|_| !self.stop.is_cancelled()) {
                self.explain(refusal, pause);
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.stop.cancelled() => {}
            }
        }
        Ok(())
    }

    fn source(&self) -> Option<EvidenceSource> {
        self.evidence.as_ref().map(NodeEvidence::source)
    }

    fn core(&self) -> &CoreHandle {
        self.host.stored.core()
    }

    fn explain(&self, refusal: Refusal, pause: Duration) {
        let state_dir = self.config.state_dir.display();
        match refusal {
            Refusal::Duplicate => tracing::error!(
                %state_dir,
                "this worker's identity is in use on another machine: its state directory is a copy. On one of the two run \
                 `mesh-worker new-identity` and restart it with a new token (`hydramesh token create`)"
            ),
            Refusal::Expelled => tracing::error!(
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
        let (control, welcome) = self.hello(&link, identity, cards.clone()).await?;
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
            ended = self.attend(&link, identity, control, heartbeats, cards) => Ok(match ended {
                Ok(()) => "it ended the control stream".to_owned(),
                Err(failure) => failure.to_string(),
            }),
            never = renewal => match never {},
            never = self.host.rings.keep_paths_known(&link) => match never {},
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
        sign_identity(&addresses, identity).await?;
        let connect = || Connector::to_any(&addresses, Role::Head, identity, &config);
        match connect().await {
            // Older heads have one code for all refusals.
            Err(ConnectError::Refused { code, text, .. })
                if [CERTIFICATE_DATES, ErrorCode::UNAUTHORIZED].contains(&code) =>
            {
                tracing::info!(reason = text, "renewing the certificate");
                if let Err(error) = quic::renew(&addresses, identity).await {
                    let evidence = self.source();
                    let evidence = evidence.as_ref();
                    join_again(&self.config, &addresses, identity, &text, error, evidence).await?;
                }
                connect().await
            }
            connected => connected,
        }
        .map_err(|error| {
            let expelled = matches!(error, ConnectError::Refused { code: EXPELLED, .. });
            Ended {
                reason: error.to_string(),
                refusal: expelled.then_some(Refusal::Expelled),
            }
        })
    }

    async fn hello(
        &self,
        link: &Link,
        identity: &NodeIdentity,
        models: Vec<ModelCard>,
    ) -> Result<(MsgStream, Welcome), Ended> {
        if let Some(evidence) = &self.evidence {
            evidence.serves(&models, Instant::now());
        }
        let evidence = quic::report_evidence(link, identity).await;
        let evidence = evidence.map_err(|error| error.to_string())?;
        let (models, image_models) = part_cards(models);
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
            image_models,
            evidence,
        };
        let exchange = async {
            let mut control = link.open().await?;
            control.send(message(MsgType::HELLO, &hello)).await?;
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
                refusal: refusal_of(error.code),
            }),
            (kind, None) => Err(format!("it answered Hello with a {kind}").into()),
        }
    }

    /// Serves the link until the head ends the control stream.
    async fn attend(
        &self,
        link: &Link,
        identity: &NodeIdentity,
        control: MsgStream,
        mut heartbeats: Heartbeats,
        cards: Vec<ModelCard>,
    ) -> Result<(), StreamFailure> {
        let defaults = Arc::new(self.config.sampling.clone());
        let (mut send, mut recv) = control.split();
        let (ring_outbox, mut ring_messages) = tokio::sync::mpsc::unbounded_channel();
        let lease = self.host.rings.linked(ring_outbox, link.rtt(), cards);
        let (reports, mut reported) = tokio::sync::mpsc::unbounded_channel();
        let mut look = tokio::time::interval(LOAD_INTERVAL);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let now_draining = self.shutdown.is_draining();
            tokio::select! {
                accepted = link.accept() => {
                    let stream = accepted?;
                    self.counters.requests.inc();
                    self.answers.spawn(answer::serve(stream, self.host.clone(), defaults.clone()));
                }
                () = self.shutdown.draining(), if !now_draining => {}
                _ = look.tick() => {}
                Some(message) = ring_messages.recv() => send.send(message).await?,
                Some(report) = reported.recv() => send.send(report).await?,
                message = self.gossip.next() => send.send(message).await?,
                () = heartbeats.due() => heartbeats.send(self.host.load_report(now_draining)).await,
                received = recv.recv() => {
                    let Some(message) = received? else {
                        return Ok(());
                    };
                    identity.clock().heard(message.timestamp_us);
                    let kind = message.kind;
                    if let Err(error) = self.take(message, identity, lease) {
                        tracing::warn!(%kind, %error, "a message of the head that cannot be read");
                    }
                }
            }
            for message in self.news() {
                send.send(message).await?;
            }
            self.report_models(link, identity, &reports);
        }
    }

    fn take(
        &self,
        message: Message,
        identity: &NodeIdentity,
        lease: Lease,
    ) -> Result<(), DecodeError> {
        match message.kind {
            MsgType::DRAIN | MsgType::SHUTDOWN => {
                tracing::info!(kind = %message.kind, "the head asks this worker to stop");
                self.shutdown.begin();
            }
            MsgType::RING => {
                let ring = Ring::decode(message.payload)?;
                self.host.rings.configure(lease, ring);
            }
            MsgType::SOURCES => {
                let sources = Sources::decode(message.payload)?;
                self.core().change(|core| core.sources_told(lease, sources));
            }
            MsgType::EXPELLED => {
                let list = Expelled::decode(message.payload)?;
                self.gossip
                    .dismiss(list.nodes.iter().map(|node| node.node_id.as_str()));
                take_expelled(identity, list);
            }
            MsgType::GOSSIP => self.gossip.receive(&GossipFrame::decode(message.payload)?),
            MsgType::GOSSIP_IDENTITIES => {
                let told = GossipIdentities::decode(message.payload)?;
                self.gossip.introduced(identity, &told);
            }
            MsgType::ROOT_SUCCESSION => {
                take_succession(identity, SignedSuccession::decode(message.payload)?);
            }
            MsgType::ERROR => {
                let text = message.error_body().map(|error| error.text.into_owned());
                tracing::error!(text, "the head reports a problem with this worker");
            }
            kind => tracing::debug!(%kind, "message on the control stream"),
        }
        Ok(())
    }

    /// Has this node's evidence sent if its models are others than the head was told. A TPM may take a while
    /// to quote.
    fn report_models(
        &self,
        link: &Link,
        identity: &NodeIdentity,
        reports: &UnboundedSender<Message>,
    ) {
        let evidence = self.evidence.as_ref();
        if !evidence.is_some_and(|known| known.is_due(&self.host.cards(), Instant::now())) {
            return;
        }
        let (link, identity, reports) = (link.clone(), identity.clone(), reports.clone());
        tokio::spawn(async move {
            match quic::report_evidence(&link, &identity).await {
                Ok(signed) => {
                    let message = signed.map(|signed| message(MsgType::EVIDENCE, &signed));
                    // The link may have ended in the meantime.
                    let _ = message.map(|message| reports.send(message));
                }
                Err(error) => tracing::warn!(%error, "the head does not hear of other models"),
            }
        });
    }

    /// Tells all nodes of attacks that this worker sees itself.
    fn report_attacks(&self) {
        let refused = self.host.rings.refused();
        let accused = self.core().with(|core| core.catalogue.take_accused());
        if !refused.is_empty() || !accused.is_empty() {
            self.gossip.report(&refused, &accused);
        }
    }

    fn news(&self) -> Vec<Message> {
        self.report_attacks();
        let now = Instant::now();
        let load = self.host.load_report(self.shutdown.is_draining());
        let cards = self.host.cards();
        let (tells_load, tells_cards, models_due) = self.core().with(|core| {
            let head = &mut core.head;
            let (load, cards) = (head.tells_load(&load, now), head.tells_cards(&cards));
            (load, cards, head.models_due(now))
        });
        let mut news = Vec::new();
        if tells_load {
            news.push(message(MsgType::LOAD, &load));
        }
        if tells_cards {
            let (models, image_models) = part_cards(cards);
            let served = Served {
                models,
                image_models,
            };
            news.push(message(MsgType::SERVED, &served));
        }
        if let Some(known) = models_due
            && let Some((models, version)) = self.host.stored.report(known)
        {
            self.core().with(|core| core.head.models_told(version, now));
            news.push(models);
        }
        news
    }
}

/// The head names the expelled nodes. Their links end at once; the list is written beside.
fn take_expelled(identity: &NodeIdentity, list: Expelled) {
    let nodes = list.nodes.into_iter();
    let nodes = nodes.filter(|node| node.node_id.len() <= 64).map(|node| {
        let plain = node.name.chars().filter(|c| !c.is_control());
        let expulsion = Expulsion {
            name: plain.take(64).collect(),
            since: node.since,
            ..Expulsion::default()
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

/// The head names the successor of the mesh root. Whoever renews the certificate hears of it.
fn take_succession(identity: &NodeIdentity, signed: SignedSuccession) {
    let identity = identity.clone();
    tokio::task::spawn_blocking(move || match identity.learn(&signed) {
        Ok(true) => tracing::info!("the mesh has a new root: this node's certificate is renewed"),
        Ok(false) => {}
        Err(error) => tracing::warn!(%error, "the head names a mesh root that is not accepted"),
    });
}

/// Has the head sign this node's identity, if its certificate is of an earlier version or its key was rotated. Before a link
/// is made: the node has one id as long as that lasts.
async fn sign_identity(addresses: &[SocketAddr], identity: &NodeIdentity) -> Result<(), Ended> {
    if !identity.is_identity_due() {
        return Ok(());
    }
    match quic::renew(addresses, identity).await {
        Ok(()) if identity.is_identity_due() => {
            tracing::info!(
                "the head is of an earlier version: it does not sign this node's identity"
            );
        }
        Ok(()) => {
            tracing::info!(
                node = identity.node_id(),
                "the mesh root has signed this node's identity"
            );
        }
        Err(error) if error.is_expulsion() => {
            return Err(Ended {
                reason: error.to_string(),
                refusal: Some(Refusal::Expelled),
            });
        }
        // The link is made with the present certificate, or fails with its own reason.
        Err(error) => tracing::warn!(%error, "this node's identity is not signed yet"),
    }
    Ok(())
}

fn refusal_of(code: ErrorCode) -> Option<Refusal> {
    match code {
        DUPLICATE_IDENTITY => Some(Refusal::Duplicate),
        EXPELLED => Some(Refusal::Expelled),
        _ => None,
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
            refusal: refusal_of(code),
        },
        Some(closed) => closed.to_string().into(),
        None => text.into(),
    }
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
        let v4 = storage.as_sockaddr_in();
        let v4 = v4.map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| Some(IpAddr::V6(storage.as_sockaddr_in6()?.ip())))
    };
    let usable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    };
    let usable = all.filter_map(address).filter(usable).take(MOST_ADDRESSES);
    usable.map(|ip| ip.to_string()).collect()
}

const CLOCK_TOLERANCE: Duration = Duration::from_secs(60);

const MOST_ADDRESSES: usize = 8;

const LOAD_INTERVAL: Duration = Duration::from_millis(250);
const WELCOME_TIMEOUT: Duration = Duration::from_secs(5);

/// Time for which the worker waits to tell the head that it goes.
const GOODBYE: Duration = Duration::from_millis(500);
