//! The `hydramesh` command: parses arguments, runs a subcommand, reports failures.

use std::process::ExitCode;

use clap::Parser;
use mesh_cli::Args;

fn main() -> ExitCode {
    // `hydramesh … | head` ends quietly instead of with a panic in println!.
    mesh_cli::failure::end_quietly_on_broken_pipe();
    match mesh_cli::run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(failure.exit.code())
        }
    }
}
