//! The `mesh-head` service.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    mesh_base::allocator::give_back_freed();
    mesh_head::main()
}
