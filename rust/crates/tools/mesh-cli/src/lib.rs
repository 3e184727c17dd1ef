//! The hydramesh command line.
//!
//! [`args`] is the command line, each command has a module, [`failure`] defines the exit codes.

#![forbid(unsafe_code)]

pub mod args;
pub mod failure;

mod admin;
mod ask;
mod bench;
mod chat;
mod demo;
mod embed;
mod input;
mod models;
mod nodes;
mod output;
mod pair;
mod probe;
mod profile;
mod rings;
mod status;
mod token;
mod what_if;

use clap::CommandFactory;

use args::{Args, Command};
use failure::Failure;
use output::Terminal;

/// Runs the command in `args`.
///
/// # Errors
/// The [`Failure`] to be shown, with its exit code.
pub fn run(args: Args) -> Result<(), Failure> {
    let terminal = Terminal::new(args.color);
    let head = &args.head;
    if let Command::Completions(args) = args.command {
        let mut command = Args::command();
        clap_complete::generate(
            args.shell,
            &mut command,
            "hydramesh",
            &mut std::io::stdout(),
        );
        return Ok(());
    }
    // Nothing of a mesh is needed; and at boot there is neither a network nor time to lose.
    match args.command {
        Command::Profile(args) => return profile::run(args, terminal),
        Command::Probe(args) => return probe::run(args, terminal),
        Command::BootConfig(args) => return probe::boot_config(args),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("starting the async runtime: {error}")))?;
    let result = runtime.block_on(async {
        match args.command {
            Command::Demo(args) => demo::run(args, terminal).await,
            Command::Ask(args) => ask::run(head, args, terminal).await,
            Command::Embed(args) => embed::run(head, args).await,
            Command::Chat(args) => chat::run(head, args, terminal).await,
            Command::Status(args) => status::run(head, args, terminal).await,
            Command::Plan(args) if args.machines.is_some() => what_if::plan(&args),
            Command::Plan(args) => rings::plan(head, args).await,
            Command::Drain(args) => rings::drain(head, args).await,
            Command::Undrain(args) => rings::undrain(head, args).await,
            Command::Rebalance(args) => rings::rebalance(head, args).await,
            Command::Models(args) => models::run(head, args.command).await,
            Command::Nodes(args) => nodes::run(head, args.command).await,
            Command::Token(args) => token::run(head, args.command).await,
            Command::Bench(args) => bench::run(head, args).await,
            Command::Probe(_)
            | Command::Profile(_)
            | Command::BootConfig(_)
            | Command::Completions(_) => {
                unreachable!("done above")
            }
        }
    });
    // A thread that waits for the keyboard would hold the program up.
    runtime.shutdown_background();
    result
}
