//! The hydramesh command line.
//!
//! [`Args`] is the command line, each command has a module, [`failure`] defines the exit codes.

#![forbid(unsafe_code)]

pub mod failure;

mod admin;
mod args;
mod ask;
mod audit;
mod bench;
mod chat;
mod curtain;
mod demo;
mod embed;
mod identity;
mod image;
mod input;
mod keys;
mod models;
mod nodes;
mod output;
mod pair;
mod probe;
mod profile;
mod rings;
mod root;
mod status;
mod token;
mod what_if;

use clap::CommandFactory;

pub use args::Args;
use args::Command;
use failure::Failure;
use output::Terminal;

/// Runs the command in `args`.
///
/// # Errors
/// The [`Failure`] to be shown, with its exit code.
pub fn run(args: Args) -> Result<(), Failure> {
    let terminal = Terminal::new(args.color);
    let head = &args.head;
    // Nothing of a mesh is needed; and at boot there is neither a network nor time to lose.
    let command = match args.command {
        Command::Completions { shell } => {
            let mut out = std::io::stdout();
            clap_complete::generate(shell, &mut Args::command(), "hydramesh", &mut out);
            return Ok(());
        }
        Command::Profile(args) => return profile::run(args, terminal),
        Command::Probe(args) => return probe::run(args, terminal),
        Command::BootConfig(args) => return probe::boot_config(args),
        Command::Audit(command) => return audit::run(head, command),
        command => command,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::failed(format!("starting the async runtime: {error}")))?;
    let result = runtime.block_on(async {
        match command {
            Command::Demo(args) => demo::run(args, terminal).await,
            Command::Ask(args) => ask::run(head, args, terminal).await,
            Command::Embed(args) => embed::run(head, args).await,
            Command::Image(args) => image::run(head, args).await,
            Command::Chat(args) => chat::run(head, args, terminal).await,
            Command::Status(args) => status::run(head, args, terminal).await,
            Command::Plan(args) if args.machines.is_some() => what_if::plan(&args),
            Command::Plan(args) => rings::plan(head, args).await,
            Command::Drain(args) => rings::drain(head, args).await,
            Command::Undrain(args) => rings::undrain(head, args).await,
            Command::Rebalance(args) => rings::rebalance(head, args).await,
            Command::Models(command) => models::run(head, command).await,
            Command::Nodes(command) => nodes::run(head, command).await,
            Command::Identity(command) => identity::run(command),
            Command::Root(command) => root::run(head, command).await,
            Command::Token(command) => token::run(head, command).await,
            Command::Keys(command) => keys::run(head, command).await,
            Command::Bench(args) => bench::run(head, args).await,
            _ => unreachable!("done above"),
        }
    });
    // A thread that waits for the keyboard would hold the program up.
    runtime.shutdown_background();
    result
}
