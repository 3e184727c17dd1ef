//! The `mesh-worker` service.

use std::process::ExitCode;

use mesh_worker::Worker;

fn main() -> ExitCode {
    mesh_service::run::<Worker>()
}
