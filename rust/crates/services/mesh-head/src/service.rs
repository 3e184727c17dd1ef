//! The head as a program: its flags, names of keys, subcommands, and start.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use mesh_net::trust;
use mesh_service::ask;
use mesh_service::config::Loader;
use mesh_service::service::{Context, Running, Service, block_on};
use mesh_service::shutdown::Drained;
use tracing::warn;

use crate::config::Config;
use crate::head::{Head, Live};

/// The head's flags.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Flags {
    /// DCF clients, UDP [default: [::]:7777]
    #[arg(long, value_name = "ADDRESS:PORT")]
    dcf_clients: Option<SocketAddr>,
    /// Worker bus, UDP [default: [::]:7778]
    #[arg(long, value_name = "ADDRESS:PORT")]
    dcf_workers: Option<SocketAddr>,
    /// Links of workers, QUIC [default: [::]:7780]
    #[arg(long, value_name = "ADDRESS:PORT")]
    quic: Option<SocketAddr>,
}

/// The head's subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// This head's ML-DSA identity
    Identity {
        /// What to do.
        #[command(subcommand)]
        command: IdentityCommand,
    },
    /// Join tokens, made by the head that runs with this state directory
    Token {
        /// What to do.
        #[command(subcommand)]
        command: TokenCommand,
    },
}

/// Subcommands about the identity.
#[derive(Debug, Subcommand)]
pub enum IdentityCommand {
    /// Print the node id, and what the mesh root says of it
    Show,
    /// Make a new key, which takes the place of the old one at the next start: for a key that somebody may
    /// have copied
    Rotate,
}

/// `mesh-head token`
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Print a new one-time join token
    Create {
        /// How long the token is good for, such as 30m, 12h
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = mesh_base::units::parse_duration)]
        ttl: Duration,
        /// The same in seconds: the old name
        #[arg(long, hide = true, conflicts_with = "ttl")]
        ttl_seconds: Option<u64>,
        /// A note for the list of tokens
        #[arg(long, default_value = "")]
        note: String,
    },
}

impl Service for Head {
    const PROGRAM: &'static str = "mesh-head";
    const ABOUT: &'static str = "The head of a HydraMesh: takes requests over HTTP (OpenAI API) and DCF/UDP, and gives them to workers";
    const LIVE_KEYS: &'static [&'static str] = &Live::KEYS;
    type Config = Config;
    type Flags = Flags;
    type Command = Command;

    fn layers(loader: Loader<Config>, flags: &Flags) -> Loader<Config> {
        loader
            .env("DCF_WORKER_TIMEOUT", "worker_timeout")
            .env("DCF_REQUEST_TIMEOUT", "request_timeout")
            .env("DCF_CLIENT_PORT", "dcf.clients:port")
            .env("DCF_WORKER_PORT", "dcf.workers:port")
            .env("DCF_HEALTH_PORT", "http.listen:port")
            .renamed("dcf.unverified_networks", "unverified_networks")
            .renamed("sharding", "ring")
            .flag("--dcf-clients", "dcf.clients", flags.dcf_clients)
            .flag("--dcf-workers", "dcf.workers", flags.dcf_workers)
            .flag("--quic", "quic.listen", flags.quic)
    }

    fn check(config: &Config) -> Result<()> {
        Ok(config.check()?)
    }

    fn command(command: Command, config: impl FnOnce() -> Result<Config>) -> Result<()> {
        let command = match command {
            Command::Token { command } => command,
            Command::Identity { command } => {
                let state_dir = config()?.state_dir;
                let text = match command {
                    IdentityCommand::Show => trust::describe_identity(&state_dir)?,
                    IdentityCommand::Rotate => {
                        trust::rotate_and_describe(&state_dir, Self::PROGRAM)?
                    }
                };
                print!("{text}");
                return Ok(());
            }
        };
        let TokenCommand::Create {
            ttl,
            ttl_seconds,
            note,
        } = command;
        if ttl_seconds.is_some() {
            eprintln!("mesh-head: warning: --ttl-seconds is an old name: use --ttl");
        }
        let seconds = ttl_seconds.unwrap_or(ttl.as_secs());
        println!("{}", create_token(&config()?.state_dir, seconds, &note)?);
        Ok(())
    }

    async fn start(config: Config, context: Context) -> Result<Running<Config>> {
        let head = Head::start_with(config, context.shutdown, context.watchdog).await?;
        let live = head.live().clone();
        Ok(Running::new(
            head.addresses().clone(),
            move |fresh, report| live.reload(fresh, report),
            async {
                if head.wait().await.context("the head's main task failed")? == Drained::TimedOut {
                    warn!("some answers were cut at the drain limit");
                }
                Ok(())
            },
        ))
    }
}

fn create_token(state_dir: &Path, ttl_seconds: u64, note: &str) -> Result<String> {
    let path = state_dir.join("admin.key");
    let key = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let body = serde_json::json!({ "ttl_seconds": ttl_seconds, "note": note }).to_string();
    let answer = block_on(ask::post(state_dir, "/v1/mesh/tokens", key.trim(), &body))?;
    let json: serde_json::Value = serde_json::from_str(&answer).unwrap_or_default();
    let token = json["token"].as_str().map(str::to_owned);
    token.with_context(|| format!("the head made no token: {answer}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_rings_work_by_their_old_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("head.toml");
        std::fs::write(&path, "[sharding]\nstages = 3\nmargin = 0.5\n").unwrap();
        let variables = [("HYDRAMESH_HEAD__SHARDING__SLOTS", "2")];
        let loader = Head::layers(Loader::new("head"), &Flags::default());
        let loaded = loader.file(&path).environment(variables).load().unwrap();
        let ring = &loaded.value.ring;
        assert_eq!((ring.stages, ring.margin, ring.slots), (3, 0.5, 2));
        let [file, variable] = &loaded.warnings[..] else {
            panic!("{:?}", loaded.warnings)
        };
        assert!(file.starts_with("`sharding` (") && file.ends_with("is an old name: use `ring`"));
        assert!(
            variable.ends_with("is an old name: use `ring.slots`"),
            "{variable}"
        );
    }
}
