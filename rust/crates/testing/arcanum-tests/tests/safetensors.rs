//! A model in Hugging Face's form, served like one in a GGUF file.

use anyhow::{Context, Result, ensure};
use arcanum_tests::clients::assert_same_tokens;
use arcanum_tests::{ChatQuestion, Cluster, RunningStreams, alone, question};
use mesh_model::synth::write_llama2c;
use mesh_testkit::paths;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_is_served_whole_and_in_a_ring_with_the_same_tokens() -> Result<()> {
    let _alone = alone();
    let dir = tempfile::tempdir()?;
    let folder = dir.path().join("stories15M");
    write_llama2c(&std::fs::read(paths::stories()?)?, &folder)?;
    let asks: Vec<ChatQuestion> = (0..4)
        .map(|number| match number {
            3 => ChatQuestion::sampled(question(5), 48, 7),
            _ => ChatQuestion::greedy(question(number * 11), 48),
        })
        .collect();

    let mut whole = Cluster::builder().model(&folder).whole(1).start().await?;
    whole.mesh.wait_for_workers(1).await?;
    let client = whole.client()?;
    let expected = RunningStreams::start(&client, &asks).answers().await?;
    whole.shutdown().await?;

    let mut cluster = Cluster::builder()
        .model(&folder)
        // The format that a worker with the whole model chooses for floats.
        .ring_workers_with(3, "[ring]\nformat = \"int8\"")
        .stages(3)
        .standbys(false)
        .start()
        .await?;
    let ring = cluster.wait_for_whole_ring().await?;
    ensure!(ring.stages.len() == 3, "{ring:?}");
    let answers = RunningStreams::start(&cluster.client()?, &asks)
        .answers()
        .await?;
    for (expected, found) in expected.iter().zip(&answers) {
        ensure!(!expected.transcript.tokens.is_empty());
        assert_same_tokens(&expected.transcript, &found.transcript)?;
    }
    cluster.wait_until_idle().await?;
    cluster.shutdown().await
}

/// The process that a template runs in is found, limited and replaced by a worker as it is installed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_template_without_bounds_costs_its_own_request_and_no_other() -> Result<()> {
    let _alone = alone();
    let dir = tempfile::tempdir()?;
    let folder = dir.path().join("stories15M");
    write_llama2c(&std::fs::read(paths::stories()?)?, &folder)?;
    std::fs::write(
        folder.join("chat_template.jinja"),
        "{% set n = namespace(x=messages[0].content) %}{% if 'grow' in n.x %}{% for i in range(60) %}\
         {% set n.x = n.x ~ n.x %}{% endfor %}{% endif %}{{ n.x }}",
    )?;
    let mut cluster = Cluster::builder().model(&folder).whole(1).start().await?;
    cluster.mesh.wait_for_workers(1).await?;
    let client = cluster.client()?;
    let good = ChatQuestion::greedy("Once upon a time", 8);
    let expected = good.ask(&client).await?;
    for _ in 0..2 {
        let refused = ChatQuestion::greedy("grow", 8).ask(&client).await;
        let error = format!("{:#}", refused.err().context("an answer")?);
        ensure!(error.contains("chat template was stopped"), "{error}");
        let answer = good.ask(&client).await?;
        assert_same_tokens(&expected.transcript, &answer.transcript)?;
    }
    cluster.shutdown().await
}
