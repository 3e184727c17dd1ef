//! The long tests of rings: hundreds of losses, a storm of faults under load, and how long clients wait. `make soak` runs it.
//! With the feature `images` also those of images, which `make soak-images` runs alone.

#[cfg(feature = "images")]
mod images;
mod load;
mod losses;
mod speed;
mod storm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use arcanum_tests::clients::ANSWER_LIMIT;
use arcanum_tests::report::Report;
use arcanum_tests::{Cluster, ClusterBuilder, RingView, alone};
use clap::Parser;
use mesh_testkit::until_signal;

/// Loses workers of rings by the hundred and compares every answer with the undisturbed one.
#[derive(Debug, Parser)]
pub(crate) struct Args {
    /// Runs in which a worker is killed
    #[arg(long, default_value_t = 100)]
    kills: usize,
    /// Runs in which a worker hangs or is cut off
    #[arg(long, default_value_t = 100)]
    silences: usize,
    /// Seconds of random faults under load
    #[arg(long, default_value_t = 300)]
    storm: u64,
    /// Seconds of 16 streams beside threads that burn processor time
    #[arg(long, default_value_t = 120)]
    load: u64,
    /// How many such threads; two for each core by default
    #[arg(long)]
    burn: Option<usize>,
    /// Runs of each kind in which pauses are measured at about 1,000 tokens of context
    #[arg(long, default_value_t = 20)]
    pauses: usize,
    /// Pairs of answers by which the cost of mirroring is measured
    #[arg(long, default_value_t = 10)]
    pairs: usize,
    /// Images for each of 20 steps after which their worker is killed
    #[cfg(feature = "images")]
    #[arg(long, default_value_t = 5)]
    images: usize,
    /// Pairs of answers by which the cost of an image beside them is measured
    #[cfg(feature = "images")]
    #[arg(long, default_value_t = 7)]
    beside: usize,
    /// Decides every random choice
    #[arg(long, default_value_t = 20_261_123)]
    seed: u64,
    /// Where the table is written
    #[arg(long, default_value = "target/soak.md")]
    out: PathBuf,
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let _alone = alone();
    until_signal(soak(args)).await
}

async fn soak(args: Args) -> Result<ExitCode> {
    println!("seed {} (--seed sets another)", args.seed);
    let started = Instant::now();
    let mut report = Report::new("Soak of rings", args.seed);
    losses::kills(&args, &mut report).await?;
    losses::silences(&args, &mut report).await?;
    storm::storm(&args, &mut report).await?;
    load::load(&args, &mut report).await?;
    speed::pauses(&args, &mut report).await?;
    speed::mirror_cost(&args, &mut report).await?;
    #[cfg(feature = "images")]
    {
        images::kills(&args, &mut report).await?;
        images::beside_text(&args, &mut report).await?;
    }
    report.row(
        "the whole took",
        format!("{:.0} s", started.elapsed().as_secs_f64()),
        None,
    );
    report.write(&args.out)?;
    println!("\n{report}\nwritten to {}", args.out.display());
    Ok(if report.failed() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Workers that can be cut off where this machine allows it, and else not; says why not.
fn where_cut_off(builder: ClusterBuilder, why_not: &mut Option<String>) -> ClusterBuilder {
    match mesh_testkit::Namespaces::new() {
        // The one made here only shows that one can be made.
        Ok(_) => builder
            .in_namespaces()
            .unwrap_or_else(|error| unreachable!("it was possible a moment ago: {error:#}")),
        Err(error) => {
            *why_not = Some(format!("{error:#}"));
            builder
        }
    }
}

/// A whole ring whose stages lie on different workers as far as the head finds that better.
async fn spread_ring(cluster: &mut Cluster) -> Result<RingView> {
    let ring = cluster.wait_for_whole_ring().await?;
    if ring.distinct_members() == ring.stages.len() {
        return Ok(ring);
    }
    let said = cluster.rebalance().await?;
    let compared = said.rings.first();
    if compared.is_some_and(|ring| !ring.verdict.starts_with("nothing")) {
        // The new one comes beside the old one or after it.
        let old = ring.ring.clone();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(20) {
            let rings = cluster.rings().await?;
            if rings.iter().any(|ring| ring.ring != old && ring.serves()) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    cluster.wait_for_whole_ring().await
}

/// Longer than any answer may take.
const CALM: Duration = ANSWER_LIMIT;
