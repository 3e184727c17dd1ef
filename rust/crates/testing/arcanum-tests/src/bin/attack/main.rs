//! Attacks of all kinds at once, beside honest clients who must not notice. `make attack` runs it.
//!
//! The program starts a mesh, asks undisturbed questions first, then starts itself once for each attack, as
//! processes of their own at the lowest priority, on machines of their own where network namespaces are
//! available. Strangers over QUIC are `scripts/stranger.py`, which shares no code with the mesh.

mod args;
mod honest;
mod phase;
mod plays;
mod run;
mod sources;
mod targets;
mod verdict;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use arcanum_tests::rogue::{ClaimedModel, Lie, Rogue, RogueEvent};
use clap::{Parser, Subcommand};

use plays::Play;
use targets::Targets;

/// Attacks a mesh of its own and shows whether honest clients notice.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    part: Option<Command>,
    #[command(flatten)]
    run: args::Args,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// One attack by its name, against the addresses in a file
    Play {
        /// Its name
        play: Play,
        /// The file, as the run writes it
        #[arg(long)]
        targets: PathBuf,
        /// How long
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// A worker that joins with a token and lies, by the lie's name
    Rogue {
        /// Its name
        lie: Lie,
        /// The file with addresses, as the run writes it
        #[arg(long)]
        targets: PathBuf,
        /// A join token of the mesh
        #[arg(long)]
        token: String,
        /// The worker's name
        #[arg(long)]
        name: Option<String>,
        /// How long
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// The names of all attacks
    List,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    // An attack is one thread, so that it does not use up the processors.
    let threads = if arguments.part.is_some() { 1 } else { 2 };
    let runtime = runtime.worker_threads(threads).enable_all().build()?;
    runtime.block_on(async {
        match arguments.part {
            None => run::run(arguments.run).await,
            Some(Command::Play {
                play,
                targets,
                seconds,
            }) => {
                plays::raise_file_limit();
                let targets = Targets::read(&targets)?;
                let tally = play.run(targets, Duration::from_secs(seconds)).await;
                println!("{}", tally.to_json(&play.name()));
                Ok(ExitCode::SUCCESS)
            }
            Some(Command::Rogue {
                lie,
                targets,
                token,
                name,
                seconds,
            }) => rogue(lie, &Targets::read(&targets)?, &token, name, seconds).await,
            Some(Command::List) => {
                for source in sources::all() {
                    println!("{source}");
                }
                Ok(ExitCode::SUCCESS)
            }
        }
    })
}

/// Lies, and prints what happens, a JSON object a line.
async fn rogue(
    lie: Lie,
    targets: &Targets,
    token: &str,
    name: Option<String>,
    seconds: u64,
) -> Result<ExitCode> {
    let claim = ClaimedModel {
        model: targets.model.clone(),
        fingerprint: targets.fingerprint.clone(),
        kind: mesh_proto::ModelKind::Chat,
        dimensions: 384,
        context: targets.context,
    };
    let name = name.unwrap_or_else(|| format!("liar-{}", lie.name()));
    let begun = Instant::now();
    let lasts = Duration::from_secs(seconds);
    // Strangers may keep newcomers out: a liar has patience.
    let _rogue = loop {
        let joined = Rogue::join_at(targets.quic, token, &name, lie, claim.clone(), tell).await;
        match joined {
            Ok(rogue) => break rogue,
            Err(error) => tell(&RogueEvent::Ended(format!("cannot join: {error:#}"))),
        }
        if begun.elapsed() > lasts {
            return Ok(ExitCode::FAILURE);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    tokio::time::sleep(lasts.saturating_sub(begun.elapsed())).await;
    Ok(ExitCode::SUCCESS)
}

fn tell(event: &RogueEvent) {
    let line = match event {
        RogueEvent::Welcomed => serde_json::json!({"event": "welcomed"}),
        RogueEvent::Asked(seen) => serde_json::json!({
            "event": "asked", "request": seen.request,
            "question": seen.question.chars().take(200).collect::<String>(),
        }),
        RogueEvent::Ended(reason) => serde_json::json!({"event": "ended", "reason": reason}),
    };
    println!("{line}");
}
