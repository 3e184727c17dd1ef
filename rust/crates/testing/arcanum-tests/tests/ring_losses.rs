//! A worker of a ring is lost in the middle of an answer, and the client sees nothing but a pause.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::{
    ChatQuestion, Cluster, Fault, RunningStreams, Seed, Undisturbed, alone, question,
};

const TOKENS: u32 = 96;

/// Disturbs one answer after the other, a worker being lost in each, and compares every one with the undisturbed one.
async fn answers_outlive(faults: &[Fault], mut cluster: Cluster, seed: &mut Seed) -> Result<()> {
    let asks: Vec<ChatQuestion> = (0..faults.len())
        .map(|number| match number % 4 {
            3 => ChatQuestion::sampled(question(number * 7), TOKENS, 1000 + number as u64),
            _ => ChatQuestion::greedy(question(number * 7), TOKENS),
        })
        .collect();
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;

    for (run, (fault, ask)) in faults.iter().zip(&asks).enumerate() {
        let ring = cluster.wait_for_whole_ring().await?;
        let stage = seed.below(ring.stages.len());
        let after = 1 + seed.below(TOKENS as usize * 3 / 4);
        let victim = ring.stages[stage].member.worker.clone();
        let what = format!(
            "run {run}: {victim} {fault} after {after} tokens; {}",
            ring.layout()
        );

        let running = RunningStreams::start(&cluster.client()?, std::slice::from_ref(ask));
        running.wait_for_tokens(after).await.context(what.clone())?;
        let struck = Instant::now();
        cluster.strike(&victim, *fault)?;
        let answers = match running.answers().await {
            Ok(answers) => answers,
            Err(error) => {
                println!("{}", cluster.log_ends());
                return Err(error.context(what));
            }
        };
        undisturbed
            .check(ask, &answers[0])
            .with_context(|| what.clone())?;
        println!(
            "{what}: a pause of {:?}, run again {} times",
            answers[0].gap_after(struck).unwrap_or_default(),
            answers[0].transcript.reruns,
        );
        cluster.remove(&victim);
        cluster.add_ring_worker().await?;
    }
    cluster.wait_for_whole_ring().await?;
    cluster.wait_until_idle().await?;
    cluster.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_outlives_the_death_of_any_worker() -> Result<()> {
    let _alone = alone();
    let mut seed = Seed::of_this_run(20_261_123);
    let cluster = Cluster::builder().ring_workers(4).stages(3).start().await?;
    answers_outlive(&[Fault::Kill; 8], cluster, &mut seed).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_outlives_workers_that_hang() -> Result<()> {
    let _alone = alone();
    let mut seed = Seed::of_this_run(20_261_124);
    let cluster = Cluster::builder().ring_workers(4).stages(3).start().await?;
    answers_outlive(&[Fault::Stop; 4], cluster, &mut seed).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_outlives_workers_that_are_cut_off() -> Result<()> {
    let _alone = alone();
    let mut seed = Seed::of_this_run(20_261_125);
    let builder = match Cluster::builder().ring_workers(4).stages(3).in_namespaces() {
        Ok(builder) => builder,
        Err(why) => {
            println!("skipped: no worker can be cut off here: {why:#}");
            return Ok(());
        }
    };
    answers_outlive(&[Fault::Cut; 4], builder.start().await?, &mut seed).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_worker_behind_a_slow_network_changes_no_token() -> Result<()> {
    let _alone = alone();
    let asks = [
        ChatQuestion::greedy(question(8), TOKENS),
        ChatQuestion::sampled(question(9), TOKENS, 5),
    ];
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;
    let mut cluster = match Cluster::builder().ring_workers(3).stages(3).in_namespaces() {
        Ok(builder) => builder.start().await?,
        Err(why) => {
            println!("skipped: no worker's network can be made slow here: {why:#}");
            return Ok(());
        }
    };
    let ring = cluster.wait_for_whole_ring().await?;
    let slow = ring.stages[1].member.worker.clone();
    let running = RunningStreams::start(&cluster.client()?, &asks);
    running.wait_for_tokens(20).await?;
    cluster.limit(&slow, 20)?;
    cluster.strike(&slow, Fault::Slow)?;
    let answers = running.answers().await?;
    undisturbed.check_all(&asks, &answers)?;
    cluster.relieve(&slow, Fault::Slow)?;

    // After its return it measures its slow network; until then its earlier report counts.
    cluster.kill(&slow)?;
    cluster.restart(&slow).await?;
    let begun = Instant::now();
    loop {
        let bandwidth = bandwidth_to_head(&cluster, &slow).await?;
        let megabits = bandwidth.unwrap_or_default() * 8.0 / 1e6;
        if (10.0..40.0).contains(&megabits) {
            println!("{megabits:.1} Mbit/s of 20 measured");
            break;
        }
        ensure!(begun.elapsed().as_secs() < 30, "{megabits} Mbit/s of 20");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    cluster.shutdown().await
}

/// Bytes per second, once that worker has measured them.
async fn bandwidth_to_head(cluster: &Cluster, worker: &str) -> Result<Option<f64>> {
    let mesh = cluster.mesh.registry().await?;
    let workers = mesh.workers.iter().filter(|shown| shown.name == worker);
    let paths = workers.flat_map(|shown| &shown.paths);
    let mut to_head = paths.filter(|path| path.worker.is_none());
    Ok(to_head.find_map(|path| path.bytes_per_second))
}
