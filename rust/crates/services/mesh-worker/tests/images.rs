//! The program of a build that makes images.

use std::process::Command;

/// Linkers leave out libraries that nothing refers to, and `libtorch.so` is the one that brings those for GPUs.
#[test]
fn the_worker_is_linked_against_all_of_libtorch() {
    // The dynamic loader then lists a program's libraries and does not start it.
    let listed = Command::new(env!("CARGO_BIN_EXE_mesh-worker"))
        .env("LD_TRACE_LOADED_OBJECTS", "1")
        .output()
        .unwrap();
    let text = String::from_utf8(listed.stdout).unwrap();
    let found = |name: &str| {
        let libraries = text.lines().filter_map(|line| line.trim().split_once(" => "));
        libraries
            .filter(|(library, path)| *library == name && path.starts_with('/'))
            .count()
    };
    for name in ["libtorch.so", "libtorch_cpu.so"] {
        assert_eq!(found(name), 1, "{name} in {text}");
    }
}
