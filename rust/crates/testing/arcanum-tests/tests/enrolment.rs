//! Enrolment by real programs: a node waits for approval, joins, rotates its identity, is expelled.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use arcanum_tests::mesh_state::{idle_worker, registry_until, unready_until, worker_count};
use mesh_testkit::{Mesh, paths};
use serde_json::Value;

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let program = paths::bin_dir()?.join(program);
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(&program).args(arguments).output()?;
    let text = String::from_utf8_lossy(&stdout).into_owned();
    let errors = String::from_utf8_lossy(&stderr);
    ensure!(
        status.success(),
        "{program:?} {arguments:?}: {status}: {text}{errors}"
    );
    Ok(text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_waits_for_approval_joins_rotates_its_identity_and_is_revoked() -> Result<()> {
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let mut mesh = Mesh::builder()
        .head_config("[trust]\napproval = \"manual\"\n")
        .start()
        .await?;
    let url = format!("http://{}", mesh.head.address("http")?);
    let head_dir = mesh.head.state_dir();
    let head_dir = head_dir.to_str().context("UTF-8")?.to_owned();
    let admin = |arguments: &[&str]| {
        let head = ["--url", &url, "--state-dir", &head_dir];
        run("hydramesh", &[arguments, &head].concat())
    };
    let nodes = || -> Result<Vec<Value>> {
        let list: Value = serde_json::from_str(&admin(&["nodes", "list", "--json"])?)?;
        Ok(list["nodes"].as_array().context("a list")?.clone())
    };
    mesh.start_worker(&idle_worker(folder.path())).await?;
    unready_until(&mesh.workers[0], "waits for approval").await?;
    let waiting = nodes()?;
    ensure!(
        waiting.len() == 1 && waiting[0]["state"] == "pending",
        "{waiting:?}"
    );
    let id = waiting[0]["node_id"].as_str().context("an id")?.to_owned();
    let worker_dir = mesh.workers[0].state_dir();
    let worker_dir = worker_dir.to_str().context("UTF-8")?.to_owned();
    let identity = |command: &str| {
        run(
            "mesh-worker",
            &["identity", command, "--state-dir", &worker_dir],
        )
    };
    let shown = identity("show")?;
    ensure!(
        shown.contains(&id) && shown.contains("has not joined"),
        "{shown}"
    );
    ensure!(
        mesh.workers[0].log().contains(&id[..16]),
        "its log names it"
    );

    admin(&["nodes", "approve", &id[..8]])?;
    let registry = registry_until(&mesh, "it joins", |r| worker_count(r) == 1).await?;
    ensure!(
        registry.workers[0].node_id.as_deref() == Some(&*id),
        "{registry:?}"
    );
    let shown = identity("show")?;
    ensure!(
        shown.contains(&id) && shown.contains("signed by the mesh root"),
        "{shown}"
    );
    let shown = admin(&["nodes", "show", "worker-1"])?;
    ensure!(
        shown.contains("ml-dsa-65") && shown.contains(&id),
        "{shown}"
    );

    let rotated = identity("rotate")?;
    ensure!(rotated.contains(&id), "{rotated}");
    mesh.workers[0].crash()?;
    mesh.workers[0].restart(None).await?;
    let registry = registry_until(&mesh, "it comes back as another", |r| {
        r.workers.len() == 1 && r.workers[0].node_id.as_deref().is_some_and(|now| now != id)
    })
    .await?;
    ensure!(registry.workers[0].name == "worker-1", "{registry:?}");
    let all = nodes()?;
    let old = all
        .iter()
        .find(|node| node["node_id"] == *id)
        .context("the old one")?;
    ensure!(old["state"] == "replaced", "{old}");
    let shown = run(
        "hydramesh",
        &["identity", "show", "--state-dir", &worker_dir],
    )?;
    ensure!(
        !shown.contains(&id) && !shown.contains("next id"),
        "{shown}"
    );

    let at = Instant::now();
    admin(&["nodes", "revoke", "worker-1", "--reason", "sold"])?;
    registry_until(&mesh, "it is out", |r| worker_count(r) == 0).await?;
    ensure!(at.elapsed() < Duration::from_secs(5), "{:?}", at.elapsed());
    unready_until(&mesh.workers[0], "sold").await?;
    mesh.shutdown().await
}
