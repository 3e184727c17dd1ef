//! Options of a cluster.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use mesh_testkit::{Mesh, Namespaces, paths};

use super::{Cluster, IN_RING};

/// Builder of a cluster: workers, model, stages and configuration.
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
    clients_on_network: bool,
}

impl ClusterBuilder {
    pub(super) fn new() -> Self {
        Self {
            workers: Vec::new(),
            model: None,
            threads: 1,
            head: Vec::new(),
            stages: 0,
            standbys: true,
            shim: false,
            network: None,
            clients_on_network: false,
        }
    }

    /// Adds workers that hold parts of the model.
    #[must_use]
    pub fn ring_workers(mut self, workers: usize) -> Self {
        self.workers.extend(vec![IN_RING.to_owned(); workers]);
        self
    }

    /// Adds workers that hold parts of the model, with TOML of their own, such as `[ring]\nmemory = "60MB"`.
    #[must_use]
    pub fn ring_workers_with(mut self, workers: usize, toml: &str) -> Self {
        let toml = format!("{IN_RING}{toml}\n");
        self.workers.extend(vec![toml; workers]);
        self
    }

    /// Adds workers that serve the whole model.
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

    /// Sets the number of stages of a ring; by default the head decides.
    #[must_use]
    pub fn stages(mut self, stages: usize) -> Self {
        self.stages = stages;
        self
    }

    /// Sets if stages get standbys; they do by default.
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

    /// Lets the head listen for clients, too, where the workers' network reaches it; it needs API keys then.
    #[must_use]
    pub fn clients_on_network(mut self) -> Self {
        self.clients_on_network = true;
        self
    }

    /// Starts everything; workers may still be joining and rings forming when it returns.
    ///
    /// # Errors
    /// If a service does not start; the message holds the end of its log.
    pub async fn start(self) -> Result<Cluster> {
        let ring = format!(
            "[ring]\nobjective = \"throughput\"\nstages = {}\nstandbys = {}\ngather = \"1s\"\nsuspect_pause = \"2s\"\n",
            self.stages, self.standbys
        );
        let mut builder = Mesh::builder().head_config(&ring);
        if let Some(network) = &self.network {
            let own = network.own_address();
            builder = builder.head_config(&format!(
                "[quic]\nlisten = \"{own}:0\"\n[dcf]\nworkers = \"{own}:0\"\n"
            ));
            if self.clients_on_network {
                builder = builder.head_config(&format!(
                    "[http]\nlisten = \"{own}:0\"\n[dcf]\nclients = \"{own}:0\"\n"
                ));
            }
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
