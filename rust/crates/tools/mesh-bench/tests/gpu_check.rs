//! scripts/gpu-check with the CPU in place of a card.

use std::path::Path;
use std::process::{Command, Output};

use mesh_testkit::paths;

fn gpu_check(arguments: &[&str], cache: &Path, library: &Path) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../../scripts/gpu-check");
    let program = Path::new(env!("CARGO_BIN_EXE_gpu_check"));
    Command::new(script)
        .args(arguments)
        .arg("--bin-dir")
        .arg(program.parent().expect("a program is in a folder"))
        .env("HYDRAMESH_CACHE", cache)
        .env("ORT_DYLIB_PATH", library)
        .output()
        .expect("bash runs scripts")
}

/// The outcome and the text of a row.
fn row(output: &Output, label: &str) -> (String, String) {
    let table = String::from_utf8_lossy(&output.stdout);
    let line = table
        .lines()
        .find(|line| line.starts_with(&format!("| {label} |")));
    let line = line.unwrap_or_else(|| panic!("no {label} in {table}"));
    let cells: Vec<&str> = line.split('|').map(str::trim).collect();
    (cells[2].to_owned(), cells[3].to_owned())
}

#[test]
fn the_table_has_every_figure_of_the_cpu_and_says_what_was_not_run() {
    let cache = tempfile::tempdir().unwrap();
    let arguments = ["--provider", "ort-cpu", "--shape", "tiny"];
    let library = paths::ort_library().unwrap();
    let output = gpu_check(&arguments, cache.path(), &library);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    for (label, part) in [
        ("memory bandwidth", "GB/s by a copy"),
        ("int4 decode, batch 1", "of the bandwidth (aim 0.6)"),
        ("prefill", " tok/s"),
        ("int4 decode, batch 32", " tok/s"),
        ("half the memory", "tok/s with "),
        ("mixture, experts on the CPU", "; the CPU alone "),
    ] {
        let (outcome, text) = row(&output, label);
        assert!(
            ["ok", "below the aim"].contains(&&*outcome),
            "{label}: {outcome}"
        );
        assert!(text.contains(part), "{label}: {text}");
    }
    let (_, text) = row(&output, "half the memory");
    assert!(text.contains(" tokens equal"), "{text}");
    for label in [
        "conformance",
        "card",
        "Stable Diffusion 1.5, 512², 25 steps",
    ] {
        assert_eq!(row(&output, label).0, "not run");
    }
}

#[test]
fn what_fails_is_in_the_table_and_in_the_exit_status() {
    let cache = tempfile::tempdir().unwrap();
    let arguments = ["--provider", "ort-cpu", "--shape", "tiny"];
    let library = cache.path().join("libonnxruntime.so");
    let output = gpu_check(&arguments, cache.path(), &library);
    assert_eq!(output.status.code(), Some(1));
    for label in ["memory bandwidth", "half the memory"] {
        let (outcome, text) = row(&output, label);
        assert_eq!(outcome, "failed");
        assert!(text.contains("libonnxruntime.so"), "{text}");
    }
}
