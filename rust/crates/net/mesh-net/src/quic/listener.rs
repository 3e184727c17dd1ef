//! The accepting side of links.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dcf::{ErrorCode, Message, MsgType};
use mesh_base::addresses;
use mesh_base::clock::{self, timestamp_us};
use mesh_base::places::GivenUp;
use mesh_base::sync::lock;
use mesh_base::token_bucket::TokenBucket;
use quinn::{Connection, Incoming, ServerConfig};
use tokio::sync::{Mutex, mpsc};

use super::client::{self, ClientDoor};
use super::config::LinkConfig;
use super::endpoint::LinkEndpoint;
use super::error::{ConnectError, StreamFailure, is_bad_certificate, is_date_alert};
use super::join;
use super::link::{Link, canonical, close, handshake_data, peer_certificate};
use super::refusals::{Refusals, Refused};
use super::rooms::Rooms;
use super::stream::SendHalf;
use super::tls::{self, CLIENT_PROTOCOL, JOIN_PROTOCOL, LINK_PROTOCOL};
use crate::trust::{Admission, CERTIFICATE_DATES, Member, MeshClock, NodeIdentity};

/// Accepts links, and lets new nodes join when it has an [`Admission`].
#[derive(Debug)]
pub struct Listener {
    carrier: LinkEndpoint,
    links: Mutex<mpsc::Receiver<Link>>,
    refusals: Refusals,
    door: Arc<OnceLock<Arc<dyn ClientDoor>>>,
}

impl Listener {
    /// Listens on a UDP address; port 0 takes a free one. Must be called on a tokio runtime.
    ///
    /// With an admission this is a head: nodes join and renew their certificates here, and the head's own certificate is
    /// renewed as well. Without one, only links are accepted.
    pub fn bind(
        address: SocketAddr,
        identity: NodeIdentity,
        admission: Option<Arc<dyn Admission>>,
        config: LinkConfig,
    ) -> Result<Self, ConnectError> {
        let mut server =
            ServerConfig::with_crypto(Arc::new(tls::server(&identity, config.classical)?));
        server
            .transport_config(config.transport_for_strangers())
            .max_incoming(MAX_INCOMING)
            .incoming_buffer_size(INCOMING_BUFFER)
            .incoming_buffer_size_total(INCOMING_BUFFERS);
        let carrier = LinkEndpoint::bind(address, Some(server.clone()))?;
        let (sender, links) = mpsc::channel(BACKLOG);
        let refusals = Refusals::default();
        let door = Arc::new(OnceLock::new());
        let gate = Acceptor {
            carrier: carrier.clone(),
            admission,
            config,
            links: sender,
            clock: identity.clock().clone(),
            own: identity.clone(),
            door: door.clone(),
            rooms: Rooms::new(),
            refusals: refusals.clone(),
            server,
            roots: Arc::new(identity.changes_of_roots().into()),
            news: Arc::new(TokenBucket::full(NEWS, Instant::now()).into()),
        };
        tokio::spawn(gate.clone().run());
        if let Some(admission) = gate.admission {
            tokio::spawn(renew_own(identity, admission, carrier.endpoint.clone()));
        }
        Ok(Self {
            carrier,
            links: Mutex::new(links),
            refusals,
            door,
        })
    }

    /// Opens sessions for clients from now on, as `door` decides. Only the first call counts.
    pub fn admit_clients(&self, door: Arc<dyn ClientDoor>) {
        let _ = self.door.set(door);
    }

    /// The address that the listener is bound to.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.carrier.endpoint.local_addr()
    }

    /// Peers that are turned away here.
    pub fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    /// The next link that was authenticated and admitted; `None` after [`shutdown`](Self::shutdown).
    pub async fn accept(&self) -> Option<Link> {
        self.links.lock().await.recv().await
    }

    /// Closes all links and waits until the peers know.
    pub async fn shutdown(&self, code: ErrorCode, text: &str) {
        self.carrier.shutdown(code, text).await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Links that were handed out live on.
        self.carrier.endpoint.set_server_config(None);
    }
}

/// Takes connections through handshake and admission.
#[derive(Clone)]
struct Acceptor {
    carrier: LinkEndpoint,
    admission: Option<Arc<dyn Admission>>,
    config: LinkConfig,
    links: mpsc::Sender<Link>,
    clock: MeshClock,
    own: NodeIdentity,
    door: Arc<OnceLock<Arc<dyn ClientDoor>>>,
    rooms: Rooms,
    refusals: Refusals,
    /// As it was bound; addresses that were validated under it stay so.
    server: ServerConfig,
    /// The roots that handshakes name, by [`NodeIdentity::changes_of_roots`].
    roots: Arc<AtomicU64>,
    /// Keeps a flood of strangers from filling the log.
    news: Arc<std::sync::Mutex<TokenBucket>>,
}

impl Acceptor {
    async fn run(self) {
        loop {
            let incoming = tokio::select! {
                incoming = self.carrier.endpoint.accept() => incoming,
                () = self.links.closed() => None,
            };
            let Some(incoming) = incoming else { return };
            // A forged source address gets a Retry packet, smaller than what it sent, and costs no state.
            if !incoming.remote_address_validated() && incoming.may_retry() {
                if let Err(error) = incoming.retry() {
                    tracing::debug!(%error, "retry packet not sent");
                }
                continue;
            }
            self.follow_roots();
            let source = addresses::source(incoming.remote_address().ip());
            if !self.rooms.may_begin(source, Instant::now()) {
                incoming.ignore();
                self.refusals.note(Refused::Rate { source });
                continue;
            }
            let gate = self.clone();
            tokio::spawn(async move {
                let address = canonical(incoming.remote_address());
                if let Err(reason) = gate.enter(incoming, source).await {
                    let is_news = lock(&gate.news).take(NEWS, NEWS, Instant::now());
                    match is_news {
                        true => tracing::info!(%address, reason, "connection not admitted"),
                        false => tracing::debug!(%address, reason, "connection not admitted"),
                    }
                }
            });
        }
    }

    /// Names the present roots in the handshakes from here on, if they have changed.
    fn follow_roots(&self) {
        let changes = self.own.changes_of_roots();
        if self.roots.swap(changes, Ordering::Relaxed) == changes {
            return;
        }
        match tls::server(&self.own, self.config.classical) {
            Ok(crypto) => {
                let mut server = self.server.clone();
                server.crypto = Arc::new(crypto);
                self.carrier.endpoint.set_server_config(Some(server));
            }
            Err(error) => tracing::error!(%error, "handshakes name the former roots"),
        }
    }

    /// The error is for our log; the peer has been told already.
    async fn enter(&self, incoming: Incoming, source: IpAddr) -> Result<(), String> {
        let limit = self.config.handshake_timeout;
        let handshake = async { incoming.accept()?.await };
        let connection = self
            .rooms
            .for_handshake(source)
            .hold(source, tokio::time::timeout(limit, handshake))
            .await
            .map_err(|GivenUp| "its handshake took longer than those of others".to_owned())?
            .map_err(|_| "handshake took too long".to_owned())?
            .map_err(|error| self.handshake_failed(&error, source))?;
        let protocol = handshake_data(&connection)
            .and_then(|data| data.protocol)
            .unwrap_or_default();
        let member = peer_certificate(&connection)
            .map(|certificate| Member::from_certificate(&certificate))
            .transpose()
            .map_err(|error| unauthorized(&connection, error.to_string()))?;
        let crowded = |GivenUp| {
            let text = "others need the room: too many connections wait here; try again";
            refuse(&connection, ErrorCode::RATE_LIMITED, text)
        };
        let refusal = match (protocol.as_slice(), &self.admission, member) {
            (LINK_PROTOCOL, _, Some(member)) => {
                let node = member.node_id.clone();
                let admitted = tokio::time::timeout(limit, self.admit(&connection, member));
                let held = self.rooms.entering.hold(node, admitted).await;
                let link = held
                    .map_err(crowded)?
                    .map_err(|_| unauthorized(&connection, "admission took too long"))??;
                self.rooms.came_in(source, Instant::now());
                match self.links.send(link).await {
                    Ok(()) => return Ok(()),
                    Err(_) => "shutting down",
                }
            }
            (LINK_PROTOCOL, _, None) => {
                self.refusals.note(Refused::Certificate { source });
                "a node needs a certificate of this mesh; join with a token first"
            }
            (JOIN_PROTOCOL, Some(admission), None) => {
                let request = join::request(&connection);
                let held = self.rooms.joining.hold(source, request).await;
                let request = held.map_err(crowded)??;
                // What it asks for happens once: those that have asked are not in the way of those that have not.
                let answer = join::answer(&connection, request, admission.clone(), None, &self.own);
                let held = self.rooms.answering.hold(source, answer).await;
                return held.map_err(crowded)?;
            }
            (JOIN_PROTOCOL, Some(admission), Some(member)) => {
                let (node, admission) = (member.node_id.clone(), admission.clone());
                let exchange = async {
                    let request = join::request(&connection).await?;
                    join::answer(&connection, request, admission, Some(member), &self.own).await
                };
                let held = self.rooms.renewing.hold(node, exchange).await;
                return held.map_err(crowded)?;
            }
            (CLIENT_PROTOCOL, _, _) => match self.door.get() {
                Some(door) => {
                    let session = client::answer(&connection, door.clone());
                    let held = self.rooms.clients.hold(source, session).await;
                    return held.map_err(crowded)?;
                }
                None => "this node serves no clients; ask the head of the mesh",
            },
            (JOIN_PROTOCOL, None, _) => "this node admits nobody; join at the head",
            // rustls has no other protocol to agree on.
            _ => "unknown protocol",
        };
        Err(unauthorized(&connection, refusal))
    }

    /// A peer of an older version judges our certificate by its own clock, and says so by an alert.
    fn handshake_failed(&self, error: &quinn::ConnectionError, source: IpAddr) -> String {
        if is_bad_certificate(error) {
            self.refusals.note(Refused::Certificate { source });
        }
        if is_date_alert(error) {
            return format!(
                "it does not accept the certificate of this node ({}) because of its dates: its clock is wrong; set it, for example with `timedatectl set-ntp true`",
                self.own.member().dates()
            );
        }
        error.to_string()
    }

    /// Creates a link if the node is admitted, and informs the peer of the decision.
    async fn admit(&self, connection: &Connection, member: Member) -> Result<Link, String> {
        let now = self.clock.now();
        if let Some(refusal) = self.own.deny_list().refusal_of(&member) {
            let (node_id, name) = (member.node_id, member.name);
            self.refusals.note(Refused::Expelled { node_id, name });
            return Err(refuse(connection, refusal.code(), refusal.to_string()));
        }
        if !member.is_valid_at(now) {
            let text = format!(
                "the certificate of `{}` is {}, and the clock here says {}: it has to be renewed at the head; if that date is wrong, set the clock of this machine",
                member.name,
                member.dates(),
                clock::utc(now)
            );
            return Err(refuse(connection, CERTIFICATE_DATES, text));
        }
        if let Some(admission) = self.admission.clone() {
            let asked = member.clone();
            let verdict = tokio::task::spawn_blocking(move || admission.connect(&asked, now)).await;
            match verdict {
                Ok(Ok(())) => {}
                Ok(Err(refusal)) => {
                    return Err(refuse(connection, refusal.code(), refusal.to_string()));
                }
                Err(error) => {
                    return Err(unauthorized(
                        connection,
                        format!("admission failed: {error}"),
                    ));
                }
            }
        }
        let link = Link::new(connection.clone(), member, self.config.max_message);
        if self.carrier.links_of(link.node_id()) >= MAX_LINKS {
            let text = format!("{MAX_LINKS} links of this node are open here; close some first");
            return Err(refuse(connection, ErrorCode::RATE_LIMITED, text));
        }
        self.config.open_windows(connection);
        self.welcome(connection)
            .await
            .map_err(|error| error.to_string())?;
        self.carrier.watch(&link);
        link.guarded_by(self.own.deny_list());
        Ok(link)
    }

    async fn welcome(&self, connection: &Connection) -> Result<(), StreamFailure> {
        let mut stream = SendHalf::new(connection.open_uni().await?, self.config.max_message);
        stream
            .send(Message::new(MsgType::ACK, 0, timestamp_us(), Vec::new()))
            .await?;
        stream.finish()
    }
}

/// Closes the connection; returns the text, for our log.
fn refuse(connection: &Connection, code: ErrorCode, text: impl Into<String>) -> String {
    let text = text.into();
    close(connection, code, &text);
    text
}

fn unauthorized(connection: &Connection, text: impl Into<String>) -> String {
    refuse(connection, ErrorCode::UNAUTHORIZED, text)
}

/// Keeps the certificate of the listening node itself fresh; it has the admission at hand.
async fn renew_own(
    identity: NodeIdentity,
    admission: Arc<dyn Admission>,
    endpoint: quinn::Endpoint,
) {
    // `wait_idle` does not show the end; the endpoint's address does, once its driver has stopped.
    while endpoint.local_addr().is_ok() {
        let now = identity.clock().now();
        join::expire_roots(&identity).await;
        if identity.is_renewal_due(now) {
            if !identity.member().is_valid_at(now) {
                tracing::warn!(
                    certificate = identity.member().dates(),
                    clock = clock::utc(now),
                    "this node's certificate does not hold now: its clock was set"
                );
            }
            let (identity, admission) = (identity.clone(), admission.clone());
            let renewed = tokio::task::spawn_blocking(move || identity.renew_by(&*admission, now));
            match renewed.await {
                Ok(Ok(())) => tracing::info!("renewed this node's own certificate"),
                Ok(Err(error)) => tracing::error!(%error, "own certificate not renewed"),
                Err(error) => tracing::error!(%error, "own certificate not renewed"),
            }
        }
        let _ = tokio::time::timeout(OWN_RENEWAL_CHECK, identity.renewal_wanted()).await;
    }
}

/// Admitted links that wait for [`Listener::accept`].
const BACKLOG: usize = 64;

/// Links of one node at once. A worker has one to its head and a few to each of its neighbours; those of an earlier process end within
/// [`LinkConfig::idle_timeout`].
const MAX_LINKS: usize = 64;

/// Lines of log about connections that were not admitted, for each second.
const NEWS: f64 = 5.0;

/// Connections whose first packet waits to be looked at, and bytes that may come for one and for all of them meanwhile.
const MAX_INCOMING: usize = 1024;
const INCOMING_BUFFER: u64 = 16 << 10;
const INCOMING_BUFFERS: u64 = 2 << 20;

/// A clock that was set is noticed after this time.
const OWN_RENEWAL_CHECK: Duration = Duration::from_secs(10);
