//! The `mesh-shim` service.

use std::process::ExitCode;

use mesh_shim::Shim;

fn main() -> ExitCode {
    mesh_service::run::<Shim>()
}
