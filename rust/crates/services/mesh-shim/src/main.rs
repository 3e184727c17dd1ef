//! The `mesh-shim` service.

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_shim::main()
}
