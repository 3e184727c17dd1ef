//! A mixture of experts in a ring of three workers.

use anyhow::{Context, Result, ensure};
use arcanum_tests::clients::assert_same_tokens;
use arcanum_tests::{ChatQuestion, Cluster, RunningStreams, alone, question};
use mesh_model::synth::{Shape, Tokens, random_model};
use mesh_model::{Architecture, GgmlType};

/// Enough tokens that a worker can die in the middle of an answer.
const TOKENS: u32 = 300;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mixture_gives_one_workers_tokens_in_a_ring_even_when_a_worker_dies() -> Result<()> {
    let _alone = alone();
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("mixture.gguf");
    let shape = Shape {
        layers: 6,
        ..Shape::tiny(Architecture::Qwen3Moe)
    };
    random_model(&shape, GgmlType::Q4_K, Tokens::Bytes, &path)?;
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
    for stage in [None, Some(0), Some(1)] {
        let ring = cluster.wait_for_whole_ring().await?;
        ensure!(ring.stages.len() == 3, "{ring:?}");
        let running = RunningStreams::start(&cluster.client()?, &asks);
        let victim = stage.map(|stage: usize| ring.stages[stage].member.worker.clone());
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
