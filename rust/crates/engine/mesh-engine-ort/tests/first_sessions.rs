//! Sessions that are the first of their process and are made at the same time.

mod common;

use std::process::Command;
use std::sync::Barrier;

use mesh_model::synth::{Shape, Tokens, random_model};
use mesh_model::{Architecture, GgmlType, Model};

use common::{options, whole};

/// Processes that are tried: without the registration about one in a hundred fails.
const PROCESSES: usize = 40;
const THREADS: usize = 2;

#[test]
fn the_first_stages_of_a_process_may_be_loaded_at_once() {
    let test = std::env::current_exe().unwrap();
    for _ in 0..PROCESSES {
        let output = Command::new(&test)
            .args(["--ignored", "--exact", "stages_loaded_at_once"])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
}

#[test]
#[ignore = "a process of the test above"]
fn stages_loaded_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let shape = Shape::tiny(Architecture::Llama);
    random_model(&shape, GgmlType::F32, Tokens::Bytes, &path).unwrap();
    let model = Model::open(&path).unwrap();
    // Loaded before, so that the threads reach their sessions at the same time.
    mesh_engine_ort::load_library(options(1, 16).library.as_deref()).unwrap();
    let barrier = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                barrier.wait();
                whole(&model, options(1, 16))
            });
        }
    });
}
