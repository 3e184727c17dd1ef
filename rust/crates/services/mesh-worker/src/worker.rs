//! The running worker: its sockets, its models, its tasks, and how all of it ends.

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use mesh_base::addresses::Preferred;
use mesh_base::listen;
use mesh_base::random;
use mesh_net::trust::NodeIdentity;
use mesh_service::addresses::{self, Addresses};
use mesh_service::files;
use mesh_service::health::{self, Health, Serving};
use mesh_service::metrics::Metrics;
use mesh_service::notify::{Heart, Watchdog};
use mesh_service::reload::Report;
use mesh_service::shutdown::{Drained, Shutdown};
use tokio::net::{TcpListener, UdpSocket};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::error::WorkerError;
use crate::evidence::NodeEvidence;
use crate::gossip::{GossipCollector, WorkerGossip};
use crate::head::HeadLink;
use crate::host::Host;
use crate::join::identify;
use crate::lan::{HeadPlace, Lan};
use crate::legacy::PlainDcf;
use crate::loading::Loading;
use crate::lock::lock;
use crate::metrics::{Counters, EngineCollector};
use crate::models::Models;
use crate::templates::Templates;

/// Entry point that starts workers.
pub struct Worker;

/// A running worker.
pub struct WorkerHandle {
    addresses: Addresses,
    live: Live,
    shutdown: Shutdown,
    task: JoinHandle<Result<(), WorkerError>>,
}

impl Worker {
    /// Starts a worker that [`WorkerHandle::shutdown`] stops. Returns when its models are loaded and have
    /// answered once; the link to the head is made, and made again, in the background.
    pub async fn start(config: Config) -> Result<WorkerHandle, WorkerError> {
        let shutdown = Shutdown::manual(config.drain_limit);
        Self::start_with(config, Templates::here(), shutdown, Watchdog::start()).await
    }

    /// The same as [`start`](Self::start), with chat templates run elsewhere, with a shutdown that others may
    /// begin, too, and with its loop watched.
    pub async fn start_with(
        config: Config,
        templates: Templates,
        shutdown: Shutdown,
        watchdog: Watchdog,
    ) -> Result<WorkerHandle, WorkerError> {
        config.check()?;
        let config = Arc::new(config);
        let state_dir = |source| WorkerError::StateDir {
            path: config.state_dir.clone(),
            source,
        };
        files::open_state_dir(&config.state_dir, &SECRETS).map_err(state_dir)?;
        mesh_net::quic::settle(&config.state_dir).map_err(WorkerError::Identity)?;
        sweep_weights(&config.state_dir.join("weights"));
        addresses::remove(&config.state_dir).map_err(state_dir)?;

        let sockets = Sockets::bind(&config)?;
        let health = Health::starting().watched_by(watchdog.clone());
        let metrics = Arc::new(Metrics::new("worker", env!("CARGO_PKG_VERSION")));
        let counters = Arc::new(Counters::default());
        metrics.register(|registry| counters.register(registry));
        let gossip = WorkerGossip::new(config.gossip.clone(), config.state_dir.clone());
        let gossip = Arc::new(gossip);
        let collector = GossipCollector(gossip.clone());
        metrics.register(|registry| registry.register_collector(Box::new(collector)));
        let stop = CancellationToken::new();
        let bound = sockets.addresses.clone();
        let (http, hosts) = (sockets.http, &config.http.hosts);
        let serving =
            health::serve(http, hosts, health.clone(), metrics.clone()).map_err(state_dir)?;
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
            (Some(head), _) => Some(HeadPlace::At(head.clone(), Preferred::default())),
            (None, Some(lan)) => Some(HeadPlace::Lan(lan.clone())),
            (None, None) => None,
        };
        let evidence = match config.evidence {
            true => {
                let tpm = config.tpm.clone();
                let collected = tokio::task::spawn_blocking(move || NodeEvidence::collect(&tpm));
                Some(Arc::new(collected.await?))
            }
            false => None,
        };
        let source = evidence.as_ref().map(NodeEvidence::source);
        let ((host, failures), identity) = {
            let identity = async {
                match &head {
                    Some(head) => match identify(&config, head, &health, source.as_ref()).await {
                        // It asks again, rarely: a process that is started again and again would ask often.
                        Err(error) if error.is_expulsion() => {
                            tracing::error!(%error, "this worker works for nobody");
                            Ok(None)
                        }
                        identified => identified,
                    },
                    None => Ok(None),
                }
            };
            tokio::pin!(identity);
            // A token that is refused is found out before gigabytes are read. A head that does not answer is
            // not waited for.
            let joined = tokio::time::timeout(JOIN_FIRST, &mut identity).await;
            let joined = joined.ok().transpose()?;
            let loading = {
                let config = config.clone();
                tokio::task::spawn_blocking(move || Host::load(&config, models, templates))
            };
            let loading = async { loading.await? };
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

        let live = Live {
            config: Arc::new(Mutex::new((*config).clone())),
            identity: Arc::default(),
            loading: loading.clone(),
        };
        let running = Running {
            live: live.clone(),
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
            evidence,
            gossip,
            shutdown: shutdown.clone(),
            stop,
            serving,
        };
        let task = tokio::spawn(running.run(identity));
        Ok(WorkerHandle {
            addresses: bound,
            live,
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

    /// The settings that can be changed while it runs.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// Drains and stops the worker; running answers finish within the configured limit.
    pub async fn shutdown(self) -> Result<(), WorkerError> {
        self.shutdown.begin();
        self.wait().await
    }

    /// Resolves when the worker has ended: without an error if it was told to.
    pub async fn wait(self) -> Result<(), WorkerError> {
        self.task.await?
    }
}

/// The settings that a running worker can change without a restart.
#[derive(Clone)]
pub struct Live {
    /// The configuration whose reloadable keys are in effect.
    config: Arc<Mutex<Config>>,
    identity: Arc<OnceLock<NodeIdentity>>,
    loading: Arc<Loading>,
}

impl Live {
    /// The keys of the configuration that [`Live::reload`] applies, besides `log_level`.
    pub const KEYS: [&str; 1] = ["trusted_networks"];

    /// Puts the reloadable keys of `fresh` into effect, reads the certificate again, and looks again for
    /// models: in the folder of local ones, also for those that were refused, and for those that did not come
    /// so far.
    pub fn reload(&self, fresh: &Config, report: &mut Report) {
        if let Some(identity) = self.identity.get() {
            report.step("certificate", identity.reload());
        }
        *lock(&self.config) = fresh.clone();
        self.loading.look_again();
    }
}

/// Removes weights that a killed process had half written. Each model has a folder.
fn sweep_weights(cache: &Path) {
    // Without the folder there is nothing to remove.
    let Ok(models) = std::fs::read_dir(cache) else {
        return;
    };
    let folders = models.flatten().filter(|entry| {
        let kind = entry.file_type();
        kind.is_ok_and(|kind| kind.is_dir())
    });
    folders.for_each(|folder| files::sweep(&folder.path()));
}

/// Checks that need no model to be read, for mistakes that would end the worker after it has read them.
fn check_cheaply(config: &Config, models: &Models) -> Result<(), WorkerError> {
    crate::host::find(config)?;
    mesh_engine_ort::load_library(config.ort_library.as_deref()).map_err(WorkerError::Runtime)?;
    if !config.ring.models.is_empty() || models.is_sharing() {
        let address = config.ring.listen;
        let failed = WorkerError::listen(address, "udp", "ring.listen");
        listen::udp(address, None).map_err(failed)?;
    }
    Ok(())
}

struct Sockets {
    http: TcpListener,
    dcf: UdpSocket,
    addresses: Addresses,
}

impl Sockets {
    fn bind(config: &Config) -> Result<Self, WorkerError> {
        let tcp = WorkerError::listen(config.http.listen, "tcp", "http.listen");
        let udp = WorkerError::listen(config.dcf.listen, "udp", "dcf.listen");
        let http = listen::tcp(config.http.listen).map_err(tcp)?;
        let dcf = listen::udp(config.dcf.listen, None).map_err(udp)?;
        dcf.set_nonblocking(true).map_err(udp)?;
        let dcf = UdpSocket::from_std(dcf).map_err(udp)?;
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

struct Running {
    config: Arc<Config>,
    live: Live,
    head: Option<HeadPlace>,
    lan: Option<Lan>,
    host: Arc<Host>,
    dcf: Arc<UdpSocket>,
    health: Health,
    loading: Arc<Loading>,
    counters: Arc<Counters>,
    evidence: Option<Arc<NodeEvidence>>,
    gossip: Arc<WorkerGossip>,
    shutdown: Shutdown,
    answers: TaskTracker,
    /// Ends tasks that outlive the drain.
    stop: CancellationToken,
    serving: Serving,
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
        let goodbye = async {
            if !link.is_finished() {
                // It says goodbye to the head.
                let _ = tokio::time::timeout(GOODBYE, &mut link).await;
            }
        };
        tokio::join!(goodbye, self.serving.end());
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
                    self.loading.look_after();
                    // A stage that hangs must not be vouched for.
                    if progress.is_made(&self.host, Instant::now()) {
                        self.heart.beat();
                    }
                }
                ended = &mut *link, if self.head.is_some() => {
                    return ended?;
                }
            }
        }
    }

    /// Once the drain begins: takes no new requests and lets running ones finish, up to the limit.
    async fn drain(&self) {
        self.shutdown.draining().await;
        self.host.stored.core().change(|core| core.loads.drain());
        self.health.set_unready("shutting down");
        let finished = async {
            self.host.drain().await;
            self.answers.close();
            self.answers.wait().await;
        };
        match self.shutdown.drain(finished).await {
            Drained::Finished => tracing::info!("all answers finished"),
            Drained::TimedOut => tracing::warn!(
                answers = self.answers.len(),
                rings = self.host.rings.shared(),
                limit_seconds = self.shutdown.limit().as_secs_f64(),
                "what still runs at the end of the drain is cut: answers, and parts of rings that nobody has taken over"
            ),
        }
    }

    fn plain_dcf(&self) -> PlainDcf {
        PlainDcf {
            socket: self.dcf.clone(),
            config: self.config.clone(),
            live: self.live.config.clone(),
            host: self.host.clone(),
            counters: self.counters.clone(),
            shutdown: self.shutdown.clone(),
            answers: self.answers.clone(),
        }
    }

    fn head_link(
        &self,
        identity: Option<NodeIdentity>,
    ) -> impl Future<Output = Result<(), WorkerError>> + use<> {
        let Some(head) = self.head.clone() else {
            // A head of DCF v5 is served without a link.
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
            gossip: self.gossip.clone(),
            counters: self.counters.clone(),
            shutdown: self.shutdown.clone(),
            answers: self.answers.clone(),
            instance: random::number().max(1),
            stop: self.stop.clone(),
            evidence: self.evidence.clone(),
            known: self.live.identity.clone(),
        };
        futures::future::Either::Right(link.run(identity))
    }
}

/// Detects whether the engines make progress with their work.
#[derive(Default)]
struct Progress {
    steps: u64,
    since: Option<Instant>,
}

impl Progress {
    fn is_made(&mut self, host: &Host, now: Instant) -> bool {
        let models = host.models();
        let engines = models.iter().map(|served| &served.engine);
        let (mut limit, mut steps, mut busy) = (STEP_LIMIT, 0, false);
        for engine in engines {
            let load = engine.load();
            limit = limit.max(step_limit(engine.max_rows(), load.prefill_tps));
            steps += load.totals.steps;
            busy |= load.running > 0 || load.prefill_backlog > 0;
        }
        if steps != self.steps || !busy {
            (self.steps, self.since) = (steps, Some(now));
        }
        self.since
            .is_none_or(|since| now.duration_since(since) < limit)
    }
}

/// Time for which a start waits for the head's answer to a join before it reads models meanwhile.
const JOIN_FIRST: Duration = Duration::from_secs(5);

/// Files of the state directory that only the worker's user may read.
const SECRETS: [&str; 2] = ["identity.key", "node.key"];

const HOUSEKEEPING: Duration = Duration::from_millis(500);

/// Housekeeping that does not turn for this long is stuck.
const STUCK: Duration = Duration::from_secs(10);

/// Time limit for a step of at most `rows` rows at this measured speed in rows per second: ten times the
/// expected time.
fn step_limit(rows: usize, speed: f32) -> Duration {
    let expected = if speed > 0.0 {
        Duration::try_from_secs_f32(10.0 * rows as f32 / speed).unwrap_or_default()
    } else {
        Duration::ZERO
    };
    expected.clamp(STEP_LIMIT, LONGEST_STEP_LIMIT)
}

/// A step that takes this long is stuck, unless the machine is known to be that slow.
const STEP_LIMIT: Duration = Duration::from_secs(60);
const LONGEST_STEP_LIMIT: Duration = Duration::from_secs(3600);

const GOODBYE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_machine_has_longer_for_a_step_than_a_fast_one() {
        assert_eq!(step_limit(512, 500.0), STEP_LIMIT);
        assert_eq!(step_limit(512, 0.0), STEP_LIMIT);
        assert_eq!(step_limit(512, 5.12), Duration::from_secs(1000));
        assert_eq!(step_limit(512, f32::MIN_POSITIVE), STEP_LIMIT);
        assert_eq!(step_limit(1 << 20, 0.001), LONGEST_STEP_LIMIT);
    }
}
