//! The `mesh-head` service.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use mesh_head::Head;

fn main() -> ExitCode {
    mesh_base::allocator::give_back_freed();
    mesh_service::run::<Head>()
}
