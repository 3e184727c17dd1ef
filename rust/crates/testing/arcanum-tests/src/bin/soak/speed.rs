//! Waiting times of clients, and the cost of standbys.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::clients::long_question;
use arcanum_tests::gaps::Gaps;
use arcanum_tests::report::Report;
use arcanum_tests::{ChatQuestion, Cluster, Fault, RunningStreams, Seed, Undisturbed};

use crate::{Args, spread_ring};

/// Tokens of context when a worker is lost, about.
const CONTEXT: usize = 1000;
const TOKENS: u32 = 60;

pub(crate) async fn pauses(args: &Args, report: &mut Report) -> Result<()> {
    if args.pauses == 0 {
        return Ok(());
    }
    let asks: Vec<ChatQuestion> = (0..args.pauses)
        .map(|number| ChatQuestion::greedy(long_question(number, CONTEXT), TOKENS))
        .collect();
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;
    let mut seed = Seed::new(args.seed + 3);
    for (standbys, fault) in [
        (true, Fault::Kill),
        (true, Fault::Stop),
        (false, Fault::Kill),
    ] {
        let with = if standbys { "with" } else { "without" };
        let mut cluster = Cluster::builder()
            .ring_workers(4)
            .stages(3)
            .standbys(standbys)
            .start()
            .await?;
        let mut all = Kinds::default();
        for (run, ask) in asks.iter().enumerate() {
            let context = || format!("run {run}, {fault} {with} standbys");
            let checked = one_pause(&mut cluster, fault, ask, &undisturbed, &mut seed, &mut all);
            if let Err(error) = checked.await.with_context(context) {
                report.failure(format!("{error:#}"));
                println!("{}", cluster.log_ends());
                return Ok(());
            }
        }
        let row = format!("pause, a member {fault} {with} standbys, {CONTEXT} tokens of context");
        report.row(&row, all.member.to_string(), None);
        let row = format!("pause, the driver {fault} {with} standbys, {CONTEXT} tokens of context");
        report.row(&row, all.driver.to_string(), None);
        if !standbys {
            let row = "for comparison, members: loading that stage, and the prefill that it computed anew";
            report.row(row, all.anew.to_string(), None);
            let row = "pauses of members over that, median (wanted: at most 1.2)";
            report.row(row, format!("{:.2}", median(&all.shares)), None);
        }
        cluster.shutdown().await?;
    }
    Ok(())
}

/// Pauses by the role of the lost worker.
#[derive(Default)]
struct Kinds {
    member: Gaps,
    driver: Gaps,
    anew: Gaps,
    /// Pauses divided by the time for loading and recomputing.
    shares: Vec<f64>,
}

async fn one_pause(
    cluster: &mut Cluster,
    fault: Fault,
    ask: &ChatQuestion,
    undisturbed: &Undisturbed,
    seed: &mut Seed,
    all: &mut Kinds,
) -> Result<()> {
    let ring = spread_ring(cluster).await?;
    let stage = seed.below(ring.stages.len());
    let victim = ring.stages[stage].member.worker.clone();
    let running = RunningStreams::start(&cluster.client()?, std::slice::from_ref(ask));
    running.wait_for_tokens(10 + seed.below(20)).await?;
    let struck = Instant::now();
    cluster.strike(&victim, fault)?;
    let answer = running.answers().await?.remove(0);
    undisturbed.check(ask, &answer)?;
    let gap = answer.gap_after(struck).context("no token came after it")?;
    match victim == ring.driver() {
        true => all.driver.add(gap),
        false => all.member.add(gap),
    }
    // Parts report their counters four times a second.
    tokio::time::sleep(Duration::from_millis(600)).await;
    let after = cluster.wait_for_ring(|ring| ring.serves()).await?;
    let layers = ring.stages[stage].layers;
    // A driver's pause has the head's rerun in it, which is another matter.
    if victim != ring.driver()
        && let Some(new) = after.stages.iter().find(|new| new.layers == layers)
    {
        let anew = new.member.load_seconds + new.member.prefill_seconds;
        all.anew.add(Duration::from_secs_f64(anew.max(0.0)));
        if anew > 0.0 {
            all.shares.push(gap.as_secs_f64() / anew);
        }
    }
    let mesh = cluster.mesh.registry().await?;
    println!(
        "{victim} {fault}, stage {stage} of {}: {} ms; the driver says {:?}",
        ring.layout(),
        gap.as_millis(),
        mesh.recoveries.last()
    );
    cluster.remove(&victim);
    cluster.add_ring_worker().await?;
    Ok(())
}

/// The same question, with and without standbys in turn, on two clusters of equal workers.
pub(crate) async fn mirror_cost(args: &Args, report: &mut Report) -> Result<()> {
    if args.pairs == 0 {
        return Ok(());
    }
    let mut rates = [Vec::new(), Vec::new()];
    let mut clusters = Vec::new();
    for standbys in [false, true] {
        let builder = Cluster::builder().ring_workers(4).stages(3);
        let mut cluster = builder.standbys(standbys).start().await?;
        cluster.wait_for_whole_ring().await?;
        clusters.push(cluster);
    }
    for pair in 0..args.pairs {
        let ask = ChatQuestion::greedy(long_question(pair, 100), 200);
        // The first in turn alternates from pair to pair.
        for turn in 0..2 {
            let which = (pair + turn) % 2;
            let answer = ask.ask(&clusters[which].client()?).await?;
            rates[which].push(answer.decode_rate());
        }
    }
    let mut ratios: Vec<f64> = rates[1]
        .iter()
        .zip(&rates[0])
        .map(|(with, without)| with / without)
        .collect();
    ensure!(!ratios.is_empty(), "no pairs");
    ratios.sort_by(f64::total_cmp);
    report.row(
        "decode speed with standbys, and without, one client",
        format!(
            "{:.1} and {:.1} tokens per second; ratio of pairs: median {:.3}, {:.3} to {:.3} (n = {})",
            median(&rates[1]),
            median(&rates[0]),
            ratios[ratios.len() / 2],
            ratios[0],
            ratios[ratios.len() - 1],
            ratios.len()
        ),
        None,
    );
    for mut cluster in clusters {
        cluster.shutdown().await?;
    }
    Ok(())
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}
