//! One model over several machines gives the answers of one machine.

use anyhow::{Context, Result, ensure};
use arcanum_tests::clients::long_question;
use arcanum_tests::{ChatQuestion, Cluster, RunningStreams, Undisturbed, alone, question};

/// Short and long prompts, greedy and sampled.
fn questions(tokens: u32) -> Vec<ChatQuestion> {
    let mut asks: Vec<ChatQuestion> = (0..4)
        .map(|number| ChatQuestion::greedy(question(number * 11), tokens))
        .collect();
    asks.push(ChatQuestion::greedy(long_question(5, 300), tokens));
    asks.push(ChatQuestion::sampled(question(3), tokens, 77));
    asks
}

/// A ring of so many stages on as many workers answers like one worker.
async fn answers_like_one_worker(stages: usize, asks: &[ChatQuestion]) -> Result<()> {
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(asks).await?;
    let mut cluster = Cluster::builder()
        .ring_workers(stages)
        .stages(stages)
        .standbys(false)
        .start()
        .await?;
    let ring = cluster.wait_for_whole_ring().await?;
    println!("{stages} stages: {}", ring.layout());
    ensure!(ring.stages.len() == stages, "{ring:?}");
    let client = cluster.client()?;
    // One alone, then all at once: other requests in a step must not matter.
    let (first, others) = asks.split_first().context("questions")?;
    let alone = first.ask(&client).await?;
    undisturbed.check(first, &alone)?;
    for others in others.chunks(8) {
        let answers = RunningStreams::start(&client, others).answers().await?;
        undisturbed.check_all(others, &answers)?;
    }
    println!(
        "{stages} stages: {:.1} tokens per second alone",
        alone.decode_rate()
    );
    cluster.wait_until_idle().await?;
    cluster.shutdown().await?;
    // A head that ends has lost no worker.
    let log = cluster.mesh.head.log();
    let (_, end) = log.split_once("signal received").context("a signal")?;
    ensure!(!end.contains("WARN"), "{end}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_workers_give_the_tokens_of_one() -> Result<()> {
    let _alone = alone();
    let prompts = (0..20).map(|number| ChatQuestion::greedy(question(number * 5), 200));
    answers_like_one_worker(3, &prompts.collect::<Vec<_>>()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_do_two_four_and_five_however_uneven_their_shares() -> Result<()> {
    let _alone = alone();
    for stages in [2, 4, 5] {
        answers_like_one_worker(stages, &questions(16)).await?;
    }
    Ok(())
}
