//! A ring of which one member computes on WebGPU, with a software driver.

use anyhow::{Result, ensure};
use arcanum_tests::{ChatQuestion, Cluster, RunningStreams, alone, question};
use mesh_model::synth::{Shape, Tokens, random_model};
use mesh_model::{Architecture, GgmlType};
use mesh_testkit::lavapipe;

#[test]
fn webgpu_with_a_software_driver() {
    lavapipe::run(&["a_ring_with_a_webgpu_stage_survives_the_loss_of_another_member"]);
}

const TOKENS: u32 = 120;

/// A driver in software compiles shaders for steps of many rows for minutes.
const FEW_ROWS: &str = "step_rows = 8";

/// Rows of a GPU differ in their last digits, so after a loss a stream goes on with other tokens where two are
/// nearly as likely: the answers must be whole, not equal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a process of the test above"]
async fn a_ring_with_a_webgpu_stage_survives_the_loss_of_another_member() -> Result<()> {
    let _alone = alone();
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("tiny.gguf");
    let shape = Shape {
        layers: 6,
        ..Shape::tiny(Architecture::Qwen3)
    };
    random_model(&shape, GgmlType::Q4_K, Tokens::Bytes, &path)?;
    let mut cluster = Cluster::builder()
        .model(&path)
        .ring_workers_with(2, &format!("backend = \"cpu\"\n{FEW_ROWS}"))
        .ring_workers_with(1, &format!("backend = \"webgpu\"\n{FEW_ROWS}"))
        .stages(3)
        .start()
        .await?;
    let on_webgpu = cluster.mesh.workers[2].name().to_owned();
    let ring = cluster.wait_for_whole_ring().await?;
    let members = ring
        .stages
        .iter()
        .map(|stage| stage.member.worker.clone())
        .collect::<Vec<_>>();
    ensure!(members.contains(&on_webgpu), "{members:?}");
    let asks = [
        ChatQuestion::greedy(question(3), TOKENS),
        ChatQuestion::sampled(question(14), TOKENS, 7),
    ];
    let running = RunningStreams::start(&cluster.client()?, &asks);
    running.wait_for_tokens(20).await?;
    let victim = members.iter().find(|member| **member != on_webgpu);
    let victim = victim.expect("two members compute on the CPU").clone();
    cluster.kill(&victim)?;
    for answer in running.answers().await? {
        let tokens = answer.transcript.tokens.len();
        ensure!(
            tokens == TOKENS as usize,
            "{tokens} tokens after {victim} died"
        );
    }
    cluster.wait_until_idle().await?;
    cluster.shutdown().await
}
