//! All attacks of clients and strangers at once, for 20 s; `make attack` takes longer, and measures more strictly.

use std::process::Command;

use anyhow::{Context, Result, ensure};

#[test]
fn honest_clients_outlast_all_attacks_at_once() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let table = folder.path().join("attack.md");
    // Liars have tests of their own. Other programs of this machine move times, and a head that was built without optimisation
    // holds 10 MiB more from the beginning: the strict limits are for `make attack`.
    let arguments =
        "--calm 6 --seconds 20 --after 0 --clients 4 --ratio 30 --head-memory 96 --without liars";
    let output = Command::new(env!("CARGO_BIN_EXE_arcanum-attack"))
        .args(arguments.split(' '))
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
