//! A whole mesh on loopback: a head, workers that join it with tokens, a shim before it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mesh_api::{CreateTokenRequest, TokenCreated};
use mesh_client::http::HttpClient;
use toml::Table;

use crate::paths;
use crate::process::{Launcher, Service};

/// Longest time until every worker of a mesh answers.
const READY_LIMIT: Duration = Duration::from_secs(90);
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(30);

/// Builder of a mesh: number of workers, shim, model and configuration.
#[derive(Debug, Default)]
pub struct MeshBuilder {
    launcher: Option<Launcher>,
    model: Option<PathBuf>,
    workers: usize,
    shim: bool,
    head_config: Table,
    worker_config: Table,
    shim_config: Table,
}

impl MeshBuilder {
    /// Sets the number of workers.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// Puts a shim before the head.
    #[must_use]
    pub fn shim(mut self) -> Self {
        self.shim = true;
        self
    }

    /// The model file that every worker serves; SmolLM2 from the cache otherwise.
    #[must_use]
    pub fn model(mut self, path: &Path) -> Self {
        self.model = Some(path.to_owned());
        self
    }

    /// Sets the launcher of the services; the default is [`Launcher::of_this_build`].
    #[must_use]
    pub fn launcher(mut self, launcher: Launcher) -> Self {
        self.launcher = Some(launcher);
        self
    }

    /// TOML that is put over the head's configuration, such as `queue_limit = 4`.
    ///
    /// # Panics
    /// If it is not TOML.
    #[must_use]
    pub fn head_config(mut self, toml: &str) -> Self {
        overlay(&mut self.head_config, parse(toml));
        self
    }

    /// TOML that is put over every worker's configuration.
    ///
    /// # Panics
    /// If it is not TOML.
    #[must_use]
    pub fn worker_config(mut self, toml: &str) -> Self {
        overlay(&mut self.worker_config, parse(toml));
        self
    }

    /// TOML that is put over the shim's configuration.
    ///
    /// # Panics
    /// If it is not TOML.
    #[must_use]
    pub fn shim_config(mut self, toml: &str) -> Self {
        overlay(&mut self.shim_config, parse(toml));
        self
    }

    /// Starts everything and waits until every worker can be asked.
    ///
    /// # Errors
    /// If a service does not start; the message holds the end of its log.
    pub async fn start(self) -> Result<Mesh> {
        let launcher = match self.launcher {
            Some(launcher) => launcher,
            None => Launcher::of_this_build()?,
        };
        let mut config = parse(
            r#"
            [http]
            listen = "127.0.0.1:0"
            [dcf]
            clients = "127.0.0.1:0"
            workers = "127.0.0.1:0"
            [quic]
            listen = "127.0.0.1:0"
            "#,
        );
        overlay(&mut config, self.head_config);
        let mut head = launcher.start("mesh-head", "head", &config).await?;
        head.wait_for("/health").await?;

        let mut mesh = Mesh {
            launcher,
            model: self.model,
            worker_config: self.worker_config,
            workers_started: 0,
            workers: Vec::new(),
            shim: None,
            head,
        };
        for _ in 0..self.workers {
            mesh.start_worker("").await?;
        }
        mesh.wait_for_workers(self.workers).await?;
        if self.shim {
            mesh.start_shim(self.shim_config).await?;
        }
        Ok(mesh)
    }
}

/// A running mesh. Dropping it kills all of it.
#[derive(Debug)]
pub struct Mesh {
    launcher: Launcher,
    model: Option<PathBuf>,
    worker_config: Table,
    workers_started: usize,
    /// The workers, in the order of their start.
    pub workers: Vec<Service>,
    /// The shim in front of the head, if there is one.
    pub shim: Option<Service>,
    /// The head's running process.
    pub head: Service,
}

impl Mesh {
    /// A builder for a mesh without workers or shim.
    pub fn builder() -> MeshBuilder {
        MeshBuilder::default()
    }

    /// Kills the head if it still runs, and restarts it after `pause` on the same ports.
    ///
    /// # Errors
    /// If it does not start again.
    pub async fn restart_head(&mut self, pause: Duration) -> Result<()> {
        let path = self.head.config_path();
        let mut config: Table = fs::read_to_string(&path)
            .with_context(|| path.display().to_string())?
            .parse()?;
        let address = |name| self.head.address(name);
        let ports = format!(
            "[http]\nlisten = \"{}\"\n[dcf]\nclients = \"{}\"\nworkers = \"{}\"\n[quic]\nlisten = \"{}\"\n",
            address("http")?,
            address("dcf.clients")?,
            address("dcf.workers")?,
            address("quic")?,
        );
        overlay(&mut config, ports.parse()?);
        if self.head.is_running() {
            self.head.crash()?;
        }
        tokio::time::sleep(pause).await;
        self.head.restart(Some(&config)).await?;
        self.head.wait_for("/health").await
    }

    /// A client of the head's HTTP API.
    ///
    /// # Errors
    /// If the head has no HTTP address.
    pub fn client(&self) -> Result<HttpClient> {
        self.head.http()
    }

    /// A client with the head's admin key.
    ///
    /// # Errors
    /// If the head's key cannot be read.
    pub fn admin(&self) -> Result<HttpClient> {
        let path = self.head.state_dir().join("admin.key");
        let key = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let address = self.head.address("http")?.to_string();
        Ok(HttpClient::new(&address, Some(key.trim().to_owned()))?)
    }

    /// A new join token.
    ///
    /// # Errors
    /// If the head refuses.
    pub async fn join_token(&self) -> Result<String> {
        let request = CreateTokenRequest::default();
        let admin = self.admin()?;
        let created: TokenCreated = admin.post(mesh_api::paths::TOKENS, &request).await?;
        Ok(created.token)
    }

    /// The registry, as `/v1/mesh` shows it.
    ///
    /// # Errors
    /// If the head does not answer.
    pub async fn registry(&self) -> Result<mesh_api::Mesh> {
        // With the admin key, which also opens a head that wants API keys.
        Ok(self.admin()?.mesh().await?)
    }

    /// The workers that the head considers usable now, as the registry shows them.
    ///
    /// # Errors
    /// If the head does not answer.
    pub async fn usable_workers(&self) -> Result<Vec<mesh_api::Worker>> {
        Ok(usable(&self.registry().await?).cloned().collect())
    }

    /// Starts one more worker, with `toml` over the usual configuration, and does not wait until it can be asked. Returns its
    /// index in [`Mesh::workers`].
    ///
    /// # Errors
    /// If it does not start.
    pub async fn start_worker(&mut self, toml: &str) -> Result<usize> {
        let token = self.join_token().await?;
        self.start_worker_with_token(toml, &token).await
    }

    /// As [`Mesh::start_worker`], with a token of the caller's.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn start_worker_with_token(&mut self, toml: &str, token: &str) -> Result<usize> {
        let launcher = self.launcher.clone();
        self.launch_worker(&launcher, toml, token).await
    }

    /// As [`Mesh::start_worker`], by another launcher: in a network namespace, say.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn start_worker_by(&mut self, launcher: &Launcher, toml: &str) -> Result<usize> {
        let token = self.join_token().await?;
        self.launch_worker(launcher, toml, &token).await
    }

    async fn launch_worker(
        &mut self,
        launcher: &Launcher,
        toml: &str,
        token: &str,
    ) -> Result<usize> {
        self.workers_started += 1;
        let name = format!("worker-{}", self.workers_started);
        let config = self.worker_configuration(&name, toml, token)?;
        let worker = launcher.start("mesh-worker", &name, &config).await?;
        self.workers.push(worker);
        Ok(self.workers.len() - 1)
    }

    /// The launcher of this mesh's services.
    pub fn launcher(&self) -> &Launcher {
        &self.launcher
    }

    /// The configuration a worker of this mesh gets.
    ///
    /// # Errors
    /// If the model was not fetched.
    pub fn worker_configuration(&self, name: &str, toml: &str, token: &str) -> Result<Table> {
        let token_file = self.head.state_dir().join(format!("{name}.token"));
        fs::write(&token_file, token).with_context(|| token_file.display().to_string())?;
        let model = match &self.model {
            Some(model) => model.clone(),
            None => paths::smollm2()?,
        };
        let mut config = parse(
            r#"
            [http]
            listen = "127.0.0.1:0"
            [dcf]
            listen = "127.0.0.1:0"
            "#,
        );
        let head = self.head.address("quic")?.to_string();
        let token_file = token_file.display().to_string();
        config.insert("node_name".into(), name.into());
        config.insert("head".into(), head.into());
        config.insert("join_token_file".into(), token_file.into());
        config.insert("models".into(), vec![model.display().to_string()].into());
        overlay(&mut config, self.worker_config.clone());
        overlay(&mut config, parse(toml));
        Ok(config)
    }

    /// Starts a shim before the head, with `config` over the usual one.
    ///
    /// # Errors
    /// If it does not start.
    pub async fn start_shim(&mut self, extra: Table) -> Result<()> {
        let mut config = parse("listen = \"127.0.0.1:0\"\n[http]\nlisten = \"127.0.0.1:0\"\n");
        let head = self.head.address("dcf.clients")?.to_string();
        config.insert("heads".into(), vec![head].into());
        overlay(&mut config, extra);
        let mut shim = self.launcher.start("mesh-shim", "shim", &config).await?;
        shim.wait_for("/health").await?;
        self.shim = Some(shim);
        Ok(())
    }

    /// Waits until the head counts exactly `wanted` usable workers.
    ///
    /// # Errors
    /// If it does not within 90 s, or if a worker ends meanwhile.
    pub async fn wait_for_workers(&mut self, wanted: usize) -> Result<()> {
        let started = Instant::now();
        loop {
            let registry = self.registry().await?;
            if usable(&registry).count() == wanted {
                return Ok(());
            }
            // One that was killed on purpose is not missed; one that ended by itself is why the number is not reached.
            for worker in &mut self.workers {
                worker.fail_if_ended_by_itself()?;
            }
            if started.elapsed() > READY_LIMIT {
                let logs: String = self.workers.iter().map(Service::log_end).collect();
                bail!(
                    "the head has not {wanted} usable workers after {READY_LIMIT:?}: {registry:?}\n{logs}"
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Ends all services that run with SIGTERM, the head last, and checks that each exits with 0.
    ///
    /// # Errors
    /// If one does not end, or not with 0.
    pub async fn shutdown(mut self) -> Result<()> {
        let others = self.shim.iter_mut().chain(&mut self.workers);
        Service::terminate_all(others, SHUTDOWN_LIMIT).await?;
        Service::terminate_all([&mut self.head], SHUTDOWN_LIMIT).await
    }
}

fn usable(registry: &mesh_api::Mesh) -> impl Iterator<Item = &mesh_api::Worker> {
    let workers = registry.workers.iter();
    workers.filter(|worker| worker.state == "ready")
}

fn parse(toml: &str) -> Table {
    toml.parse().expect("the caller's own TOML")
}

/// Puts `over` over `table`, table by table.
fn overlay(table: &mut Table, over: Table) {
    for (key, value) in over {
        match (table.get_mut(&key), value) {
            (Some(toml::Value::Table(under)), toml::Value::Table(over)) => overlay(under, over),
            (_, value) => {
                table.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tests_configuration_goes_over_the_usual_one_key_by_key() {
        let mut config = parse("a = 1\n[http]\nlisten = \"x\"\nkeep = true\n");
        overlay(&mut config, parse("a = 2\n[http]\nlisten = \"y\"\n"));
        assert_eq!(
            config,
            parse("a = 2\n[http]\nlisten = \"y\"\nkeep = true\n")
        );
    }
}
