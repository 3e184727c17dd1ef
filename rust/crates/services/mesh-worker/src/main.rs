//! The `mesh-worker` service.

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_worker::main()
}
