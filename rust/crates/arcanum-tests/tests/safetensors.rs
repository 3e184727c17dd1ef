//! A model in Hugging Face's form, served like one in a GGUF file.

use anyhow::{Result, ensure};
use arcanum_tests::clients::assert_same_tokens;
use arcanum_tests::{Ask, Cluster, Running, alone, question};
use mesh_model::synth::write_llama2c;
use mesh_testkit::paths;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_is_served_whole_and_in_a_ring_with_the_same_tokens() -> Result<()> {
    let _alone = alone();
    let dir = tempfile::tempdir()?;
    let folder = dir.path().join("stories15M");
    write_llama2c(&std::fs::read(paths::stories()?)?, &folder)?;
    let asks: Vec<Ask> = (0..4)
        .map(|number| match number {
            3 => Ask::sampled(question(5), 48, 7),
            _ => Ask::greedy(question(number * 11), 48),
        })
        .collect();

    let mut whole = Cluster::builder().model(&folder).whole(1).start().await?;
    whole.mesh.wait_for_workers(1).await?;
    let client = whole.client()?;
    let expected = Running::start(&client, &asks).answers().await?;
    whole.shutdown().await?;

    let mut cluster = Cluster::builder()
        .model(&folder)
        // What a worker with the whole model makes of floats.
        .shards_with(3, "[ring]\nformat = \"int8\"")
        .stages(3)
        .standbys(false)
        .start()
        .await?;
    let ring = cluster.wait_for_whole_ring().await?;
    ensure!(ring.stages.len() == 3, "{ring:?}");
    let answers = Running::start(&cluster.client()?, &asks).answers().await?;
    for (expected, found) in expected.iter().zip(&answers) {
        ensure!(!expected.transcript.tokens.is_empty());
        assert_same_tokens(&expected.transcript, &found.transcript)?;
    }
    cluster.wait_until_idle().await?;
    cluster.shutdown().await
}
