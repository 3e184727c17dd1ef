//! One loss after the other, each in the middle of an answer.

use std::time::Instant;

use anyhow::{Context, Result};
use arcanum_tests::gaps::Gaps;
use arcanum_tests::report::Report;
use arcanum_tests::{ChatQuestion, Cluster, Fault, RunningStreams, Seed, Undisturbed, question};

use crate::{Args, spread_ring, where_cut_off};

const TOKENS: u32 = 96;
/// Different questions; the same one disturbed in different places is worth as much.
const QUESTIONS: usize = 24;

pub(crate) async fn kills(args: &Args, report: &mut Report) -> Result<()> {
    let faults = vec![Fault::Kill; args.kills];
    runs("killed", &faults, args.seed, report).await
}

pub(crate) async fn silences(args: &Args, report: &mut Report) -> Result<()> {
    let faults: Vec<Fault> = (0..args.silences)
        .map(|run| [Fault::Stop, Fault::Cut][run % 2])
        .collect();
    runs("stopped or cut off", &faults, args.seed + 1, report).await
}

async fn runs(what: &str, faults: &[Fault], seed: u64, report: &mut Report) -> Result<()> {
    if faults.is_empty() {
        return Ok(());
    }
    let mut seed = Seed::new(seed);
    let asks: Vec<ChatQuestion> = (0..QUESTIONS)
        .map(|number| match number % 4 {
            3 => ChatQuestion::sampled(question(number * 7), TOKENS, number as u64),
            _ => ChatQuestion::greedy(question(number * 7), TOKENS),
        })
        .collect();
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;

    let mut why_not = None;
    let start = |why_not: &mut Option<String>| {
        let builder = Cluster::builder().ring_workers(4).stages(3);
        let builder = match faults.contains(&Fault::Cut) {
            true => where_cut_off(builder, why_not),
            false => builder,
        };
        builder.start()
    };
    let mut cluster = start(&mut why_not).await?;
    let mut gaps = Gaps::default();
    let failures = report.failures();
    for (run, fault) in faults.iter().enumerate() {
        let fault = match fault {
            Fault::Cut if why_not.is_some() => Fault::Stop,
            fault => *fault,
        };
        let ask = &asks[run % asks.len()];
        match one_run(&mut cluster, fault, ask, &undisturbed, &mut seed, &mut gaps).await {
            Ok(line) => println!("run {run}: {line}"),
            Err(error) => {
                report.failure(format!("run {run} ({fault}): {error:#}"));
                println!("{}", cluster.log_ends());
                drop(cluster);
                cluster = start(&mut why_not).await?;
            }
        }
    }
    let failed = report.failures() - failures;
    if let Some(why) = why_not {
        report.row("no worker was cut off", why, None);
    }
    report.row(
        &format!("answers with a worker {what} in their middle, compared token by token"),
        format!("{} of {} identical", faults.len() - failed, faults.len()),
        Some(failed == 0),
    );
    report.row(
        &format!("pause with a worker {what}, short context"),
        gaps.to_string(),
        None,
    );
    cluster.shutdown().await
}

async fn one_run(
    cluster: &mut Cluster,
    fault: Fault,
    ask: &ChatQuestion,
    undisturbed: &Undisturbed,
    seed: &mut Seed,
    gaps: &mut Gaps,
) -> Result<String> {
    let ring = spread_ring(cluster).await?;
    let victim = ring.stages[seed.below(ring.stages.len())]
        .member
        .worker
        .clone();
    let after = 1 + seed.below(ask.tokens as usize * 3 / 4);
    let line = format!("{victim} {fault} after {after} tokens; {}", ring.layout());
    let running = RunningStreams::start(&cluster.client()?, std::slice::from_ref(ask));
    running
        .wait_for_tokens(after)
        .await
        .with_context(|| line.clone())?;
    let struck = Instant::now();
    cluster.strike(&victim, fault)?;
    let answers = running.answers().await.with_context(|| line.clone())?;
    undisturbed
        .check(ask, &answers[0])
        .with_context(|| line.clone())?;
    let gap = answers[0].gap_after(struck).unwrap_or_default();
    gaps.add(gap);
    cluster.remove(&victim);
    cluster.add_ring_worker().await?;
    Ok(format!("{line}: {} ms", gap.as_millis()))
}
