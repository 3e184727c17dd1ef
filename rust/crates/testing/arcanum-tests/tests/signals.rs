//! Real signals to real services: those that reload, those that drain, and ignored ones.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use arcanum_tests::clients::greedy;
use mesh_api::CompletionRequest;
use mesh_testkit::v5::{Datagram, SHUTDOWN, V5Client};
use mesh_testkit::{Launcher, Mesh, Service};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(60);
/// Signals that would kill a process that does not catch them.
const WITHOUT_EFFECT: [Signal; 8] = [
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPIPE,
    Signal::SIGXFSZ,
];

fn head(extra: &str) -> toml::Table {
    let ports = "[http]\nlisten = \"127.0.0.1:0\"\n[dcf]\nclients = \"127.0.0.1:0\"\nworkers = \"127.0.0.1:0\"\n[quic]\nlisten = \"127.0.0.1:0\"\n";
    format!("{extra}\n{ports}").parse().expect("TOML")
}

/// A worker without models: it watches an empty folder, for a v5.0.0 head that is not there.
fn worker(folder: &Path) -> toml::Table {
    format!(
        "local_models = {folder:?}\n[http]\nlisten = \"127.0.0.1:0\"\n[dcf]\nlisten = \"127.0.0.1:0\"\n[legacy]\nhead = \"127.0.0.1:9\"\n"
    )
    .parse()
    .expect("TOML")
}

fn shim(head: &str) -> toml::Table {
    format!("listen = \"127.0.0.1:0\"\nheads = [{head:?}]\n[http]\nlisten = \"127.0.0.1:0\"\n")
        .parse()
        .expect("TOML")
}

async fn logged(service: &Service, words: &str) -> Result<()> {
    let started = Instant::now();
    while !service.log().contains(words) {
        ensure!(
            started.elapsed() < LIMIT,
            "{} never logged {words:?}:\n{}",
            service.name(),
            service.log()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Sends SIGHUP and waits for the word about it.
async fn reload(service: &Service) -> Result<()> {
    let before = service.log().matches("reloaded: ").count();
    service.signal(Signal::SIGHUP)?;
    let started = Instant::now();
    while service.log().matches("reloaded: ").count() == before {
        ensure!(started.elapsed() < LIMIT, "no reload:\n{}", service.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[tokio::test]
async fn no_service_dies_of_a_signal_without_a_meaning_and_all_of_them_reload() -> Result<()> {
    let _alone = alone();
    let launcher = Launcher::of_this_build()?;
    let folder = tempfile::tempdir()?;
    let mut services = vec![
        launcher.start("mesh-head", "head", &head("")).await?,
        launcher
            .start("mesh-worker", "worker", &worker(folder.path()))
            .await?,
        launcher
            .start("mesh-shim", "shim", &shim("127.0.0.1:9"))
            .await?,
    ];
    for service in &mut services {
        service.wait_for("/health").await?;
        if service.name() == "worker" {
            logged(service, "worker started").await?;
        }
        for signal in WITHOUT_EFFECT {
            service.signal(signal)?;
        }
        reload(service).await?;
        reload(service).await?;
        service.wait_for("/health").await?;
        ensure!(!service.log().contains("draining"), "{}", service.log());
    }
    let signals = [Signal::SIGQUIT, Signal::SIGINT, Signal::SIGPWR];
    for (service, signal) in services.iter_mut().zip(signals) {
        service.signal(signal)?;
        let status = service.wait_for_end(LIMIT).await?;
        ensure!(
            status.success(),
            "{} after {signal}: {status}",
            service.name()
        );
        ensure!(service.log().contains("draining"), "{}", service.log());
    }
    Ok(())
}

async fn models_as(service: &Service, key: &str) -> Result<u16> {
    let url = format!("http://{}/v1/models", service.address("http")?);
    let answer = reqwest::Client::new()
        .get(url)
        .bearer_auth(key)
        .send()
        .await?;
    Ok(answer.status().as_u16())
}

#[tokio::test]
async fn a_head_reloads_keys_and_log_level_names_what_needs_a_restart_and_tells_systemd()
-> Result<()> {
    let _alone = alone();
    let dir = tempfile::tempdir()?;
    let keys = dir.path().join("keys");
    fs::write(&keys, "sk-old\n")?;
    let systemd = UnixDatagram::bind(dir.path().join("notify"))?;
    systemd.set_read_timeout(Some(LIMIT))?;
    let socket = dir.path().join("notify");
    let launcher = Launcher::of_this_build()?
        .with_environment("NOTIFY_SOCKET", socket.to_str().context("UTF-8")?)
        .with_environment("RUST_LOG", "");
    let config = |level: &str, queue: u32| {
        let mut config = head(&format!("log_level = {level:?}\nqueue_limit = {queue}"));
        let http = config["http"].as_table_mut().expect("a table");
        let path = keys.display().to_string();
        http.insert("api_keys_file".to_owned(), path.into());
        config
    };
    let mut service = launcher
        .start("mesh-head", "head", &config("warn", 7))
        .await?;
    service.wait_for("/health").await?;
    let mut told = Vec::new();
    let mut next = || -> Result<String> {
        let mut buffer = [0; 4_096];
        let len = systemd.recv(&mut buffer)?;
        told.push(String::from_utf8_lossy(&buffer[..len]).into_owned());
        Ok(told.last().cloned().unwrap_or_default())
    };
    while !next()?.contains("READY=1") {}
    ensure!(models_as(&service, "sk-old").await? == 200);
    ensure!(!service.log().contains("head started"), "{}", service.log());

    // The running state folder is a flag's or the file's: only the settings written below change.
    let path = service.config_path();
    let running: toml::Table = fs::read_to_string(&path)?.parse()?;
    let write = |fresh: toml::Table| -> Result<()> {
        let mut table = running.clone();
        table.extend(fresh);
        Ok(fs::write(&path, table.to_string())?)
    };
    fs::write(&keys, "sk-new\n")?;
    write(config("info", 8))?;
    service.signal(Signal::SIGHUP)?;
    logged(&service, "changed but needs a restart: queue_limit").await?;
    logged(&service, "reloaded: ").await?;
    let reloading = loop {
        let message = next()?;
        if message.contains("RELOADING=1") {
            break message;
        }
    };
    ensure!(reloading.contains("MONOTONIC_USEC="), "{reloading:?}");
    while !next()?.contains("READY=1") {}
    ensure!(models_as(&service, "sk-new").await? == 200);
    ensure!(models_as(&service, "sk-old").await? == 401);

    // A configuration that is wrong, and a file without keys, change nothing and are named.
    fs::write(&path, "no_such_key = 1\n")?;
    service.signal(Signal::SIGHUP)?;
    logged(&service, "no_such_key").await?;
    write(config("info", 8))?;
    fs::write(&keys, "\n")?;
    reload(&service).await?;
    logged(&service, "holds no API key").await?;
    ensure!(models_as(&service, "sk-new").await? == 200);
    ensure!(service.terminate(LIMIT).await?.success());
    Ok(())
}

#[tokio::test]
async fn systemd_hears_of_a_drain_that_the_head_orders() -> Result<()> {
    let _alone = alone();
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("notify");
    let systemd = UnixDatagram::bind(&socket)?;
    systemd.set_read_timeout(Some(LIMIT))?;
    let launcher = Launcher::of_this_build()?
        .with_environment("NOTIFY_SOCKET", socket.to_str().context("UTF-8")?);
    let head = std::net::UdpSocket::bind("127.0.0.1:0")?;
    head.set_read_timeout(Some(LIMIT))?;
    let mut config = worker(&dir.path().join("models"));
    fs::create_dir(dir.path().join("models"))?;
    config["legacy"]["head"] = head.local_addr()?.to_string().into();
    let mut service = launcher.start("mesh-worker", "worker", &config).await?;
    logged(&service, "worker started").await?;
    // After its first heartbeat the worker knows its head.
    head.recv(&mut [0; 2_048])?;
    let order = Datagram::new(SHUTDOWN, 1, "").encode();
    head.send_to(&order, service.address("dcf")?)?;
    ensure!(service.wait_for_end(LIMIT).await?.success());
    systemd.set_nonblocking(true)?;
    let mut told = String::new();
    let mut buffer = [0; 4_096];
    while let Ok(len) = systemd.recv(&mut buffer) {
        told.push_str(&String::from_utf8_lossy(&buffer[..len]));
    }
    ensure!(told.contains("STATUS=draining"), "{told}");
    Ok(())
}

#[tokio::test]
async fn the_second_signal_ends_a_shims_drain_at_once() -> Result<()> {
    let _alone = alone();
    let launcher = Launcher::of_this_build()?;
    // A head that takes tasks and is silent.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let config = shim(&silent.local_addr()?.to_string());
    let mut service = launcher.start("mesh-shim", "shim", &config).await?;
    let client = V5Client::new(service.address("ingress")?)?;
    client.send(1, "is anybody there?")?;
    let mut buffer = [0; 2_048];
    silent.set_read_timeout(Some(LIMIT))?;
    while silent.recv(&mut buffer)? < 20 || buffer[0] != mesh_testkit::v5::TASK {}
    service.signal(Signal::SIGTERM)?;
    logged(&service, "draining").await?;
    // A service that is shutting down ignores a reload.
    service.signal(Signal::SIGHUP)?;
    logged(&service, "not reloading").await?;
    ensure!(service.is_running(), "{}", service.log());
    service.signal(Signal::SIGINT)?;
    let status = service.wait_for_end(LIMIT).await?;
    ensure!(status.code() == Some(130), "{status}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_a_worker_and_a_head_at_once() -> Result<()> {
    let _alone = alone();
    let mut mesh = Mesh::builder()
        .workers(1)
        .worker_config("threads = 1\n")
        .start()
        .await?;
    let client = mesh.client()?;
    let models = client.models().await?;
    let request = CompletionRequest::new("Once upon a time", greedy(&models[0], 1_500));
    let mut stream = client.stream(request).await?;
    stream.next().await?.context("a first piece")?;
    // Work from the worker waits at the head for another one, so that the head has something to wait for,
    // too.
    let pairs = [
        (&mut mesh.workers[0], Signal::SIGTERM, 128 + 15),
        (&mut mesh.head, Signal::SIGINT, 128 + 2),
    ];
    for (service, second, code) in pairs {
        service.signal(Signal::SIGTERM)?;
        logged(service, "draining").await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        ensure!(service.is_running(), "{}", service.log_end());
        service.signal(second)?;
        let status = service.wait_for_end(Duration::from_secs(5)).await?;
        ensure!(status.code() == Some(code), "{}: {status}", service.name());
    }
    Ok(())
}

/// Under the old name of its drain limit.
#[tokio::test]
async fn a_shim_drains_on_sigterm_until_its_limit_and_ends_well() -> Result<()> {
    let _alone = alone();
    let launcher = Launcher::of_this_build()?;
    let silent = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let mut config = shim(&silent.local_addr()?.to_string());
    config.insert("drain_timeout".to_owned(), "1s".into());
    let mut service = launcher.start("mesh-shim", "shim", &config).await?;
    logged(&service, "`drain_timeout`").await?;
    let client = V5Client::new(service.address("ingress")?)?;
    client.send(1, "is anybody there?")?;
    let mut buffer = [0; 2_048];
    silent.set_read_timeout(Some(LIMIT))?;
    while silent.recv(&mut buffer)? < 20 || buffer[0] != mesh_testkit::v5::TASK {}
    let started = Instant::now();
    service.signal(Signal::SIGTERM)?;
    service.wait_for("/health").await?;
    let status = service.wait_for_end(LIMIT).await?;
    let took = started.elapsed();
    ensure!(status.success(), "{status}");
    ensure!(
        (1.0..20.0).contains(&took.as_secs_f64()),
        "the drain took {took:?}:\n{}",
        service.log()
    );
    logged(&service, "shim stopped").await
}

/// Python's pty gives a service a terminal of its own; when Python is killed, that terminal hangs up.
#[tokio::test]
async fn a_head_outlives_its_terminal_and_can_still_log_and_drain() -> Result<()> {
    let _alone = alone();
    let dir = tempfile::tempdir()?;
    let config = dir.path().join("head.toml");
    fs::write(&config, head("").to_string())?;
    let state = dir.path().join("state");
    let launcher = Launcher::of_this_build()?;
    let mut terminal = Command::new("python3")
        .args(["-c", "import pty, sys; pty.spawn(sys.argv[1:])"])
        .arg(launcher.binary("mesh-head"))
        .arg("--config")
        .arg(&config)
        .arg("--state-dir")
        .arg(&state)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .context("python3")?;
    let started = Instant::now();
    let address = loop {
        let text = fs::read_to_string(state.join("addresses.json")).unwrap_or_default();
        let addresses: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        if let Some(address) = addresses["http"].as_str() {
            break address.to_owned();
        }
        ensure!(started.elapsed() < LIMIT, "the head does not start");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let children = format!("/proc/{0}/task/{0}/children", terminal.id());
    let children = fs::read_to_string(children)?;
    let pid: i32 = children
        .split_whitespace()
        .next()
        .context("a child")?
        .parse()?;
    let signal = |signal| nix::sys::signal::kill(Pid::from_raw(pid), signal);
    terminal.kill()?;
    terminal.wait()?;
    // The hangup arrives when the terminal is gone; these signals write log lines, which have no reader any
    // more.
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        signal(Signal::SIGUSR1).context("the head has died of the hangup")?;
        let health = reqwest::get(format!("http://{address}/health")).await?;
        ensure!(health.status().is_success(), "{health:?}");
    }
    signal(Signal::SIGTERM)?;
    let started = Instant::now();
    // The orphan has another parent now: it is gone, or waits to be reaped once it has no memory any more.
    while fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()) {
        ensure!(started.elapsed() < LIMIT, "it does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
