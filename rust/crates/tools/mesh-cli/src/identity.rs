//! `hydramesh identity`: the ML-DSA identity of a node on this machine.

use mesh_net::trust::{TrustError, describe_identity, rotate_and_describe};

use crate::args::IdentityCommand;
use crate::failure::Failure;

pub(crate) fn run(command: IdentityCommand) -> Result<(), Failure> {
    let failed = |error: TrustError| {
        Failure::failed(error.to_string())
            .hint("Run this as root or as the user that the node runs as, and name its state folder with --state-dir.")
    };
    let text = match command {
        IdentityCommand::Show { state_dir } => describe_identity(&state_dir),
        IdentityCommand::Rotate { state_dir } => rotate_and_describe(&state_dir, "the node"),
    };
    print!("{}", text.map_err(failed)?);
    Ok(())
}
