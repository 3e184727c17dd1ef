//! A mesh of machines that share models, and what can happen to each of them.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use arcanum_tests::{Ask, Cluster, Running};
//!
//! let mut cluster = Cluster::builder().shards(4).stages(3).start().await?;
//! let ring = cluster.wait_for_whole_ring().await?;
//! let running = Running::start(&cluster.client()?, &[Ask::greedy("Why is the sky blue?", 100)]);
//! running.wait_for_tokens(40).await?;
//! cluster.kill(ring.driver())?;
//! println!("{}", running.answers().await?[0].transcript.text);
//! # Ok(())
//! # }
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mesh_testkit::client::http::HttpClient;
use mesh_testkit::namespaces::Machine;
use mesh_testkit::{Mesh, Namespaces, Service, paths};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::view::RingView;

/// What a cluster shall be made of.
#[derive(Debug)]
pub struct ClusterBuilder {
    workers: Vec<String>,
    model: Option<PathBuf>,
    threads: usize,
    head: Vec<String>,
    stages: usize,
    standbys: bool,
    shim: bool,
    network: Option<Namespaces>,
}

/// A running cluster. Dropping it kills all of it.
#[derive(Debug)]
pub struct Cluster {
    /// The mesh below.
    pub mesh: Mesh,
    model: PathBuf,
    threads: usize,
    standbys: bool,
    /// Whether a worker was started that measures this machine.
    measures: bool,
    machines: HashMap<String, Machine>,
    slowed: HashMap<String, JoinHandle<()>>,
    network: Option<Namespaces>,
}

impl ClusterBuilder {
    /// So many workers that hold parts of the model.
    #[must_use]
    pub fn shards(mut self, workers: usize) -> Self {
        self.workers.extend(vec![SHARDS.to_owned(); workers]);
        self
    }

    /// So many workers that hold parts of the model, with TOML of their own, such as `[ring]\nmemory = "60MB"`.
    #[must_use]
    pub fn shards_with(mut self, workers: usize, toml: &str) -> Self {
        let toml = format!("{SHARDS}{toml}\n");
        self.workers.extend(vec![toml; workers]);
        self
    }

    /// So many workers that serve the whole model.
    #[must_use]
    pub fn whole(mut self, workers: usize) -> Self {
        self.workers.extend(vec![String::new(); workers]);
        self
    }

    /// A worker that serves another model whole.
    #[must_use]
    pub fn whole_model(mut self, path: &Path) -> Self {
        self.workers
            .push(format!("models = [{:?}]\n", path.display().to_string()));
        self
    }

    /// The model; SmolLM2 from the cache otherwise.
    #[must_use]
    pub fn model(mut self, path: &Path) -> Self {
        self.model = Some(path.to_owned());
        self
    }

    /// Threads that each worker computes with; 1 otherwise.
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Rings of exactly so many stages; otherwise as many as the head thinks best.
    #[must_use]
    pub fn stages(mut self, stages: usize) -> Self {
        self.stages = stages;
        self
    }

    /// Whether stages get standbys, which they do otherwise.
    #[must_use]
    pub fn standbys(mut self, standbys: bool) -> Self {
        self.standbys = standbys;
        self
    }

    /// TOML that is put over the head's configuration.
    #[must_use]
    pub fn head_config(mut self, toml: &str) -> Self {
        self.head.push(toml.to_owned());
        self
    }

    /// Puts a shim before the head.
    #[must_use]
    pub fn shim(mut self) -> Self {
        self.shim = true;
        self
    }

    /// Puts every worker into a network namespace of its own, so that it can be cut off.
    ///
    /// # Errors
    /// If this machine does not allow it; the message says why.
    pub fn in_namespaces(mut self) -> Result<Self> {
        self.network = Some(Namespaces::new()?);
        Ok(self)
    }

    /// Starts everything; workers may still be joining and rings forming when it returns.
    ///
    /// # Errors
    /// If a service does not start; the message holds the end of its log.
    pub async fn start(self) -> Result<Cluster> {
        let sharding = format!(
            "[sharding]\nobjective = \"throughput\"\nstages = {}\nstandbys = {}\ngather = \"1s\"\nsuspect_pause = \"2s\"\n",
            self.stages, self.standbys
        );
        let mut builder = Mesh::builder().head_config(&sharding);
        if let Some(network) = &self.network {
            let own = network.own_address();
            builder = builder.head_config(&format!(
                "[quic]\nlisten = \"{own}:0\"\n[dcf]\nworkers = \"{own}:0\"\n"
            ));
        }
        for toml in &self.head {
            builder = builder.head_config(toml);
        }
        let model = match self.model {
            Some(model) => model,
            None => paths::smollm2()?,
        };
        builder = builder.model(&model);
        if self.shim {
            builder = builder.shim();
        }
        let mut cluster = Cluster {
            mesh: builder.start().await?,
            model,
            threads: self.threads,
            standbys: self.standbys,
            measures: false,
            machines: HashMap::new(),
            slowed: HashMap::new(),
            network: self.network,
        };
        for toml in &self.workers {
            cluster.add_worker(toml).await?;
        }
        Ok(cluster)
    }
}

impl Cluster {
    /// A cluster to be described.
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder {
            workers: Vec::new(),
            model: None,
            threads: 1,
            head: Vec::new(),
            stages: 0,
            standbys: true,
            shim: false,
            network: None,
        }
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
    pub async fn add_shards(&mut self) -> Result<String> {
        self.add_worker(SHARDS).await
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
        if config.get("models").is_some_and(is_empty) {
            let model = self.model.display().to_string();
            config.insert("shards".into(), vec![model].into());
        }
        let launcher = match (&self.network, machine) {
            (Some(network), Some(machine)) => network.launcher(self.mesh.launcher(), machine),
            _ => self.mesh.launcher().clone(),
        }
        .with_state(&self.measured().await);
        self.measures |= config.contains_key("shards");
        let toml = config.to_string();
        let index = self.mesh.start_worker_by(&launcher, &toml).await?;
        let name = self.mesh.workers[index].name().to_owned();
        if let Some(machine) = machine {
            self.machines.insert(name.clone(), machine);
        }
        Ok(name)
    }

    /// A worker by its name.
    ///
    /// # Errors
    /// If there is none.
    pub fn worker(&mut self, name: &str) -> Result<&mut Service> {
        let mut workers = self.mesh.workers.iter_mut();
        let found = workers.find(|worker| worker.name() == name);
        found.with_context(|| format!("no worker is called {name}"))
    }

    /// Names of the workers whose processes are there.
    pub fn names(&mut self) -> Vec<String> {
        let workers = self.mesh.workers.iter_mut();
        let running =
            workers.filter_map(|worker| worker.is_running().then(|| worker.name().to_owned()));
        running.collect()
    }

    /// Kills a worker as a crash would.
    ///
    /// # Errors
    /// If it is gone already.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        self.hurry(name);
        self.worker(name)?.crash()
    }

    /// Makes a worker hang.
    ///
    /// # Errors
    /// If it is gone.
    pub fn stop(&mut self, name: &str) -> Result<()> {
        self.worker(name)?.signal(Signal::SIGSTOP)
    }

    /// Lets a worker that hangs go on.
    ///
    /// # Errors
    /// If it is gone.
    pub fn cont(&mut self, name: &str) -> Result<()> {
        self.worker(name)?.signal(Signal::SIGCONT)
    }

    /// Pulls a worker's network cable.
    ///
    /// # Errors
    /// If the workers are not in network namespaces.
    pub fn cut(&mut self, name: &str) -> Result<()> {
        let (network, machine) = self.machine(name)?;
        network.cut(machine)
    }

    /// Plugs a worker's network cable in again.
    ///
    /// # Errors
    /// If the workers are not in network namespaces.
    pub fn mend(&mut self, name: &str) -> Result<()> {
        let (network, machine) = self.machine(name)?;
        network.mend(machine)
    }

    /// Gives a worker's network a bandwidth, in megabits per second.
    ///
    /// # Errors
    /// If the workers are not in network namespaces.
    pub fn limit(&mut self, name: &str, megabits: u32) -> Result<()> {
        let (network, machine) = self.machine(name)?;
        network.limit(machine, megabits)
    }

    /// Lets a worker run only for `percent` of the time, in turns of 20 ms, until [`Cluster::hurry`].
    ///
    /// # Errors
    /// If it is gone.
    pub fn slow(&mut self, name: &str, percent: u32) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.worker(name)?.pid())?);
        let turn = Duration::from_millis(20);
        let running = turn * percent.min(100) / 100;
        let turns = tokio::spawn(async move {
            // The process is the cluster's child: its number is not given to another as long as nobody waited for it.
            while nix::sys::signal::kill(pid, Signal::SIGSTOP).is_ok() {
                tokio::time::sleep(turn - running).await;
                let _ = nix::sys::signal::kill(pid, Signal::SIGCONT);
                tokio::time::sleep(running).await;
            }
        });
        if let Some(before) = self.slowed.insert(name.to_owned(), turns) {
            before.abort();
        }
        Ok(())
    }

    /// Ends [`Cluster::slow`].
    pub fn hurry(&mut self, name: &str) {
        if let Some(turns) = self.slowed.remove(name) {
            turns.abort();
            let _ = self.cont(name);
        }
    }

    /// Starts a worker that was killed again, as the same node.
    ///
    /// # Errors
    /// If it still runs, or does not start.
    pub async fn restart(&mut self, name: &str) -> Result<()> {
        self.worker(name)?.restart(None).await
    }

    /// Removes a worker for good.
    pub fn remove(&mut self, name: &str) {
        self.hurry(name);
        self.mesh.workers.retain(|worker| worker.name() != name);
    }

    /// The rings of the mesh, as `/v1/mesh` shows them.
    ///
    /// # Errors
    /// If the head does not answer.
    pub async fn rings(&self) -> Result<Vec<RingView>> {
        RingView::all(&self.mesh.registry().await?)
    }

    /// Waits for a ring that serves, with all standbys ready if there shall be standbys, each with all KV rows.
    ///
    /// # Errors
    /// As [`Cluster::wait_for_ring`].
    pub async fn wait_for_whole_ring(&mut self) -> Result<RingView> {
        let standbys = self.standbys;
        self.wait_for_ring(|ring| ring.serves() && (!standbys || ring.is_mirrored()))
            .await
    }

    /// Waits for a ring that is as `wanted`.
    ///
    /// # Errors
    /// If there is none within 90 s; the message holds what `/v1/mesh` shows and the ends of all logs.
    pub async fn wait_for_ring(&mut self, wanted: impl Fn(&RingView) -> bool) -> Result<RingView> {
        let started = Instant::now();
        loop {
            let seen = self.mesh.registry().await?;
            let found = RingView::all(&seen)?.into_iter().find(|ring| wanted(ring));
            if let Some(ring) = found {
                return Ok(ring);
            }
            if started.elapsed() > RING_LIMIT {
                bail!(
                    "no such ring within {RING_LIMIT:?}: {seen:#}\n{}",
                    self.log_ends()
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Has the head compare rings with fresh plans and replace those that are clearly worse; returns what it says.
    ///
    /// # Errors
    /// If it refuses.
    pub async fn rebalance(&self) -> Result<Value> {
        let admin = self.mesh.admin()?;
        Ok(admin.post("/v1/mesh/rebalance", &json!({})).await?)
    }

    /// Tells the head that a worker is to be emptied, and waits until it holds nothing.
    ///
    /// # Errors
    /// If the head refuses, or if the worker still holds something after 30 s; the message says what.
    pub async fn drain(&self, name: &str) -> Result<()> {
        let admin = self.mesh.admin()?;
        let asked = json!({ "worker": name });
        let mut shown = admin.post("/v1/mesh/drain", &asked).await?;
        let started = Instant::now();
        while shown["holds"]
            .as_array()
            .is_some_and(|holds| !holds.is_empty())
        {
            if started.elapsed() > DRAIN_LIMIT {
                bail!("{name} is not empty after {DRAIN_LIMIT:?}: {shown:#}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            let mesh = self.mesh.registry().await?;
            let mut workers = mesh["workers"].as_array().into_iter().flatten();
            let worker = workers.find(|worker| worker["name"] == name);
            shown = worker.cloned().unwrap_or_default();
        }
        Ok(())
    }

    /// Puts a drained worker back into service.
    ///
    /// # Errors
    /// If the head refuses.
    pub async fn undrain(&self, name: &str) -> Result<()> {
        let admin = self.mesh.admin()?;
        admin
            .post("/v1/mesh/undrain", &json!({ "worker": name }))
            .await?;
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

    /// Memory that the processes of head and workers hold, bytes.
    pub fn resident_bytes(&mut self) -> u64 {
        let services = std::iter::once(&mut self.mesh.head).chain(&mut self.mesh.workers);
        let running = services.filter_map(|service| {
            service
                .is_running()
                .then(|| service.resident_bytes().unwrap_or_default())
        });
        running.sum()
    }

    /// The value of one of the head's metrics, summed over its labels; 0 if it is not there.
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

    /// Waits until the head counts no request that runs or waits.
    ///
    /// # Errors
    /// If some still run after 30 s.
    pub async fn wait_until_idle(&self) -> Result<Value> {
        let started = Instant::now();
        loop {
            let seen = self.mesh.registry().await?;
            let workers = seen["workers"].as_array().map(Vec::as_slice);
            let assigned = workers
                .unwrap_or_default()
                .iter()
                .filter_map(|worker| worker["assigned"].as_u64())
                .sum::<u64>();
            if assigned == 0 {
                return Ok(seen);
            }
            if started.elapsed() > IDLE_LIMIT {
                bail!(
                    "{assigned} requests still run {IDLE_LIMIT:?} after the last answer: {seen:#}"
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Ends all services that run with SIGTERM and checks that each exits with 0. The head goes first: workers that leave a
    /// head hand over what they hold, the last one in vain.
    ///
    /// # Errors
    /// If one does not.
    pub async fn shutdown(&mut self) -> Result<()> {
        for name in self.slowed.keys().cloned().collect::<Vec<_>>() {
            self.hurry(&name);
        }
        let services = std::iter::once(&mut self.mesh.head).chain(&mut self.mesh.workers);
        for service in services.chain(&mut self.mesh.shim) {
            if !service.is_running() {
                continue;
            }
            let status = service.terminate(SHUTDOWN_LIMIT).await?;
            if !status.success() {
                bail!(
                    "{} ended with {status}; its log ends:\n{}",
                    service.name(),
                    service.log_end()
                );
            }
        }
        Ok(())
    }

    /// What the first worker of this process found out about this machine: all workers are alike, and measured one after the
    /// other they would differ by what else runs.
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

    fn machine(&self, name: &str) -> Result<(&Namespaces, Machine)> {
        let machine = self.machines.get(name);
        self.network
            .as_ref()
            .zip(machine.copied())
            .with_context(|| format!("{name} is not in a network namespace"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for turns in self.slowed.values() {
            turns.abort();
        }
        if std::thread::panicking() {
            return;
        }
        // The services before the network that they use.
        self.mesh.workers.clear();
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
const SHARDS: &str = "models = []\n";
const RING_LIMIT: Duration = Duration::from_secs(90);
const MEASURE_LIMIT: Duration = Duration::from_secs(60);
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);
const IDLE_LIMIT: Duration = Duration::from_secs(30);
