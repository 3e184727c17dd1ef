//! A mesh whose only worker is busy: real processes, a real engine.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::clients::greedy;
use arcanum_tests::{alone, first_model};
use mesh_api::{CompletionRequest, Readiness, paths};
use mesh_testkit::Mesh;

/// A second request waits in its worker's queue for three times the limit before the first token. It is answered when the first one ends;
/// meanwhile the head is ready, and nothing counts as a failure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_behind_a_long_answer_is_answered_and_the_head_stays_ready() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .workers(1)
        .head_config("first_token_limit = \"5s\"\n")
        .worker_config("threads = 1\nslots = 1\n")
        .start()
        .await?;
    let client = mesh.client()?;
    let model = first_model(&client).await?;
    let long = CompletionRequest::new("Once upon a time", greedy(&model, 8_000));
    let mut stream = client.stream(long).await?;
    stream.next().await?.context("a first piece")?;

    let second = {
        let client = client.clone();
        let request = CompletionRequest::new("Why?", greedy(&model, 4));
        tokio::spawn(async move { client.complete(&request).await })
    };
    let began = Instant::now();
    let mut ended = false;
    while began.elapsed() < Duration::from_secs(15) {
        let ready = client.get::<Readiness>(paths::READY).await;
        ready.context("/ready says no")?;
        let pause = tokio::time::Instant::now() + Duration::from_millis(100);
        while !ended && let Ok(piece) = tokio::time::timeout_at(pause, stream.next()).await {
            ended = piece?.is_none();
        }
        tokio::time::sleep_until(pause).await;
    }
    // The long answer is given up now, even if it has not ended.
    drop(stream);
    let answer = tokio::time::timeout(Duration::from_secs(60), second).await???;
    let tokens = answer.usage.flatten().map(|usage| usage.completion_tokens);
    ensure!(tokens == Some(4), "the second answer has {tokens:?} tokens");
    let workers = mesh.registry().await?.workers;
    ensure!(workers[0].failed == 0, "a failure was counted: {workers:?}");
    mesh.shutdown().await
}
