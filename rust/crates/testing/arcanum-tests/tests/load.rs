//! A busy machine is slow, not dead.

use std::time::Duration;

use anyhow::{Result, ensure};
use arcanum_tests::load::under_load;
use arcanum_tests::{
    ChatQuestion, Cluster, RingView, RunningStreams, Undisturbed, alone, question,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_streams_over_a_ring_beside_a_compiler_disturb_nobody() -> Result<()> {
    let _alone = alone();
    let asks: Vec<ChatQuestion> = (0..8)
        .map(|number| match number % 4 {
            3 => ChatQuestion::sampled(question(number * 5), 24, number as u64),
            _ => ChatQuestion::greedy(question(number * 5), 24),
        })
        .collect();
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;
    let mut cluster = Cluster::builder()
        .ring_workers(4)
        .stages(3)
        .standbys(false)
        .head_config("[ring]\nslots = 16\ncontext = 512\n")
        .start()
        .await?;
    let ring = cluster.wait_for_whole_ring().await?;
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let lasts = Duration::from_secs(8);
    let outcome = under_load(&cluster, &undisturbed, &asks, 16, 2 * cores, lasts).await?;
    println!(
        "{} answers, pauses {}, {:?}",
        outcome.good, outcome.gaps, outcome.alarms
    );
    ensure!(outcome.is_clean(), "{outcome:#?}\n{}", cluster.log_ends());
    let after = cluster.wait_for_whole_ring().await?;
    ensure!((&after.ring, after.epoch) == (&ring.ring, ring.epoch));
    moves_by_plan_alarm_nobody(&mut cluster, &undisturbed, &asks[0]).await?;
    cluster.shutdown().await
}

/// A member and then the driver are drained while an answer runs.
async fn moves_by_plan_alarm_nobody(
    cluster: &mut Cluster,
    undisturbed: &Undisturbed,
    ask: &ChatQuestion,
) -> Result<()> {
    let before = cluster.alarms();
    for stage in [0, 2] {
        let ring = cluster.wait_for_ring(RingView::serves).await?;
        let drained = ring.stages[stage].member.worker.clone();
        let running = RunningStreams::start(&cluster.client()?, std::slice::from_ref(ask));
        running.wait_for_tokens(2).await?;
        cluster.drain(&drained).await?;
        undisturbed.check(ask, &running.answers().await?[0])?;
        cluster.undrain(&drained).await?;
    }
    let after = cluster.alarms();
    ensure!(
        after.len() == before.len(),
        "a move by plan is logged as an alarm: {after:#?}, before {before:#?}"
    );
    Ok(())
}
