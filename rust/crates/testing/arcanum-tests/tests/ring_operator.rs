//! The operator's view of rings: readiness, `/v1/mesh`, metrics, and the commands.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::{
    ChatQuestion, Cluster, RingView, RunningStreams, alone, assert_same_tokens, question,
};
use mesh_api::Readiness;
use mesh_testkit::paths;

/// Runs `hydramesh` against the cluster; returns its output.
fn hydramesh(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    let url = format!("http://{}", cluster.mesh.head.address("http")?);
    let key = cluster.mesh.head.state_dir().join("admin.key");
    let output = Command::new(paths::bin_dir()?.join("hydramesh"))
        .args(arguments)
        .env("HYDRAMESH_URL", url)
        .env("HYDRAMESH_ADMIN_KEY_FILE", key)
        .stdin(Stdio::null())
        .output()?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "hydramesh {arguments:?} ends with {}:\n{printed}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(printed)
}

fn ensure_all(printed: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(printed.contains(word), "{word:?} is not in\n{printed}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readiness_metrics_and_commands_tell_of_rings() -> Result<()> {
    let _alone = alone();
    let mut cluster = Cluster::builder().ring_workers(4).stages(3).start().await?;
    let ring = cluster.wait_for_whole_ring().await?;
    let model = ring.model.clone();
    let client = cluster.client()?;

    // Ready, for this model and no other.
    cluster.mesh.head.wait_for("/ready").await?;
    let ready = async |model: &str| {
        let path = format!("{}?model={model}", mesh_api::paths::READY);
        client.get::<Readiness>(&path).await
    };
    ready(&model).await?;
    let unknown = ready("unknown").await;
    ensure!(unknown.is_err(), "{unknown:?}");

    let plan = hydramesh(&cluster, &["plan", &model])?;
    println!("{plan}");
    ensure_all(&plan, &["worker-1", "STANDBY", "-29"])?;
    let json: serde_json::Value =
        serde_json::from_str(&hydramesh(&cluster, &["plan", "--json", &model])?)?;
    let planned = json["plan"]["stages"].as_array().context("stages")?;
    ensure!(planned.len() == 3, "{json}");

    let status = hydramesh(&cluster, &["status"])?;
    println!("{status}");
    ensure_all(&status, &["worker-1", "worker-4", "serving", &model])?;
    for stage in &ring.stages {
        ensure_all(&status, &[&stage.member.worker])?;
    }

    let layout = cluster.wait_for_ring(RingView::serves).await?.layout();
    let compared = hydramesh(&cluster, &["rebalance", "--dry-run"])?;
    println!("{compared}");
    ensure_all(&compared, &[&model])?;
    let after = cluster.wait_for_ring(RingView::serves).await?;
    ensure!(
        after.layout() == layout && after.ring == ring.ring,
        "a dry run changed {layout} to {}",
        after.layout()
    );

    // A failover is counted and its pause kept.
    ensure!(
        cluster
            .metric("hydramesh_head_ring_failovers_total")
            .await?
            == 0.0
    );
    let running = RunningStreams::start(&client, &[ChatQuestion::greedy(question(4), 100)]);
    running.wait_for_tokens(30).await?;
    cluster.kill(&ring.stages[0].member.worker)?;
    running.answers().await?;
    let whole = cluster.wait_for_whole_ring().await?;
    let failovers = cluster
        .metric("hydramesh_head_ring_failovers_total")
        .await?;
    // A busy machine may make a worker look lost that is not.
    ensure!((1.0..=3.0).contains(&failovers), "{failovers} failovers");
    let gaps = cluster
        .metric("hydramesh_head_ring_gap_seconds_count")
        .await?;
    ensure!(gaps >= 1.0, "{gaps} gaps");
    // Gauges are set now and then.
    let begun = std::time::Instant::now();
    loop {
        let parts = cluster.metric("hydramesh_head_ring_stages").await?;
        if parts == 6.0 {
            break;
        }
        ensure!(begun.elapsed().as_secs() < 20, "{parts} parts");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let mesh = cluster.mesh.registry().await?;
    let victim = &ring.stages[0].member.worker;
    let mut recoveries = mesh.recoveries.iter();
    let told = recoveries.any(|recovery| recovery.reason.contains(victim));
    ensure!(told, "{:?}", mesh.recoveries);

    // Drained by the command, and back.
    let drained = whole.stages[0].member.worker.clone();
    println!("{}", hydramesh(&cluster, &["drain", &drained, "--wait"])?);
    let ring = cluster.wait_for_ring(RingView::serves).await?;
    ensure!(!ring.includes(&drained), "{}", ring.layout());
    println!("{}", hydramesh(&cluster, &["undrain", &drained])?);
    ChatQuestion::greedy(question(5), 10).ask(&client).await?;

    // Drained, it may go for good.
    hydramesh(&cluster, &["drain", &drained, "--wait"])?;
    cluster.kill(&drained)?;
    let begun = std::time::Instant::now();
    let absent = format!("drained and not connected: {drained}");
    while !hydramesh(&cluster, &["status"])?.contains(&absent) {
        ensure!(begun.elapsed().as_secs() < 20, "{drained} is still here");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let undrained = hydramesh(&cluster, &["undrain", &drained])?;
    ensure_all(&undrained, &["not connected"])?;
    ensure!(!hydramesh(&cluster, &["status"])?.contains(&absent));

    // Without workers the model is not ready, and it is said why.
    for name in cluster.names() {
        cluster.kill(&name)?;
    }
    let begun = std::time::Instant::now();
    while ready(&model).await.is_ok() {
        ensure!(begun.elapsed().as_secs() < 20, "ready without workers");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    cluster.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_expelled_is_replaced_in_mid_answer_and_its_peers_drop_it() -> Result<()> {
    let _alone = alone();
    let mut cluster = Cluster::builder().ring_workers(3).stages(2).start().await?;
    let ring = cluster.wait_for_whole_ring().await?;
    let client = cluster.client()?;
    let ask = ChatQuestion::greedy(question(7), 100);
    let undisturbed = ask.ask(&client).await?;

    let rogue = ring.stages[0].member.worker.clone();
    let peer = ring.stages[1].member.worker.clone();
    let running = RunningStreams::start(&client, &[ask]);
    running.wait_for_tokens(20).await?;
    let at = Instant::now();
    hydramesh(&cluster, &["nodes", "expel", &rogue, "--reason", "it lies"])?;
    let told = |log: String| log.contains("link closed: the node is expelled");
    while !told(cluster.worker(&peer)?.log()) {
        ensure!(
            at.elapsed() < Duration::from_secs(5),
            "{peer} still has links to {rogue}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for answer in running.answers().await? {
        assert_same_tokens(&undisturbed.transcript, &answer.transcript)?;
    }
    let after = cluster.wait_for_ring(RingView::serves).await?;
    ensure!(!after.includes(&rogue), "{}", after.layout());
    let listed = hydramesh(&cluster, &["nodes", "list"])?;
    println!("{listed}");
    ensure_all(&listed, &[&rogue, "expelled", "it lies"])?;
    // Its process goes on, says why it is out, and is not let in after a restart either.
    let service = cluster.worker(&rogue)?;
    service.crash()?;
    service.restart(None).await?;
    while !service
        .log()
        .contains("this worker was expelled from its mesh")
    {
        ensure!(
            at.elapsed() < Duration::from_secs(60),
            "{}",
            service.log_end()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mesh = cluster.mesh.registry().await?;
    ensure!(mesh.workers.len() == 2, "{mesh:?}");
    cluster.shutdown().await
}
