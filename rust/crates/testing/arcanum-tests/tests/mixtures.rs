//! Mixtures of experts in a ring of three workers.

use anyhow::{Context, Result, ensure};
use arcanum_tests::clients::assert_same_tokens;
use arcanum_tests::{ChatQuestion, Cluster, RunningStreams, alone, question};
use mesh_model::synth::{Shape, Tokens, random_model};
use mesh_model::{Architecture, GgmlType};

/// Enough tokens that a worker can die in the middle of an answer.
const TOKENS: u32 = 300;

/// A ring of three workers answers as one worker does, undisturbed and when the worker of each of these stages dies in turn.
async fn answers_like_one_worker(shape: &Shape, ty: GgmlType, deaths: &[usize]) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("mixture.gguf");
    random_model(shape, ty, Tokens::Bytes, &path)?;
    let asks = [
        ChatQuestion::greedy(question(3), TOKENS),
        ChatQuestion::sampled(question(14), TOKENS, 7),
    ];
    let mut whole = Cluster::builder().model(&path).whole(1).start().await?;
    whole.mesh.wait_for_workers(1).await?;
    let expected = RunningStreams::start(&whole.client()?, &asks)
        .answers()
        .await?;
    whole.shutdown().await?;

    let mut cluster = Cluster::builder()
        .model(&path)
        .ring_workers(3)
        .stages(3)
        .start()
        .await?;
    for stage in std::iter::once(None).chain(deaths.iter().map(Some)) {
        let ring = cluster.wait_for_whole_ring().await?;
        ensure!(ring.stages.len() == 3, "{ring:?}");
        let running = RunningStreams::start(&cluster.client()?, &asks);
        let victim = stage.map(|stage| ring.stages[*stage].member.worker.clone());
        if let Some(victim) = &victim {
            running.wait_for_tokens(40).await?;
            cluster.kill(victim)?;
        }
        let what = || format!("{victim:?} dies; {}", ring.layout());
        let answers = running.answers().await.with_context(what)?;
        for (expected, found) in expected.iter().zip(&answers) {
            ensure!(!expected.transcript.tokens.is_empty());
            assert_same_tokens(&expected.transcript, &found.transcript).with_context(what)?;
        }
        if let Some(victim) = victim {
            cluster.remove(&victim);
            cluster.add_ring_worker().await?;
        }
    }
    cluster.wait_until_idle().await?;
    cluster.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mixture_gives_one_workers_tokens_in_a_ring_even_when_a_worker_dies() -> Result<()> {
    let _alone = alone();
    // Routing alone; sinks, windows and biases; latent attention and a shared expert.
    for (architecture, ty, deaths) in [
        (Architecture::Qwen3Moe, GgmlType::Q4_K, [0, 1].as_slice()),
        (Architecture::GptOss, GgmlType::MXFP4, &[1]),
        (Architecture::Deepseek2, GgmlType::Q4_0, &[2]),
    ] {
        let shape = Shape {
            layers: 6,
            ..Shape::tiny(architecture)
        };
        answers_like_one_worker(&shape, ty, deaths)
            .await
            .with_context(|| format!("{architecture:?}"))?;
    }
    Ok(())
}
