//! The shim as a program: its flags, names of keys, and start.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Result, anyhow};
use mesh_service::{
    addresses::{self, Addresses},
    config::Loader,
    health::{self, Health},
    http,
    metrics::Metrics,
    notify,
    service::{Context, Running, Service},
    shutdown::Shutdown,
};
use tokio::runtime::Builder;

use crate::{
    bridge::Bridge,
    config::Config,
    metrics::StatsCollector,
    shim::{BEAT_INTERVAL, Shim, ShimHandle},
};

/// The shim's flags.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Flags {
    /// Where clients send their datagrams, UDP; port 0 takes a free one [default: [::]:9999]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,

    /// The heads, the preferred one first, with commas between [default: 127.0.0.1:7777]
    #[arg(long, value_name = "HOST:PORT,...", alias = "head")]
    heads: Option<String>,

    /// The old name of --http
    #[arg(long, hide = true, conflicts_with = "http")]
    http_listen: Option<SocketAddr>,
}

impl Service for Shim {
    const PROGRAM: &'static str = "mesh-shim";
    const ABOUT: &'static str = "The ingress of a HydraMesh: takes tasks from many clients over UDP and hands them to a live head\n\nClients outside of this machine are served when `trusted_networks` names their network, or, with `admit = \"verified\"`, when they show that they have the address they send from. `mesh-shim health` needs `state_dir` and `http.listen`; by default neither is set.";
    const LIVE_KEYS: &'static [&'static str] = &Bridge::LIVE_KEYS;
    type Config = Config;
    type Flags = Flags;
    type Command = Infallible;

    fn layers(loader: Loader<Config>, flags: &Flags) -> Loader<Config> {
        loader
            .env("SHIM_NODE_TARGET", "heads")
            .env("SHIM_INGRESS_PORT", "listen:port")
            .renamed("drain_timeout", "drain_limit")
            .renamed("ingress_port", "listen:port")
            .flag("--listen", "listen", flags.listen)
            .flag("--heads", "heads", flags.heads.as_ref())
            .old_flag("--http-listen", "--http", "http.listen", flags.http_listen)
    }

    fn check(config: &Config) -> Result<()> {
        Ok(config.check()?)
    }

    fn command(command: Infallible, _: impl FnOnce() -> Result<Config>) -> Result<()> {
        match command {}
    }

    /// The loop has a thread of its own.
    fn runtime() -> Builder {
        Builder::new_current_thread()
    }

    async fn start(config: Config, context: Context) -> Result<Running<Config>> {
        let Context { shutdown, watchdog } = context;
        let heart = watchdog.register("bridge", 5 * BEAT_INTERVAL);
        let health = Health::starting().watched_by(watchdog);
        if let Some(dir) = &config.state_dir {
            mesh_service::files::open_state_dir(dir, &[])?;
            addresses::remove(dir)?;
        }

        let shim = Shim::spawn_with(config.clone(), move || heart.beat())?;
        let mut bound = Addresses::from([("ingress".into(), shim.addr())]);
        let metrics = Arc::new(Metrics::new("shim", env!("CARGO_PKG_VERSION")));
        metrics.register(|registry| {
            registry.register_collector(Box::new(StatsCollector(Arc::clone(shim.stats()))));
        });
        let mut serving = None;
        if let Some(listen) = config.http.listen {
            let listener = http::bind(listen).await?;
            bound.insert("http".into(), listener.local_addr()?);
            let hosts = &config.http.hosts;
            serving = Some(health::serve(listener, hosts, health.clone(), metrics)?);
        }
        if let Some(dir) = &config.state_dir {
            addresses::write(dir, &bound)?;
        }
        let live = shim.live();
        let ended = async move {
            watch(&shim, &health, &shutdown).await;
            shim.drain();
            let joined = tokio::task::spawn_blocking(move || shim.join()).await?;
            // HTTP ends last.
            if let Some(serving) = serving {
                serving.end().await;
            }
            joined.map_err(|_| anyhow!("the loop of the shim panicked"))
        };
        let reload = move |fresh: &Config, _: &mut _| live.reload(fresh.clone());
        Ok(Running::new(bound, reload, ended))
    }
}

/// Keeps readiness up to date with the live heads, until the drain or the end of the loop.
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
