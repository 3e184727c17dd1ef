//! The service binary: arguments, configuration, telemetry, then a [`Shim`] until SIGTERM.

use std::{net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use clap::{Parser, Subcommand};
use mesh_service::{
    addresses, ask,
    config::{CommonArgs, ConfigError, Loaded, Loader},
    failure::describe,
    health::{self, Health},
    http,
    metrics::Metrics,
    notify::{self, Watchdog},
    reload::{self, Reloader},
    shutdown::Shutdown,
    telemetry,
};
use mesh_shim::{
    Config, Shim, ShimHandle,
    metrics::StatsCollector,
    shim::{BEAT_INTERVAL, Live},
};

/// The ingress of a mesh: takes tasks from many clients over UDP and hands them to a live head
///
/// Besides the flags: a TOML file, and the environment (SHIM_INGRESS_PORT, SHIM_NODE_TARGET=host:port[,host:port...],
/// HYDRAMESH_SHIM__KEY for every other key). Clients outside of this machine are served when `trusted_networks` names
/// their network, or, with `admit = "verified"`, when they show that they have the address they send from.
#[derive(Parser)]
#[command(name = "mesh-shim", version)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// Where clients send their datagrams; port 0 takes a free one [default: [::]:9999]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,

    /// The heads, the preferred one first, with commas between [default: 127.0.0.1:7777]
    #[arg(long, value_name = "HOST:PORT,...", alias = "head")]
    heads: Option<String>,

    /// Listen here for /health, /ready and /metrics [default: nowhere]
    #[arg(long, value_name = "ADDRESS")]
    http_listen: Option<SocketAddr>,

    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Ask the shim that runs with this configuration's state directory whether it is healthy: exit code 0 when it is
    ///
    /// Both `state_dir` and `http.listen` have to be set, by default neither is.
    Health,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-shim: {}", describe(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    let loaded = load(&args)?;
    loaded.value.validate()?;
    if loaded.report(&args.common)? {
        return Ok(());
    }
    if let Some(Command::Health) = args.command {
        let state_dir = loaded.value.state_dir.as_deref();
        let state_dir = state_dir.context("`state_dir` is not set, so the shim cannot be found")?;
        println!("{}", ask::get(state_dir, "/health").await?);
        return Ok(());
    }
    telemetry::init("shim", &args.common, loaded.value.log_level.as_deref())?;
    mesh_service::files::raise_open_files();
    serve(loaded.value, args).await
}

fn load(args: &Args) -> Result<Loaded<Config>, ConfigError> {
    Loader::<Config>::new("shim")
        .env("SHIM_INGRESS_PORT", "ingress_port")
        .env("SHIM_NODE_TARGET", "heads")
        .common(&args.common)
        .flag("--listen", "listen", args.listen)
        .flag(
            "--listen",
            "ingress_port",
            args.listen.map(|listen| listen.port()),
        )
        .flag("--heads", "heads", args.heads.as_ref())
        .flag("--http-listen", "http.listen", args.http_listen)
        .load()
}

async fn serve(config: Config, args: Args) -> anyhow::Result<()> {
    let shutdown = Shutdown::on_signals(config.drain_timeout)?;
    let watchdog = Watchdog::start();
    let heart = watchdog.register("bridge", 5 * BEAT_INTERVAL);
    let health = Health::starting().watched_by(watchdog);
    if let Some(dir) = &config.state_dir {
        mesh_service::files::open_state_dir(dir, &[])
            .with_context(|| format!("cannot create the state directory {}", dir.display()))?;
        addresses::remove(dir)?;
    }

    let shim = Shim::spawn_with(config.clone(), move || heart.beat())?;
    let mut bound = addresses::Addresses::from([("ingress".into(), shim.addr())]);
    let metrics = Arc::new(Metrics::new("shim", env!("CARGO_PKG_VERSION")));
    metrics.register(|registry| {
        registry.register_collector(Box::new(StatsCollector(Arc::clone(shim.stats()))))
    });
    if let Some(listen) = config.http.listen {
        let listener = http::bind(listen).await?;
        bound.insert("http".into(), listener.local_addr()?);
        let router = health::router(health.clone(), metrics);
        let router = http::Guard::of_listener(listen.ip(), &config.http.hosts).before(router);
        tokio::spawn(http::serve(
            listener,
            router,
            shutdown.token(),
            Duration::from_secs(1),
        ));
    }
    if let Some(dir) = &config.state_dir {
        addresses::write(dir, &bound)
            .with_context(|| format!("cannot write addresses.json to {}", dir.display()))?;
    }
    tracing::info!(listen = %shim.addr(), http = ?bound.get("http"), heads = ?config.heads, "shim is listening");
    notify::ready();

    let common = args.common.clone();
    let mut reloader = Reloader::new(&config, move || {
        let config = load(&args)?.value;
        config.validate()?;
        telemetry::check(config.log_level.as_deref())?;
        Ok(config)
    })?;
    let live = shim.live();
    tokio::spawn(reload::follow(shutdown.clone(), move || {
        let level = |config: &Config| config.log_level.clone();
        reloader.reload(&Live::KEYS, &common, level, |config, _| {
            live.reload(config.clone());
        })
    }));
    watch(&shim, &health, &shutdown).await;
    shim.drain();
    tokio::task::spawn_blocking(move || shim.join())
        .await?
        .map_err(|_| anyhow::anyhow!("the loop of the shim panicked"))?;
    tracing::info!("shim has stopped");
    Ok(())
}

/// Says whether a head is there, until the drain or the end of the loop.
async fn watch(shim: &ShimHandle, health: &Health, shutdown: &Shutdown) {
    let mut was_ready = None;
    while !shutdown.is_draining() && shim.is_running() {
        let ready = shim.stats().live_heads.get() > 0;
        if was_ready != Some(ready) {
            was_ready = Some(ready);
            if ready {
                health.set_ready();
                notify::status("a head is live");
            } else {
                health.set_unready("no head has answered lately");
                notify::status("no head has answered lately");
            }
        }
        tokio::select! {
            () = shutdown.draining() => {}
            () = tokio::time::sleep(Duration::from_millis(200)) => {}
        }
    }
    health.set_unready("shutting down");
}
