//! Strangers at the head's QUIC port, by a client that shares no code with ours (`scripts/stranger.py`, on aioquic).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use mesh_net::quic;
use mesh_testkit::Mesh;
use serde_json::Value;

/// Longest time for a machine with a token to join while strangers attack. A place is free at once; the rest
/// is for machines that do other work, too.
const JOIN: Duration = Duration::from_secs(15);
/// Duration of each attack, in seconds.
const SECONDS: u64 = 8;
const HEAD: u64 = 64 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_get_nothing_and_keep_nobody_out() -> Result<()> {
    let _alone = alone();
    let fetched = Command::new("python3")
        .arg(script())
        .arg("--fetch")
        .status();
    if !fetched.is_ok_and(|status| status.success()) {
        println!("SKIPPED: aioquic cannot be had here");
        return Ok(());
    }
    let mut mesh = Mesh::builder().workers(0).start().await?;
    let head = mesh.head.address("quic")?;
    // The silent ones first, alone: together they would be in each other's way. All from an address of their own, as far as
    // loopback has such.
    let silent = attack(head, &["silent", "--count", "400"], "127.0.0.9")?;
    let mut kept_out = joins(&mesh, head, "silent", 2).await?;
    let mut resident = mesh.head.resident_bytes()?;
    let mut said = words(silent);
    let others = attack(head, &["others"], "127.0.0.10")?;
    kept_out.extend(joins(&mesh, head, "others", 2).await?);
    resident = resident.max(mesh.head.resident_bytes()?);
    println!("the head holds up to {} MiB", resident >> 20);
    said.extend(words(others));
    let count = |attack: &str, what: &str| {
        let found = said
            .iter()
            .find(|line| line["attack"] == format!("stranger:{attack}"));
        found
            .and_then(|line| line["counts"][what].as_u64())
            .unwrap_or_default()
    };
    for line in &said {
        println!("{line}");
    }
    ensure!(
        said.len() == 13,
        "{} of 13 attacks said what they did",
        said.len()
    );
    for (attack, mishap) in [
        ("tokens", "JOINED"),
        ("nodes", "WELCOMED"),
        ("impostor", "WELCOMED"),
        ("alpn", "WELCOMED"),
        ("classical", "IN"),
    ] {
        ensure!(count(attack, mishap) == 0, "{attack}: {mishap}");
        ensure!(
            count(attack, "refused") > 0,
            "{attack}: never refused, so never tried"
        );
    }
    ensure!(
        count("silent", "handshakes") > 0,
        "no handshake by X25519MLKEM768 was finished"
    );
    let (sent, received) = (
        count("versions", "bytes sent"),
        count("versions", "bytes received"),
    );
    ensure!(
        sent > 0 && received <= sent,
        "{sent} bytes of unknown versions are answered with {received}"
    );
    let unproven = |what: &str| count("half", &format!("bytes {what} of an unproven address"));
    let (sent, received) = (unproven("sent"), unproven("received"));
    ensure!(
        sent > 0 && received <= sent,
        "{sent} bytes of an unproven address are answered with {received}"
    );
    ensure!(kept_out.is_empty(), "kept out: {kept_out:#?}");
    ensure!(resident <= HEAD, "the head holds {resident} bytes");
    mesh.head.wait_for("/health").await?;
    ensure!(
        !mesh.head.log().contains("panicked"),
        "{}",
        mesh.head.log_end()
    );
    mesh.shutdown().await
}

/// Joins as new machines do, one after the other; says which could not.
async fn joins(
    mesh: &Mesh,
    head: SocketAddr,
    beside: &str,
    machines: usize,
) -> Result<Vec<String>> {
    let mut kept_out = Vec::new();
    for number in 0..machines {
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        let token = mesh.join_token().await?;
        let token = token.parse().map_err(|error| anyhow::anyhow!("{error}"))?;
        let folder = tempfile::tempdir()?;
        let asked = Instant::now();
        let name = format!("newcomer-{number} beside {beside}");
        let heads = [head];
        let joined = quic::join(&heads, &token, folder.path(), "newcomer");
        match tokio::time::timeout(JOIN, joined).await {
            Ok(Ok(_)) => println!("{name} joined in {:?}", asked.elapsed()),
            Ok(Err(error)) => kept_out.push(format!("{name}: {error}")),
            Err(_) => kept_out.push(format!("{name}: not within {JOIN:?}")),
        }
    }
    Ok(kept_out)
}

fn attack(head: SocketAddr, words: &[&str], bind: &str) -> Result<Child> {
    // It runs at low priority, so that it costs joining machines no time.
    Command::new("nice")
        .args(["-n", "10", "python3"])
        .arg(script())
        .arg(head.to_string())
        .args(words)
        .args(["--bind", bind])
        .args(["--seconds", &SECONDS.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting a stranger")
}

/// Counts that an attack printed at its end.
fn words(attack: Child) -> Vec<Value> {
    let output = attack.wait_with_output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

fn script() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(4);
    root.unwrap_or(Path::new(".")).join("scripts/stranger.py")
}
