//! Many streams on a machine that burns processor time beside them: no errors, no suspicions.

use std::time::Duration;

use anyhow::Result;
use arcanum_tests::load::under_load;
use arcanum_tests::report::Report;
use arcanum_tests::{ChatQuestion, Cluster, Undisturbed, question};

use crate::Args;

const STREAMS: usize = 16;

pub(crate) async fn load(args: &Args, report: &mut Report) -> Result<()> {
    if args.load == 0 {
        return Ok(());
    }
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let burn = args.burn.unwrap_or(2 * cores);
    let asks: Vec<ChatQuestion> = (0..16)
        .map(|number| match number % 4 {
            3 => ChatQuestion::sampled(question(number * 5), 120, number as u64),
            _ => ChatQuestion::greedy(question(number * 5), 120),
        })
        .collect();
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;
    let mut cluster = Cluster::builder()
        .ring_workers(4)
        .stages(3)
        .head_config("[ring]\nslots = 16\ncontext = 1024\n")
        .start()
        .await?;
    cluster.wait_for_whole_ring().await?;
    let lasts = Duration::from_secs(args.load);
    let outcome = under_load(&cluster, &undisturbed, &asks, STREAMS, burn, lasts).await?;
    if !outcome.is_clean() {
        println!("{}", cluster.log_ends());
    }
    for failure in &outcome.failures {
        report.failure(format!("load, {failure}"));
    }
    report.row(
        &format!(
            "{STREAMS} streams for {} s beside {burn} busy threads",
            args.load
        ),
        format!(
            "{} of {} answers identical",
            outcome.good,
            outcome.good + outcome.failures.len()
        ),
        Some(outcome.failures.is_empty()),
    );
    let alarms: Vec<String> = outcome
        .alarms
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    report.row(
        "false alarms meanwhile",
        alarms.join(", "),
        Some(outcome.alarms.iter().all(|(_, count)| *count == 0.0)),
    );
    report.row(
        "longest pause of each of these answers",
        outcome.gaps.to_string(),
        None,
    );
    cluster.shutdown().await
}
