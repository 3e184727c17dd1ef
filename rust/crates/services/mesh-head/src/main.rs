//! The `mesh-head` service.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use mesh_head::config::{Config, ListenFlags};
use mesh_head::{Head, Live};
use mesh_service::config::CommonArgs;
use mesh_service::failure::describe;
use mesh_service::notify::Watchdog;
use mesh_service::reload::{self, Reloader};
use mesh_service::shutdown::{Drained, Shutdown};
use mesh_service::{ask, telemetry};

/// The head of a HydraMesh: takes requests over HTTP (OpenAI API) and DCF/UDP, and gives them to workers.
#[derive(Debug, Parser)]
#[command(name = "mesh-head", version)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    listen: ListenFlags,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask the head that runs with this state directory whether it is healthy: exit code 0 when it is
    Health,
    /// Join tokens, made by the head that runs with this state directory
    Token {
        #[command(subcommand)]
        command: TokenCommand,
    },
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Print a new one-time join token
    Create {
        /// Seconds for which it is good
        #[arg(long, default_value_t = 24 * 3600)]
        ttl_seconds: u64,
        /// A note for the list of tokens
        #[arg(long, default_value = "")]
        note: String,
    },
}

fn main() -> ExitCode {
    mesh_base::allocator::give_back_freed();
    match start() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mesh-head: {}", describe(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn start() -> Result<ExitCode> {
    let args = Args::parse();
    let loaded = Config::load(&args.common, &args.listen)?;
    loaded.value.check()?;
    if loaded.report(&args.common)? {
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    match args.command {
        None => {
            telemetry::init("head", &args.common, loaded.value.log_level.as_deref())?;
            mesh_service::files::raise_open_files();
            runtime.block_on(serve(loaded.value, args.common, args.listen))
        }
        Some(Command::Health) => runtime.block_on(health(&loaded.value.state_dir)),
        Some(Command::Token {
            command: TokenCommand::Create { ttl_seconds, note },
        }) => runtime.block_on(create_token(&loaded.value.state_dir, ttl_seconds, &note)),
    }
}

async fn serve(config: Config, common: CommonArgs, flags: ListenFlags) -> Result<ExitCode> {
    let shutdown = Shutdown::on_signals(config.drain_limit)?;
    let (again, listen) = (common.clone(), flags.clone());
    let mut reloader = Reloader::new(&config, move || {
        let config = Config::load(&again, &listen)?.value;
        config.check()?;
        telemetry::check(config.log_level.as_deref())?;
        Ok(config)
    })?;
    let head = Head::start_with(config, shutdown.clone(), Watchdog::start()).await?;
    let live = head.live().clone();
    tokio::spawn(reload::follow(shutdown, move || {
        let level = |config: &Config| config.log_level.clone();
        reloader.reload(&Live::KEYS, &common, level, |config, report| {
            live.reload(config, report);
        })
    }));
    match head.wait().await {
        Drained::Finished => Ok(ExitCode::SUCCESS),
        Drained::TimedOut => {
            tracing::warn!("some answers were cut at the drain limit");
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn health(state_dir: &Path) -> Result<ExitCode> {
    println!("{}", ask::get(state_dir, "/health").await?);
    Ok(ExitCode::SUCCESS)
}

async fn create_token(state_dir: &Path, ttl_seconds: u64, note: &str) -> Result<ExitCode> {
    let path = state_dir.join("admin.key");
    let key = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let body = serde_json::json!({ "ttl_seconds": ttl_seconds, "note": note }).to_string();
    let answer = ask::post(state_dir, "/v1/mesh/tokens", key.trim(), &body).await?;
    let json: serde_json::Value = serde_json::from_str(&answer).unwrap_or_default();
    match json["token"].as_str() {
        Some(token) => println!("{token}"),
        None => bail!("the head made no token: {answer}"),
    }
    Ok(ExitCode::SUCCESS)
}
