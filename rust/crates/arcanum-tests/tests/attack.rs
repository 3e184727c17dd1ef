//! All attacks at once, for less than a minute; `make attack` takes longer, and measures more strictly.

use std::process::Command;

use anyhow::{Context, Result, ensure};

#[test]
fn honest_clients_outlast_all_attacks_at_once() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let table = folder.path().join("attack.md");
    // Other tests' leftovers and other programs of this machine move times: the ratio is for `make attack`.
    let output = Command::new(env!("CARGO_BIN_EXE_arcanum-attack"))
        .args([
            "--calm",
            "8",
            "--seconds",
            "45",
            "--after",
            "0",
            "--clients",
            "4",
            "--ratio",
            "10",
        ])
        .arg("--out")
        .arg(&table)
        .output()
        .context("starting arcanum-attack")?;
    let words = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{words}\n{errors}");
    println!("{words}");
    Ok(())
}
