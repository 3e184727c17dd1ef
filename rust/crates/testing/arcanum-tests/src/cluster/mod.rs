//! A mesh of machines that share models, with faults for each of them.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use arcanum_tests::{ChatQuestion, Cluster, RunningStreams};
//!
//! let mut cluster = Cluster::builder().ring_workers(4).stages(3).start().await?;
//! let ring = cluster.wait_for_whole_ring().await?;
//! let running = RunningStreams::start(&cluster.client()?, &[ChatQuestion::greedy("Why is the sky blue?", 100)]);
//! running.wait_for_tokens(40).await?;
//! cluster.kill(ring.driver())?;
//! println!("{}", running.answers().await?[0].transcript.text);
//! # Ok(())
//! # }
//! ```

mod builder;
mod faults;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mesh_api::{DrainProgress, RebalanceRequest, RebalanceResponse, WorkerRequest, paths};
use mesh_testkit::client::http::HttpClient;
use mesh_testkit::namespaces::Machine;
use mesh_testkit::{Mesh, Namespaces, Service};
use serde_json::Value;
use tokio::task::JoinHandle;

pub use builder::ClusterBuilder;
pub use faults::Fault;

use crate::view::RingView;

/// A running cluster. Dropping it kills all of it.
#[derive(Debug)]
pub struct Cluster {
    /// The mesh that the cluster consists of.
    pub mesh: Mesh,
    model: PathBuf,
    threads: usize,
    standbys: bool,
    /// True once a worker was started that measures this machine.
    measures: bool,
    machines: HashMap<String, Machine>,
    slowed: HashMap<String, JoinHandle<()>>,
    network: Option<Namespaces>,
}

impl Cluster {
    /// A cluster to be described.
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder::new()
    }

    /// A client of the head's HTTP API.
    ///
    /// # Errors
    /// If the head has no HTTP address.
    pub fn client(&self) -> Result<HttpClient> {
        self.mesh.client()
    }

    /// Starts one more worker that holds parts of the model; returns its name.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn add_ring_worker(&mut self) -> Result<String> {
        self.add_worker(IN_RING).await
    }

    /// Starts one more worker, with `toml` over its configuration, in which `models = []` makes it hold parts rather than
    /// the whole. Returns its name.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn add_worker(&mut self, toml: &str) -> Result<String> {
        let machine = self.network.as_mut().map(Namespaces::add).transpose()?;
        let address = match (&self.network, machine) {
            (Some(network), Some(machine)) => network.address(machine),
            _ => "127.0.0.1".to_owned(),
        };
        let usual = format!(
            "threads = {}\n[http]\nlisten = \"{address}:0\"\n[ring]\nlisten = \"{address}:0\"\nformat = \"file\"\n",
            self.threads
        );
        let mut config: toml::Table = usual.parse().context("the usual configuration")?;
        let own: toml::Table = toml.parse().context("the worker's own TOML")?;
        for (key, value) in own {
            match (config.get_mut(&key), value) {
                (Some(toml::Value::Table(under)), toml::Value::Table(over)) => under.extend(over),
                (_, value) => {
                    config.insert(key, value);
                }
            }
        }
        let in_ring = config.get("models").is_some_and(is_empty);
        if in_ring && let Some(toml::Value::Table(ring)) = config.get_mut("ring") {
            let model = self.model.display().to_string();
            ring.insert("models".into(), vec![model].into());
        }
        let launcher = match (&self.network, machine) {
            (Some(network), Some(machine)) => network.launcher(self.mesh.launcher(), machine),
            _ => self.mesh.launcher().clone(),
        }
        .with_state(&self.measured().await);
        self.measures |= in_ring;
        let toml = config.to_string();
        let index = self.mesh.start_worker_by(&launcher, &toml).await?;
        let name = self.mesh.workers[index].name().to_owned();
        if let Some(machine) = machine {
            self.machines.insert(name.clone(), machine);
        }
        Ok(name)
    }

    /// Adds a machine to the workers' network that runs no worker. Returns the words to put before a command
    /// that runs there; they are empty if the workers are not in network namespaces, and the command runs on
    /// this machine.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn add_machine(&mut self) -> Result<Vec<String>> {
        let Some(network) = &mut self.network else {
            return Ok(Vec::new());
        };
        let machine = network.add()?;
        Ok(network.wrapper(machine).to_vec())
    }

    /// The address of this machine on the workers' network.
    pub fn own_address(&self) -> String {
        let network = self.network.as_ref();
        network.map_or_else(|| "127.0.0.1".to_owned(), Namespaces::own_address)
    }

    /// A worker by its name.
    ///
    /// # Errors
    /// If no worker has this name.
    pub fn worker(&mut self, name: &str) -> Result<&mut Service> {
        let mut workers = self.mesh.workers.iter_mut();
        let found = workers.find(|worker| worker.name() == name);
        found.with_context(|| format!("no worker is called {name}"))
    }

    /// Names of the workers with a running process.
    pub fn names(&mut self) -> Vec<String> {
        let workers = self.mesh.workers.iter_mut();
        let running =
            workers.filter_map(|worker| worker.is_running().then(|| worker.name().to_owned()));
        running.collect()
    }

    /// The rings of the mesh, as `/v1/mesh` shows them.
    ///
    /// # Errors
    /// If the head does not answer.
    pub async fn rings(&self) -> Result<Vec<RingView>> {
        Ok(RingView::all(self.mesh.registry().await?))
    }

    /// Waits for a ring that serves. If the cluster has standbys, all must be ready and have all KV rows.
    ///
    /// # Errors
    /// As [`Cluster::wait_for_ring`].
    pub async fn wait_for_whole_ring(&mut self) -> Result<RingView> {
        let standbys = self.standbys;
        self.wait_for_ring(|ring| ring.serves() && (!standbys || ring.is_mirrored()))
            .await
    }

    /// Waits for a ring for which `wanted` is true.
    ///
    /// # Errors
    /// If there is no such ring within 90 s; the message holds what `/v1/mesh` shows and the ends of all
    /// logs.
    pub async fn wait_for_ring(&mut self, wanted: impl Fn(&RingView) -> bool) -> Result<RingView> {
        let started = Instant::now();
        loop {
            let seen = self.mesh.registry().await?;
            let found = RingView::all(seen.clone())
                .into_iter()
                .find(|ring| wanted(ring));
            if let Some(ring) = found {
                return Ok(ring);
            }
            if started.elapsed() > RING_LIMIT {
                bail!(
                    "no such ring within {RING_LIMIT:?}: {seen:#?}\n{}",
                    self.log_ends()
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Has the head compare rings with fresh plans and replace those that are clearly worse; returns its
    /// response.
    ///
    /// # Errors
    /// If it refuses.
    pub async fn rebalance(&self) -> Result<RebalanceResponse> {
        let admin = self.mesh.admin()?;
        let request = RebalanceRequest::default();
        Ok(admin.post(paths::REBALANCE, &request).await?)
    }

    /// Drains a worker through the head, and waits until it holds nothing.
    ///
    /// # Errors
    /// If the head refuses, or if the worker still holds something after 30 s; the message names it.
    pub async fn drain(&self, name: &str) -> Result<()> {
        let admin = self.mesh.admin()?;
        let request = WorkerRequest {
            worker: name.to_owned(),
        };
        let drain: DrainProgress = admin.post(paths::DRAIN, &request).await?;
        let mut holds = drain.holds;
        let started = Instant::now();
        while !holds.is_empty() {
            if started.elapsed() > DRAIN_LIMIT {
                bail!("{name} is not empty after {DRAIN_LIMIT:?}: {holds:#?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            let mesh = self.mesh.registry().await?;
            let mut workers = mesh.workers.into_iter();
            let worker = workers.find(|worker| worker.name == name);
            holds = worker.unwrap_or_default().holds;
        }
        Ok(())
    }

    /// Puts a drained worker back into service.
    ///
    /// # Errors
    /// If the head refuses.
    pub async fn undrain(&self, name: &str) -> Result<()> {
        let admin = self.mesh.admin()?;
        let request = WorkerRequest {
            worker: name.to_owned(),
        };
        let _: DrainProgress = admin.post(paths::UNDRAIN, &request).await?;
        Ok(())
    }

    /// The ends of all logs.
    pub fn log_ends(&self) -> String {
        let services = std::iter::once(&self.mesh.head).chain(&self.mesh.workers);
        let ends = services.map(|service| {
            format!(
                "--- log of {}, its end ---\n{}\n",
                service.name(),
                service.log_end()
            )
        });
        ends.collect()
    }

    /// All lines of level WARN or ERROR in the logs of head and workers.
    pub fn alarms(&self) -> Vec<String> {
        let services = std::iter::once(&self.mesh.head).chain(&self.mesh.workers);
        let lines = services.flat_map(|service| {
            let log = service.log();
            let name = service.name().to_owned();
            let alarms = log
                .lines()
                .filter(|line| line.contains("WARN") || line.contains("ERROR"));
            alarms
                .map(|line| format!("{name}: {line}"))
                .collect::<Vec<_>>()
        });
        lines.collect()
    }

    /// Resident memory of head and workers together, bytes.
    pub fn resident_bytes(&mut self) -> u64 {
        let services = std::iter::once(&mut self.mesh.head).chain(&mut self.mesh.workers);
        let running = services.filter_map(|service| {
            service
                .is_running()
                .then(|| service.resident_bytes().unwrap_or_default())
        });
        running.sum()
    }

    /// The value of one of the head's metrics, summed over its labels; 0 if it is missing.
    ///
    /// # Errors
    /// If the head does not answer.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let text = self.client()?.get_text("/metrics").await?;
        let of_name = |line: &&str| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with([' ', '{']))
        };
        let values = text.lines().filter(of_name);
        let values = values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(values.sum())
    }

    /// Waits until the head has no running or waiting request.
    ///
    /// # Errors
    /// If some still run after 30 s.
    pub async fn wait_until_idle(&self) -> Result<mesh_api::Mesh> {
        let started = Instant::now();
        loop {
            let seen = self.mesh.registry().await?;
            let assigned: u32 = seen.workers.iter().map(|worker| worker.assigned).sum();
            if assigned == 0 {
                return Ok(seen);
            }
            if started.elapsed() > IDLE_LIMIT {
                bail!(
                    "{assigned} requests still run {IDLE_LIMIT:?} after the last answer: {seen:#?}"
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Ends all services that run with SIGTERM and checks that each exits with 0. The head goes first: workers
    /// that leave a running head hand over their stages, the last one in vain.
    ///
    /// # Errors
    /// If one does not.
    pub async fn shutdown(&mut self) -> Result<()> {
        for name in self.slowed.keys().cloned().collect::<Vec<_>>() {
            self.hurry(&name);
        }
        Service::terminate_all([&mut self.mesh.head], SHUTDOWN_LIMIT).await?;
        let others = self.mesh.workers.iter_mut().chain(&mut self.mesh.shim);
        Service::terminate_all(others, SHUTDOWN_LIMIT).await
    }

    /// Measurements of this machine by the first worker of this process. All workers are alike; measured one
    /// after the other they would differ by other load.
    async fn measured(&self) -> Vec<PathBuf> {
        let started = Instant::now();
        while self.measures && started.elapsed() < MEASURE_LIMIT && measured().is_none() {
            let workers = self.mesh.workers.iter();
            let mut files = workers.map(|worker| worker.state_dir().join("profile.json"));
            *measured() = files.find_map(|file| read_speeds(&file));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let file = self.mesh.head.state_dir().join("measured/profile.json");
        let written = measured().as_ref().map(|bytes| {
            std::fs::create_dir_all(file.with_file_name(""))?;
            std::fs::write(&file, bytes)
        });
        written
            .and_then(Result::ok)
            .map(|()| file)
            .into_iter()
            .collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for turns in self.slowed.values() {
            turns.abort();
        }
    }
}

/// A worker's profile, once it tells how fast a layer is.
fn read_speeds(profile: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(profile).ok()?;
    let kept: Value = serde_json::from_slice(&bytes).ok()?;
    let speeds = kept["speeds"].as_array()?;
    (!speeds.is_empty()).then_some(bytes)
}

fn measured() -> MutexGuard<'static, Option<Vec<u8>>> {
    static MEASURED: Mutex<Option<Vec<u8>>> = Mutex::new(None);
    MEASURED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_empty(value: &toml::Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

/// A worker with this serves nothing whole.
const IN_RING: &str = "models = []\n";
const RING_LIMIT: Duration = Duration::from_secs(90);
const MEASURE_LIMIT: Duration = Duration::from_secs(60);
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);
const IDLE_LIMIT: Duration = Duration::from_secs(30);
