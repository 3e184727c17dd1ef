//! One service as a real process: started from a configuration, watched, signalled, cleaned up.

use std::ffi::OsStr;
use std::fmt::Display;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, ensure};
use mesh_client::http::HttpClient;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::paths;

/// Longest time until a service writes its addresses or becomes ready, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(20);

/// Folder of the binaries to start, with their environment and wrapper.
#[derive(Debug, Clone)]
pub struct Launcher {
    bin_dir: PathBuf,
    environment: Vec<(String, String)>,
    own_group: bool,
    wrapper: Vec<String>,
    state: Vec<PathBuf>,
}

impl Launcher {
    /// The services of the same build as the running test or benchmark, which cargo builds first.
    ///
    /// # Errors
    /// If they cannot be built, or if ONNX Runtime was not fetched.
    pub fn of_this_build() -> Result<Self> {
        Self::from_folder(&paths::bin_dir()?)
    }

    /// The services in a folder, of another build than the running program's, say.
    ///
    /// # Errors
    /// If ONNX Runtime was not fetched.
    pub fn from_folder(bin_dir: &Path) -> Result<Self> {
        Self::new(bin_dir, &paths::ort_library()?, false)
    }

    fn new(bin_dir: &Path, ort_library: &Path, own_group: bool) -> Result<Self> {
        let library = ort_library
            .to_str()
            .with_context(|| format!("{} is not UTF-8", ort_library.display()))?;
        Ok(Self {
            bin_dir: bin_dir.to_owned(),
            environment: vec![("ORT_DYLIB_PATH".to_owned(), library.to_owned())],
            own_group,
            wrapper: Vec::new(),
            state: Vec::new(),
        })
    }

    /// The services beside the running executable, with ONNX Runtime's library at `ort_library`. A Ctrl-C at the terminal
    /// does not reach them: the caller has to stop them.
    ///
    /// # Errors
    /// If a binary is missing.
    pub fn beside_this_program(ort_library: &Path) -> Result<Self> {
        let program = std::env::current_exe().context("where is this program?")?;
        let bin_dir = program
            .parent()
            .with_context(|| format!("{} has no folder", program.display()))?;
        for name in ["mesh-head", "mesh-worker", "mesh-shim"] {
            let is_there = bin_dir.join(name).is_file();
            let program = program.display();
            ensure!(
                is_there,
                "{name} is not beside {program}; `make build` builds all of them"
            );
        }
        Self::new(bin_dir, ort_library, true)
    }

    /// The same services, started by `wrapper` (`ip netns exec NAME`), which must become the service, not start it.
    #[must_use]
    pub fn wrapped(&self, wrapper: &[&str]) -> Self {
        Self {
            wrapper: wrapper.iter().map(|&word| word.to_owned()).collect(),
            ..self.clone()
        }
    }

    /// The same services, with `key` in their environment.
    #[must_use]
    pub fn with_environment(&self, key: &str, value: &str) -> Self {
        let mut other = self.clone();
        other.environment.push((key.to_owned(), value.to_owned()));
        other
    }

    /// The same services, beginning with copies of these files in their state folders: measurements of
    /// another service on this machine need not be repeated.
    #[must_use]
    pub fn with_state(&self, files: &[PathBuf]) -> Self {
        Self {
            state: files.to_vec(),
            ..self.clone()
        }
    }

    /// The executable called `name`.
    pub fn binary(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }

    /// Starts `program` with `config` as its configuration file, under the name `name`, and waits until it has written its
    /// addresses.
    ///
    /// # Errors
    /// If it cannot be started or ends at once; the message holds the end of its log.
    pub async fn start(&self, program: &str, name: &str, config: &toml::Table) -> Result<Service> {
        let dir = tempfile::Builder::new()
            .prefix(&format!("hydramesh-{name}-"))
            .tempdir()
            .context("a temporary folder")?;
        let mut service = Service {
            launcher: self.clone(),
            program: program.to_owned(),
            name: name.to_owned(),
            dir,
            child: None,
            addresses: Value::Null,
        };
        service.configure(config)?;
        if !self.state.is_empty() {
            fs::create_dir_all(service.state_dir()).context("the state folder")?;
        }
        for file in &self.state {
            let name = file.file_name().context("a file's name")?;
            fs::copy(file, service.state_dir().join(name))
                .with_context(|| file.display().to_string())?;
        }
        service.spawn().await?;
        Ok(service)
    }
}

/// A running service. Dropping it kills the process and removes its folder.
#[derive(Debug)]
pub struct Service {
    launcher: Launcher,
    program: String,
    name: String,
    dir: TempDir,
    child: Option<Child>,
    addresses: Value,
}

impl Service {
    /// The name it was started under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The service's state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The service's process id.
    ///
    /// # Panics
    /// If the service was stopped.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the service runs").id()
    }

    /// The address it listens at under `key` of its `addresses.json`.
    ///
    /// # Errors
    /// If it has none.
    pub fn address(&self, key: &str) -> Result<SocketAddr> {
        let address = self.addresses[key].as_str();
        let address = address.and_then(|address| address.parse().ok());
        address.with_context(|| {
            format!(
                "{} has no address {key:?} among {}",
                self.name, self.addresses
            )
        })
    }

    /// A client of its HTTP endpoints.
    ///
    /// # Errors
    /// If it has none.
    pub fn http(&self) -> Result<HttpClient> {
        Ok(HttpClient::new(&self.address("http")?.to_string(), None)?)
    }

    /// The service's log so far, over all restarts.
    pub fn log(&self) -> String {
        let bytes = fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Path of the service's log file.
    pub fn log_path(&self) -> PathBuf {
        self.dir.path().join("service.log")
    }

    /// Waits until `path` (`/health`, `/ready`) answers with success.
    ///
    /// # Errors
    /// If it does not within 90 s, or if the process ends; the message holds the end of its log.
    pub async fn wait_for(&mut self, path: &str) -> Result<()> {
        let http = self.http()?;
        let started = Instant::now();
        loop {
            self.fail_if_ended()?;
            let answer = tokio::time::timeout(Duration::from_secs(2), http.get_text(path)).await;
            match answer {
                Ok(Ok(_)) => return Ok(()),
                _ if started.elapsed() > START_LIMIT => {
                    return Err(self.error(format!(
                        "did not answer {path} within {START_LIMIT:?} (last: {answer:?})"
                    )));
                }
                _ => tokio::time::sleep(POLL).await,
            }
        }
    }

    /// Sends a signal: `SIGKILL` as a crash, `SIGSTOP` and `SIGCONT` as a machine that hangs and comes back.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.pid()).context("a process id")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// Kills the process with SIGKILL, like a crash, and waits until it is gone.
    ///
    /// # Errors
    /// If it is gone already.
    pub fn crash(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        if let Some(mut child) = self.child.take() {
            child.wait().context("waiting for a killed process")?;
        }
        Ok(())
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// If it does not end within `limit`.
    pub async fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait_for_end(limit).await
    }

    /// Sends SIGTERM to all that run, at once, waits for their ends and checks that each exits with 0.
    ///
    /// # Errors
    /// If one does not end within `limit`, or not with 0.
    pub async fn terminate_all<'a>(
        services: impl IntoIterator<Item = &'a mut Service>,
        limit: Duration,
    ) -> Result<()> {
        let running = services.into_iter().filter_map(|service| {
            let runs = service.is_running();
            runs.then_some(service)
        });
        let running: Vec<_> = running.collect();
        for service in &running {
            service.signal(Signal::SIGTERM)?;
        }
        for service in running {
            let status = service.wait_for_end(limit).await?;
            if !status.success() {
                return Err(service.error(format!("ended with {status}")));
            }
        }
        Ok(())
    }

    /// Waits until the process ends by itself.
    ///
    /// # Errors
    /// If it does not end within `limit`.
    pub async fn wait_for_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let started = Instant::now();
        let child = self.child.as_mut().context("the service runs")?;
        loop {
            if let Some(status) = child.try_wait().context("waiting for a process")? {
                self.child = None;
                return Ok(status);
            }
            if started.elapsed() > limit {
                return Err(self.error(format!("still runs {limit:?} later")));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// True if the process runs.
    pub fn is_running(&mut self) -> bool {
        let child = self.child.as_mut();
        child.is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Starts it again after [`Service::crash`] or [`Service::terminate`], with the same state and, `config` being `None`,
    /// the same configuration. Ports that the system chose may change.
    ///
    /// # Errors
    /// As [`Launcher::start`].
    pub async fn restart(&mut self, config: Option<&toml::Table>) -> Result<()> {
        ensure!(!self.is_running(), "{} runs still", self.name);
        if let Some(config) = config {
            self.configure(config)?;
        }
        self.spawn().await
    }

    /// Resident memory of the process, bytes.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn resident_bytes(&self) -> Result<u64> {
        resident_bytes(self.pid())
    }

    /// An error about this service, with the end of its log.
    pub fn error(&self, what: impl Display) -> Error {
        anyhow!("{} {what}; its log ends:\n{}", self.name, self.log_end())
    }

    /// The last 40 lines of its log.
    pub fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    fn configure(&self, config: &toml::Table) -> Result<()> {
        let path = self.config_path();
        fs::write(&path, config.to_string()).with_context(|| path.display().to_string())
    }

    /// Path of the service's configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.dir.path().join("config.toml")
    }

    async fn spawn(&mut self) -> Result<()> {
        let addresses = self.state_dir().join("addresses.json");
        let _ = fs::remove_file(&addresses);
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .context("the log file")?;
        let binary = self.launcher.binary(&self.program);
        let wrapper = self.launcher.wrapper.iter().map(OsStr::new);
        let mut words = wrapper.chain([binary.as_os_str()]);
        let mut command = Command::new(words.next().expect("a program at least"));
        command
            .args(words)
            .arg("--config")
            .arg(self.config_path())
            .arg("--state-dir")
            .arg(self.state_dir())
            .envs(self.launcher.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("the log file")?)
            .stderr(log);
        if self.launcher.own_group {
            command.process_group(0);
        }
        let child = command
            .spawn()
            .with_context(|| format!("starting {}", binary.display()))?;
        self.child = Some(child);

        let started = Instant::now();
        loop {
            // Written in one piece, but a reader may come in the middle of a rename on some file systems.
            if let Ok(bytes) = fs::read(&addresses)
                && let Ok(found) = serde_json::from_slice(&bytes)
            {
                self.addresses = found;
                return Ok(());
            }
            self.fail_if_ended()?;
            if started.elapsed() > START_LIMIT {
                return Err(self.error(format!("wrote no addresses within {START_LIMIT:?}")));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn fail_if_ended(&mut self) -> Result<()> {
        ensure!(self.child.is_some(), "{} was stopped", self.name);
        self.fail_if_ended_by_itself()
    }

    pub(crate) fn fail_if_ended_by_itself(&mut self) -> Result<()> {
        if let Some(child) = self.child.as_mut()
            && let Some(status) = child.try_wait()?
        {
            self.child = None;
            return Err(self.error(format!("ended with {status}")));
        }
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        // The end of the log explains a failed test.
        if std::thread::panicking() {
            eprintln!("--- log of {}, its end ---\n{}", self.name, self.log_end());
        }
    }
}

/// Resident memory of a process, bytes.
///
/// # Errors
/// If the system does not report it.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| path.clone())?;
    let mut lines = status.lines();
    let line = lines
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .with_context(|| format!("VmRSS in {path}"))?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes * 1024)
}
