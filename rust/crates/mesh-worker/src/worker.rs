//! The running worker: its sockets, its models, its tasks, and how all of it ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_net::trust::NodeIdentity;
use mesh_service::addresses::{self, Addresses};
use mesh_service::health::{self, Health};
use mesh_service::http;
use mesh_service::metrics::Metrics;
use mesh_service::notify::{self, Heart, Watchdog};
use mesh_service::shutdown::{Drained, Shutdown};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::error::WorkerError;
use crate::head::{HeadLink, identify};
use crate::host::Host;
use crate::lan::{HeadPlace, Lan};
use crate::legacy::PlainDcf;
use crate::loading::Loading;
use crate::metrics::{Counters, EngineCollector};
use crate::models::Models;
use crate::templates::Templates;

/// Starts workers.
pub struct Worker;

/// A running worker.
pub struct WorkerHandle {
    addresses: Addresses,
    shutdown: Shutdown,
    task: JoinHandle<Result<(), WorkerError>>,
}

impl Worker {
    /// Starts a worker that [`WorkerHandle::shutdown`] stops. Returns when its models are loaded and have answered once;
    /// the link to the head is made, and made again, in the background.
    pub async fn start(config: Config) -> Result<WorkerHandle, WorkerError> {
        let shutdown = Shutdown::manual(config.drain_limit);
        Self::start_with(config, Templates::here(), shutdown).await
    }

    /// As [`start`](Self::start), with chat templates run elsewhere, and with a shutdown that others may begin, too.
    pub async fn start_with(
        config: Config,
        templates: Templates,
        shutdown: Shutdown,
    ) -> Result<WorkerHandle, WorkerError> {
        let started = Instant::now();
        config.check()?;
        let config = Arc::new(config);
        let state_dir = |source| WorkerError::StateDir {
            path: config.state_dir.clone(),
            source,
        };
        std::fs::create_dir_all(&config.state_dir).map_err(state_dir)?;
        addresses::remove(&config.state_dir).map_err(state_dir)?;

        let sockets = Sockets::bind(&config).await?;
        let watchdog = Watchdog::start();
        let health = Health::starting().watched_by(watchdog.clone());
        let metrics = Arc::new(Metrics::new("worker", env!("CARGO_PKG_VERSION")));
        let counters = Arc::new(Counters::default());
        metrics.register(|registry| counters.register(registry));
        let router = health::router(health.clone(), metrics.clone());
        let stop = CancellationToken::new();
        let bound = sockets.addresses.clone();
        tokio::spawn(http::serve(
            sockets.http,
            router,
            stop.clone(),
            Duration::from_secs(1),
        ));
        addresses::write(&config.state_dir, &bound).map_err(state_dir)?;
        tracing::info!(http = %bound["http"], dcf = %bound["dcf"], "listening");

        let models = Models::open(&config)?;
        metrics.register(|registry| models.register(registry));
        check_cheaply(&config, &models)?;
        let lan = Lan::start(&config)?;
        if let Some(lan) = &lan {
            models.search(lan.found());
        }
        let head = match (&config.head, &lan) {
            (Some(head), _) => Some(HeadPlace::At(head.clone())),
            (None, Some(lan)) => Some(HeadPlace::Lan(lan.clone())),
            (None, None) => None,
        };
        let ((host, failures), identity) = {
            let identity = async {
                match &head {
                    Some(head) => identify(&config, head).await,
                    None => Ok(None),
                }
            };
            tokio::pin!(identity);
            // A token that is refused is found out before gigabytes are read. A head that does not answer is not waited for.
            let joined = tokio::time::timeout(JOIN_FIRST, &mut identity).await;
            let joined = joined.ok().transpose()?;
            let loading = {
                let config = config.clone();
                tokio::task::spawn_blocking(move || Host::load(&config, models, templates))
            };
            let loading = async {
                let loaded = loading.await;
                loaded.map_err(|error| WorkerError::Internal(error.to_string()))?
            };
            match joined {
                Some(identity) => (loading.await?, identity),
                None => tokio::try_join!(loading, identity)?,
            }
        };
        let host = Arc::new(host);
        metrics.register(|registry| {
            registry.register_collector(Box::new(EngineCollector(host.clone())))
        });
        let loading = Loading::begin(&config, &host, &health, failures);
        notify::ready();
        tracing::info!(seconds = started.elapsed().as_secs_f64(), "ready to work");

        let running = Running {
            heart: watchdog.register("housekeeping", STUCK),
            answers: TaskTracker::new(),
            dcf: Arc::new(sockets.dcf),
            config,
            head,
            lan,
            host,
            health,
            loading,
            counters,
            shutdown: shutdown.clone(),
            stop,
        };
        let task = tokio::spawn(running.run(identity));
        Ok(WorkerHandle {
            addresses: bound,
            shutdown,
            task,
        })
    }
}

impl WorkerHandle {
    /// The bound addresses: `http` and `dcf`.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Drains and stops the worker; running answers finish within the configured limit.
    pub async fn shutdown(self) -> Result<(), WorkerError> {
        self.shutdown.begin();
        self.wait().await
    }

    /// Resolves when the worker has ended: without an error if it was told to.
    pub async fn wait(self) -> Result<(), WorkerError> {
        self.task
            .await
            .unwrap_or_else(|error| Err(WorkerError::Internal(error.to_string())))
    }
}

/// What can be found out without reading a model, and would end the worker after it has read them.
fn check_cheaply(config: &Config, models: &Models) -> Result<(), WorkerError> {
    crate::host::find(config)?;
    mesh_engine_ort::load_library(config.ort_library.as_deref()).map_err(WorkerError::Runtime)?;
    if !config.shards.is_empty() || models.is_sharing() {
        let address = config.ring.listen;
        std::net::UdpSocket::bind(address).map_err(|source| WorkerError::Listen {
            address,
            carrier: "udp",
            key: "ring.listen",
            source,
        })?;
    }
    Ok(())
}

struct Sockets {
    http: TcpListener,
    dcf: UdpSocket,
    addresses: Addresses,
}

impl Sockets {
    async fn bind(config: &Config) -> Result<Self, WorkerError> {
        let listen = |address: SocketAddr, carrier, key| {
            move |source| WorkerError::Listen {
                address,
                carrier,
                key,
                source,
            }
        };
        let tcp = listen(config.http.listen, "tcp", "http.listen");
        let udp = listen(config.dcf.listen, "udp", "dcf.listen");
        let http = TcpListener::bind(config.http.listen).await.map_err(tcp)?;
        let dcf = UdpSocket::bind(config.dcf.listen).await.map_err(udp)?;
        let addresses = Addresses::from([
            ("http".to_owned(), http.local_addr().map_err(tcp)?),
            ("dcf".to_owned(), dcf.local_addr().map_err(udp)?),
        ]);
        Ok(Sockets {
            http,
            dcf,
            addresses,
        })
    }
}

/// A worker whose models are loaded.
struct Running {
    config: Arc<Config>,
    head: Option<HeadPlace>,
    lan: Option<Lan>,
    host: Arc<Host>,
    dcf: Arc<UdpSocket>,
    health: Health,
    loading: Arc<Loading>,
    counters: Arc<Counters>,
    shutdown: Shutdown,
    answers: TaskTracker,
    /// Ends what outlives the drain.
    stop: CancellationToken,
    heart: Heart,
}

impl Running {
    async fn run(self, identity: Option<NodeIdentity>) -> Result<(), WorkerError> {
        let plain = tokio::spawn(self.plain_dcf().run());
        let mut link = tokio::spawn(self.head_link(identity));
        let worked = tokio::select! {
            worked = self.work(&mut link) => worked,
            () = self.drain() => Ok(()),
        };
        self.stop.cancel();
        if !link.is_finished() {
            // It says goodbye to the head.
            let _ = tokio::time::timeout(GOODBYE, &mut link).await;
        }
        link.abort();
        plain.abort();
        worked
    }

    /// Turns until something breaks that only a restart repairs.
    async fn work(
        &self,
        link: &mut JoinHandle<Result<(), WorkerError>>,
    ) -> Result<(), WorkerError> {
        let mut tick = tokio::time::interval(HOUSEKEEPING);
        let mut progress = Progress::default();
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    self.loading.look_after(&self.config);
                    // A stage that hangs must not be vouched for.
                    if progress.is_made(&self.host, Instant::now()) {
                        self.heart.beat();
                    }
                }
                ended = &mut *link, if self.head.is_some() => {
                    return ended.unwrap_or_else(|error| Err(WorkerError::Internal(error.to_string())));
                }
            }
        }
    }

    /// Once the drain begins: takes nothing new and lets what runs finish, up to the limit.
    async fn drain(&self) {
        self.shutdown.draining().await;
        self.health.set_unready("shutting down");
        notify::status("draining");
        let finished = async {
            self.host.drain().await;
            self.answers.close();
            self.answers.wait().await;
        };
        match self.shutdown.drain(finished).await {
            Drained::Finished => tracing::info!("all answers finished"),
            Drained::TimedOut => tracing::warn!(
                answers = self.answers.len(),
                rings = self.host.rings().shared(),
                limit_seconds = self.shutdown.limit().as_secs_f64(),
                "what still runs at the end of the drain is cut: answers, and parts of rings that nobody has taken over"
            ),
        }
    }

    fn plain_dcf(&self) -> PlainDcf {
        PlainDcf {
            socket: self.dcf.clone(),
            config: self.config.clone(),
            host: self.host.clone(),
            counters: self.counters.clone(),
            answers: self.answers.clone(),
        }
    }

    fn head_link(
        &self,
        identity: Option<NodeIdentity>,
    ) -> impl Future<Output = Result<(), WorkerError>> + use<> {
        let Some(head) = self.head.clone() else {
            // A v5.0.0 head is served without a link.
            self.loading.linked(true);
            return futures::future::Either::Left(std::future::ready(Ok(())));
        };
        self.health.set_unready("no link to the head yet");
        let link = HeadLink {
            config: self.config.clone(),
            head,
            lan: self.lan.clone(),
            host: self.host.clone(),
            health: self.health.clone(),
            loading: self.loading.clone(),
            counters: self.counters.clone(),
            shutdown: self.shutdown.clone(),
            answers: self.answers.clone(),
            stop: self.stop.clone(),
        };
        futures::future::Either::Right(link.run(identity))
    }
}

/// Whether the engines get on with what they have to do.
#[derive(Default)]
struct Progress {
    steps: u64,
    since: Option<Instant>,
}

impl Progress {
    fn is_made(&mut self, host: &Host, now: Instant) -> bool {
        let (models, encoders) = (host.models(), host.encoders());
        let engines = models.iter().map(|hosted| hosted.engine.load());
        let encoders = encoders.iter().map(|hosted| hosted.engine.load());
        let loads: Vec<_> = engines.chain(encoders).collect();
        let steps = loads.iter().map(|load| load.totals.steps).sum();
        let busy = loads
            .iter()
            .any(|load| load.running > 0 || load.prefill_backlog > 0);
        if steps != self.steps || !busy {
            (self.steps, self.since) = (steps, Some(now));
        }
        self.since
            .is_none_or(|since| now.duration_since(since) < STEP_LIMIT)
    }
}

/// How long a start waits for the head's answer to a join before it reads models meanwhile.
const JOIN_FIRST: Duration = Duration::from_secs(5);

const HOUSEKEEPING: Duration = Duration::from_millis(500);

/// Housekeeping that does not turn for this long is stuck.
const STUCK: Duration = Duration::from_secs(10);

/// No step takes this long, on the slowest machine.
const STEP_LIMIT: Duration = Duration::from_secs(60);

/// How long the link has for its goodbye.
const GOODBYE: Duration = Duration::from_secs(1);
