//! Starting and stopping a head.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use arcanum_attestor::Attestor;
use dcf::ErrorCode;
use mesh_audit::store::StoreError;
use mesh_base::allocator;
use mesh_net::quic::{ConnectError, LinkConfig, Listener};
use mesh_net::trust::{Admission, NodeIdentity, TrustError, Validity};
use mesh_net::udp::BatchSocket;
use mesh_service::addresses::{self, Addresses};
use mesh_service::health::Health;
use mesh_service::http::{ServerTls, TlsError};
use mesh_service::metrics::Metrics;
use mesh_service::notify::{self, Heart, Watchdog};
use mesh_service::reload::Report;
use mesh_service::shutdown::{Drained, Shutdown};
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio_util::task::TaskTracker;
use tracing::warn;

use crate::audit::{Recorded, Recorder};
use crate::config::{Config, Unsound};
use crate::front::dcf::{Clients, Door, SessionLimits, Sessions, serve as serve_dcf_clients};
use crate::front::http::{self, ConcurrencyLimit, Keys, KeysError};
use crate::mesh::Mesh;
use crate::metrics::HeadMetrics;
use crate::roots::{Announcer, RootWatch};
use crate::sanctum::{self, Sanctum};
use crate::workers::{bus, links};

/// Starts heads.
#[derive(Debug)]
pub struct Head;

/// A running head.
#[derive(Debug)]
pub struct HeadHandle {
    addresses: Addresses,
    live: Live,
    mesh: Arc<Mesh>,
    shutdown: Shutdown,
    running: JoinHandle<Drained>,
}

/// The settings that a running head can change without a restart.
#[derive(Debug, Clone)]
pub struct Live {
    mesh: Arc<Mesh>,
    keys: Keys,
    tls: Option<ServerTls>,
    identity: NodeIdentity,
}

impl Live {
    /// The keys of the configuration that [`Live::reload`] applies, besides `log_level`.
    pub const KEYS: [&str; 5] = [
        "http.api_keys_file",
        "trusted_networks",
        "unverified_networks",
        "dcf.legacy_workers",
        "dcf.legacy_worker_networks",
    ];

    /// Puts the reloadable keys of `fresh` into effect and reads the files again: API keys, the admin key,
    /// the head's certificate.
    pub fn reload(&self, fresh: &Config, report: &mut Report) {
        let state_dir = &self.mesh.config.state_dir;
        let file = fresh.http.api_keys_file.as_deref();
        // The listening address was judged together with the keys at the start.
        let running = &self.mesh.config.http;
        let guarded = running.listen.ip().to_canonical().is_loopback()
            || running.allow_unauthenticated
            || running.require_key;
        if file.is_none() && !guarded {
            report.applied.retain(|key| key != "http.api_keys_file");
            report.failed.push(format!(
                "http.api_keys_file: this head listens at {}, beyond loopback, and does without keys only after a restart",
                running.listen
            ));
        } else {
            report.step("API keys", self.keys.reload(state_dir, file));
        }
        if let Some(tls) = &self.tls {
            report.step("HTTPS certificate", tls.reload());
        }
        report.step("certificate", self.identity.reload());
        self.mesh.reconfigure(fresh.clone());
    }
}

/// Reasons for which a head does not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] Unsound),
    /// A socket or file.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The mesh's root or the head's identity.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The QUIC port cannot be opened.
    #[error(transparent)]
    Quic(#[from] ConnectError),
    /// The API keys cannot be read.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The certificate for HTTPS cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The audit trail cannot be written.
    #[error(transparent)]
    Audit(#[from] StoreError),
}

impl Head {
    /// Starts a head that stops by [`HeadHandle::shutdown`].
    ///
    /// # Errors
    /// [`StartError`] names what is in the way.
    pub async fn start(config: Config) -> Result<HeadHandle, StartError> {
        let shutdown = Shutdown::manual(config.drain_limit);
        Self::start_with(config, shutdown, Watchdog::start()).await
    }

    /// Starts a head that stops by this shutdown, with its loops watched.
    ///
    /// # Errors
    /// [`StartError`] names what is in the way.
    pub async fn start_with(
        config: Config,
        shutdown: Shutdown,
        watchdog: Watchdog,
    ) -> Result<HeadHandle, StartError> {
        config.check()?;
        let state_dir = config.state_dir.clone();
        mesh_service::files::open_state_dir(&state_dir, &SECRETS)?;
        addresses::remove(&state_dir)?;
        let tls = config.http.tls.open()?;
        let validity = Validity::default();
        let authority = Attestor::open(&state_dir, &config.mesh_name, validity)?;
        let authority = authority.with_approval(config.trust.approval.into());
        let evidence = config.trust.evidence.policy().map_err(Unsound::from)?;
        let authority = Arc::new(authority.with_evidence_policy(evidence));
        let sanctum = open_sanctum(&state_dir, &authority)?;
        let keys = Keys::load(&state_dir, config.http.api_keys_file.as_deref(), sanctum)?
            .required(config.http.require_key);
        let identity = authority.head_identity(&state_dir, "head", SystemTime::now())?;
        let announced = identity.clone();
        let audit = Recorder::start(&config, &identity)?;

        let http_listener = mesh_service::http::bind(config.http.listen).await?;
        let client_socket = Arc::new(BatchSocket::bind(config.dcf.clients)?);
        let worker_socket = Arc::new(BatchSocket::bind(config.dcf.workers)?);
        let admission: Arc<dyn Admission> =
            Arc::new(Recorded::new(authority.clone(), audit.clone()));
        let listen = config.quic.listen;
        let links = LinkConfig {
            classical: config.quic.classical,
            ..LinkConfig::default()
        };
        let quic = Arc::new(Listener::bind(listen, identity, Some(admission), links)?);
        let addresses = Addresses::from([
            ("http".to_owned(), http_listener.local_addr()?),
            ("dcf.clients".to_owned(), client_socket.local_addr()),
            ("dcf.workers".to_owned(), worker_socket.local_addr()),
            ("quic".to_owned(), quic.local_addr()?),
        ]);

        let metrics = Arc::new(Metrics::new("head", env!("CARGO_PKG_VERSION")));
        let head_metrics = metrics.register(HeadMetrics::register);
        let health = Health::starting().watched_by(watchdog.clone());
        let deny_list = authority.deny_list().clone();
        let mesh = Mesh::new(
            config,
            head_metrics,
            health,
            shutdown.clone(),
            deny_list,
            audit,
        )?;
        mesh.tick();

        let answers = TaskTracker::new();
        let mut loops = JoinSet::new();
        let heart = watchdog.register("housekeeping", TICK_LIMIT);
        loops.spawn(tick(mesh.clone(), authority.clone(), heart));
        loops.spawn(mesh.clone().gossip_on(announced.clone()));
        let heartbeats = worker_socket.local_addr().port();
        let admitting = authority.clone();
        loops.spawn(links::serve(
            mesh.clone(),
            admitting,
            quic.clone(),
            heartbeats,
        ));
        loops.spawn(bus::serve(mesh.clone(), worker_socket));
        let sessions = Arc::new(Sessions::new(SessionLimits {
            sessions: mesh.config.dcf.sessions,
            idle: mesh.config.dcf.session_idle,
        }));
        quic.admit_clients(Arc::new(Door {
            keys: keys.clone(),
            sessions: sessions.clone(),
            audit: mesh.audit.clone(),
            udp: client_socket.local_addr(),
        }));
        let concurrency = ConcurrencyLimit::new(mesh.config.http.concurrent_requests);
        let concurrency = Arc::new(concurrency);
        let clients = Clients {
            keys: keys.clone(),
            sessions,
            concurrency: concurrency.clone(),
        };
        let running = answers.clone();
        loops.spawn(serve_dcf_clients(
            mesh.clone(),
            client_socket,
            clients,
            running,
        ));
        let live = Live {
            mesh: mesh.clone(),
            keys: keys.clone(),
            tls: tls.clone(),
            identity: announced.clone(),
        };
        mesh.tell_succession(authority.root().succession(SystemTime::now()));
        let port = addresses["quic"].port();
        let watch = RootWatch {
            mesh: mesh.clone(),
            authority: authority.clone(),
            own: announced.clone(),
            announcer: Announcer::start(&mesh.config, &announced, port),
        };
        loops.spawn(watch.run());
        let own = announced.clone();
        let router = http::router(mesh.clone(), keys, authority, own, concurrency, metrics);
        let connections = mesh.config.http.connections.clone();
        let (stop, limit) = (shutdown.token(), shutdown.limit());
        let api = mesh_service::http::serve(connections, http_listener, tls, router, stop, limit);
        let api = tokio::spawn(api);

        addresses::write(&state_dir, &addresses)?;
        let parts = Parts {
            mesh: mesh.clone(),
            shutdown: shutdown.clone(),
            quic,
            answers,
            api,
            loops,
        };
        let running = tokio::spawn(parts.run());
        Ok(HeadHandle {
            addresses,
            live,
            mesh,
            shutdown,
            running,
        })
    }
}

impl HeadHandle {
    /// Addresses of its listeners: `http`, `dcf.clients`, `dcf.workers`, `quic`.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The settings that can be changed while it runs.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// State of the mesh: workers, requests, rings.
    pub fn mesh(&self) -> &Arc<Mesh> {
        &self.mesh
    }

    /// Stops the head: it takes no new requests, and running ones may finish within the drain limit.
    ///
    /// # Errors
    /// If its main task panicked.
    pub async fn shutdown(self) -> Result<Drained, JoinError> {
        self.shutdown.begin();
        self.wait().await
    }

    /// Waits until it has stopped.
    ///
    /// # Errors
    /// If its main task panicked.
    pub async fn wait(self) -> Result<Drained, JoinError> {
        self.running.await
    }
}

/// Parts of a running head that have to end in order.
struct Parts {
    mesh: Arc<Mesh>,
    shutdown: Shutdown,
    quic: Arc<Listener>,
    answers: TaskTracker,
    api: JoinHandle<io::Result<()>>,
    loops: JoinSet<()>,
}

impl Parts {
    async fn run(mut self) -> Drained {
        self.shutdown.draining().await;
        self.answers.close();
        let api = async {
            match (&mut self.api).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => warn!(%error, "HTTP ended with an error"),
                Err(error) => warn!(%error, "HTTP ended with a panic"),
            }
        };
        let rest = async { tokio::join!(api, self.answers.wait()) };
        let drained = self.shutdown.drain(rest).await;
        if drained == Drained::TimedOut {
            warn!("the drain limit passed: running answers are cut");
        }
        self.mesh.closing.store(true, Ordering::Relaxed);
        let text = "the head is shutting down";
        let goodbye = self.quic.shutdown(ErrorCode::DRAINING, text);
        // Peers that do not answer are not waited for.
        let _ = tokio::time::timeout(GOODBYE, goodbye).await;
        self.api.abort();
        self.loops.shutdown().await;
        let audit = self.mesh.audit.clone();
        if tokio::task::spawn_blocking(move || audit.stop())
            .await
            .is_err()
        {
            warn!("the end of the audit trail was not written");
        }
        drained
    }
}

/// The issuer of curtain tokens, endorsed by the mesh root.
fn open_sanctum(state_dir: &Path, authority: &Attestor) -> Result<Arc<Sanctum>, TrustError> {
    let root = authority.root();
    let endorse = |key: &_| root.endorse(key, sanctum::ROLE, SystemTime::now());
    Sanctum::open(state_dir, root.mesh(), endorse).map(Arc::new)
}

/// The head's main loop: prunes, looks after the queue, keeps `/ready` and systemd's status true.
async fn tick(mesh: Arc<Mesh>, authority: Arc<Attestor>, heart: Heart) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told = String::new();
    let mut trimmed = Instant::now();
    loop {
        ticks.tick().await;
        heart.beat();
        mesh.tick();
        for news in authority.take_evidence_news() {
            mesh.note_evidence(&news);
        }
        if trimmed.elapsed() >= TRIM_EVERY {
            allocator::trim();
            trimmed = Instant::now();
        }
        mesh.audit.look_after();
        let (queued, running) = mesh.in_flight();
        let workers = mesh.with_registry(|registry| registry.len());
        let status = format!("{workers} workers, {running} requests running, {queued} waiting");
        if status != told {
            notify::status(&status);
            told = status;
        }
    }
}

/// Files of the state directory that only the head's user may read.
const SECRETS: [&str; 6] = [
    "root.key",
    "identity.key",
    "node.key",
    "tokens.json",
    "admin.key",
    sanctum::KEY_FILE,
];
const TICK: Duration = Duration::from_millis(50);
const TICK_LIMIT: Duration = Duration::from_secs(10);
const TRIM_EVERY: Duration = Duration::from_secs(2);
const GOODBYE: Duration = Duration::from_secs(2);
