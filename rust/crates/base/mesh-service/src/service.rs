//! The same program around every service: arguments, configuration, logging, signals, reloads, exit codes.
//!
//! A binary's `main` is a call of [`run`] with a type that implements [`Service`]. [`run`] then
//!
//! 1. parses the flags ([`CommonArgs`], the service's own, `health`, and its own subcommands);
//! 2. loads and checks the configuration, prints it if asked, and sets up logging;
//! 3. starts the service, and tells systemd when it is ready;
//! 4. reloads on SIGHUP and drains on the first signal that ends a service (see [`shutdown`](crate::shutdown)).
//!
//! Exit codes: 0 after a drain or a command, 1 with a message on standard error, 2 for arguments that cannot be parsed,
//! 128 + its number after a second signal.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::{ArgMatches, CommandFactory, FromArgMatches};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::runtime::Builder;

use crate::addresses::Addresses;
use crate::config::{CommonArgs, Loaded, Loader, units};
use crate::failure::describe;
use crate::notify::{self, Watchdog};
use crate::reload::{self, Reloader, Report};
use crate::shutdown::Shutdown;
use crate::{ask, files, telemetry};

/// A service, as its binary and [`run`] see it.
pub trait Service: 'static {
    /// The program, `mesh-head`. Without `mesh-` it names the service in files, variables and logs.
    const PROGRAM: &'static str;
    /// Description for `--help`; `-h` shows its first line.
    const ABOUT: &'static str;
    /// The keys of the configuration that [`Running`] applies while the service runs, besides `log_level`.
    const LIVE_KEYS: &'static [&'static str];
    /// Configuration type, with the keys `state_dir`, `drain_limit` and `log_level`.
    type Config: Clone + Default + Serialize + DeserializeOwned + Send + 'static;
    /// Flags besides [`CommonArgs`].
    type Flags: clap::Args + Clone + Send + 'static;
    /// Subcommands besides `health`; [`Infallible`](std::convert::Infallible) without any.
    type Command: clap::Subcommand;

    /// Adds the service's own names of keys: flags, environment variables, names that keys had before.
    fn layers(loader: Loader<Self::Config>, flags: &Self::Flags) -> Loader<Self::Config>;

    /// Checks rules that the types of single keys do not express.
    ///
    /// # Errors
    /// A sentence with the key, its value and what to do.
    fn check(config: &Self::Config) -> Result<()>;

    /// Runs one of the service's own subcommands. `config` loads the configuration.
    fn command(command: Self::Command, config: impl FnOnce() -> Result<Self::Config>)
    -> Result<()>;

    /// The runtime on which the service runs.
    fn runtime() -> Builder {
        Builder::new_multi_thread()
    }

    /// Starts the service, with a configuration that was checked. It is ready when this resolves.
    fn start(
        config: Self::Config,
        context: Context,
    ) -> impl Future<Output = Result<Running<Self::Config>>>;
}

/// Configuration and handles that a service starts with.
#[derive(Clone, Debug)]
pub struct Context {
    /// Handle that begins and observes the drain.
    pub shutdown: Shutdown,
    /// Watchdog for the service's loops.
    pub watchdog: Watchdog,
}

type Reload<C> = Box<dyn FnMut(&C, &mut Report) + Send>;

/// A running service.
pub struct Running<C> {
    addresses: Addresses,
    reload: Reload<C>,
    ended: Pin<Box<dyn Future<Output = Result<()>>>>,
}

impl<C> Running<C> {
    /// `addresses` are bound. `reload` puts the live keys of a fresh configuration into effect. `ended` resolves after a drain, or
    /// with what ended the service.
    pub fn new(
        addresses: Addresses,
        reload: impl FnMut(&C, &mut Report) + Send + 'static,
        ended: impl Future<Output = Result<()>> + 'static,
    ) -> Self {
        Self {
            addresses,
            reload: Box::new(reload),
            ended: Box::pin(ended),
        }
    }
}

/// Runs a service; the whole body of its `main`.
pub fn run<S: Service>() -> ExitCode {
    match obey::<S>(Args::of::<S>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {}", S::PROGRAM, describe(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

/// Runs a future for a subcommand.
///
/// # Errors
/// As the future, or if there can be no runtime.
pub fn block_on<T, E: Into<anyhow::Error>>(
    future: impl Future<Output = std::result::Result<T, E>>,
) -> Result<T> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(future).map_err(Into::into)
}

#[derive(Debug, clap::Parser)]
struct Args<F: clap::Args, C: clap::Subcommand> {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    own: F,
    #[command(subcommand)]
    command: Option<Command<C>>,
}

#[derive(Debug, clap::Subcommand)]
enum Command<C: clap::Subcommand> {
    /// Ask the running service with this state directory whether it is healthy: exit code 0 if it is
    Health {
        /// Ask whether it can serve requests, not only whether it lives
        #[arg(long)]
        ready: bool,
    },
    #[command(flatten)]
    Own(C),
}

impl<F: clap::Args, C: clap::Subcommand> Args<F, C> {
    /// Parses the process's arguments. Ends it with code 2 if they are wrong, with 0 after `--help` and `--version`.
    fn of<S: Service<Flags = F, Command = C>>() -> Self {
        let mut command = accept_set_anywhere(Self::command())
            .name(S::PROGRAM)
            .version(env!("CARGO_PKG_VERSION"))
            .about(S::ABOUT.lines().next())
            .long_about(S::ABOUT);
        let matches = command.clone().get_matches();
        Self::from_matches(&matches).unwrap_or_else(|error| error.format(&mut command).exit())
    }

    fn from_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut args = Self::from_arg_matches(matches)?;
        let mut inner = matches;
        while let Some((_, deeper)) = inner.subcommand() {
            let set = deeper.get_many::<String>(SET).unwrap_or_default();
            args.common.set.extend(set.cloned());
            inner = deeper;
        }
        Ok(args)
    }
}

/// Adds `--set` to the subcommands. As a global flag, only its values behind the last one would count.
fn accept_set_anywhere(command: clap::Command) -> clap::Command {
    let set = command.get_arguments().find(|arg| arg.get_id() == SET);
    match set.cloned() {
        Some(set) => command.mut_subcommands(|inner| accept_set_anywhere(inner.arg(set.clone()))),
        None => command,
    }
}

fn obey<S: Service>(args: Args<S::Flags, S::Command>) -> Result<()> {
    let (common, flags) = (args.common, args.own);
    if common.print_config || common.check_config {
        return report::<S>(&common, &flags);
    }
    match args.command {
        None => serve::<S>(common, flags),
        Some(Command::Health { ready }) => {
            let dir = CommonKeys::of(&load::<S>(&common, &flags)?.value)?.state_dir;
            let dir =
                dir.context("`state_dir` is not set, so the running service cannot be found")?;
            let path = if ready { "/ready" } else { "/health" };
            println!("{}", block_on(ask::get(&dir, path))?);
            Ok(())
        }
        Some(Command::Own(command)) => {
            S::command(command, || Ok(load::<S>(&common, &flags)?.value))
        }
    }
}

/// Handles `--print-config` and `--check-config`. The configuration is printed even if it is invalid.
fn report<S: Service>(common: &CommonArgs, flags: &S::Flags) -> Result<()> {
    let loaded = load::<S>(common, flags)?;
    if common.print_config {
        print!("{}", loaded.to_toml()?);
    }
    for warning in &loaded.warnings {
        eprintln!("{}: warning: {warning}", S::PROGRAM);
    }
    check::<S>(&loaded.value)?;
    if common.check_config {
        let source = loaded.file.as_ref().map(|path| path.display().to_string());
        let source = source.as_deref().unwrap_or("no file");
        eprintln!("configuration is good ({source}, environment and flags)");
    }
    Ok(())
}

fn serve<S: Service>(common: CommonArgs, flags: S::Flags) -> Result<()> {
    let loaded = load::<S>(&common, &flags)?;
    let shared = check::<S>(&loaded.value)?;
    telemetry::init(name::<S>(), &common, shared.log_level.as_deref())?;
    warn(&loaded);
    files::raise_open_files();
    let runtime = S::runtime().enable_all().build()?;
    let ended = runtime.block_on(live::<S>(loaded.value, shared, common, flags));
    // Bounded wait: a thread that still reads a file must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

async fn live<S: Service>(
    config: S::Config,
    shared: CommonKeys,
    common: CommonArgs,
    flags: S::Flags,
) -> Result<()> {
    let started = Instant::now();
    let shutdown = Shutdown::on_signals(shared.drain_limit)?;
    let context = Context {
        shutdown: shutdown.clone(),
        watchdog: Watchdog::start(),
    };
    let given = common.clone();
    let mut reloader = Reloader::new(&config, move || {
        let loaded = load::<S>(&given, &flags)?;
        check::<S>(&loaded.value)?;
        warn(&loaded);
        Ok(loaded.value)
    })?;
    let mut running = tokio::select! {
        running = S::start(config, context) => running?,
        () = shutdown.draining() => return Ok(()),
    };
    let addresses = &running.addresses;
    let state_dir = shared.state_dir.as_ref().map(tracing::field::debug);
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(?addresses, state_dir, seconds, "{} started", name::<S>());
    notify::ready();
    let live = [S::LIVE_KEYS, &[LOG_LEVEL]].concat();
    tokio::spawn(reload::follow(shutdown.clone(), move || {
        reloader.reload(&live, |fresh, report| {
            (running.reload)(fresh, report);
            let logged = CommonKeys::of(fresh)
                .and_then(|shared| Ok(telemetry::reload(&common, shared.log_level.as_deref())?));
            report.step(LOG_LEVEL, logged.map(|()| false));
        })
    }));
    tokio::select! {
        // A service without work ends as soon as it drains.
        biased;
        // The head, too, can order a drain.
        () = shutdown.draining() => {
            notify::status("draining");
            running.ended.await?;
        }
        ended = &mut running.ended => ended?,
    }
    tracing::info!("{} stopped", name::<S>());
    Ok(())
}

fn load<S: Service>(common: &CommonArgs, flags: &S::Flags) -> Result<Loaded<S::Config>> {
    let loader = Loader::new(name::<S>()).common(common);
    Ok(S::layers(loader, flags).load()?)
}

fn check<S: Service>(config: &S::Config) -> Result<CommonKeys> {
    S::check(config)?;
    let shared = CommonKeys::of(config)?;
    telemetry::check(shared.log_level.as_deref())?;
    Ok(shared)
}

fn warn<T>(loaded: &Loaded<T>) {
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
}

fn name<S: Service>() -> &'static str {
    S::PROGRAM.strip_prefix("mesh-").unwrap_or(S::PROGRAM)
}

/// The keys of every configuration that are acted on here.
#[derive(Debug, Deserialize)]
struct CommonKeys {
    state_dir: Option<PathBuf>,
    #[serde(with = "units::duration")]
    drain_limit: Duration,
    log_level: Option<String>,
}

impl CommonKeys {
    fn of(config: &impl Serialize) -> Result<Self> {
        Ok(toml::Table::try_from(config)?.try_into()?)
    }
}

/// The key of the log filter.
const LOG_LEVEL: &str = "log_level";
/// The field of [`CommonArgs`] with the keys that flags set.
const SET: &str = "set";

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Args)]
    struct NoFlags {}

    #[derive(Debug, clap::Subcommand)]
    enum Outer {
        Token {
            #[command(subcommand)]
            inner: Inner,
        },
    }

    #[derive(Debug, clap::Subcommand)]
    enum Inner {
        Create,
    }

    #[test]
    fn set_counts_before_and_behind_commands() {
        let set = |line: &str| {
            let command = accept_set_anywhere(Args::<NoFlags, Outer>::command());
            let matches = command.try_get_matches_from(line.split(' '));
            let args = Args::<NoFlags, Outer>::from_matches(&matches.expect("parsed"));
            args.expect("parsed").common.set
        };
        assert_eq!(set("mesh --set a=1 --set b=2"), ["a=1", "b=2"]);
        assert_eq!(set("mesh --set a=1 health --set a=2"), ["a=1", "a=2"]);
        assert_eq!(set("mesh health --set a=2"), ["a=2"]);
        let deep = "mesh --set a=1 token --set b=2 create --set c=3 --set d=4";
        assert_eq!(set(deep), ["a=1", "b=2", "c=3", "d=4"]);
    }
}
