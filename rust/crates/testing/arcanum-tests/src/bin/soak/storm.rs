//! Random faults under load, for minutes: no token lost or doubled, no KV rows left over, memory flat.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use arcanum_tests::gaps::Gaps;
use arcanum_tests::report::Report;
use arcanum_tests::{
    ChatQuestion, Cluster, Fault, RingView, RunningStreams, Seed, StreamedAnswer, Undisturbed,
    question,
};
use mesh_testkit::client::http::HttpClient;

use crate::{Args, CALM, where_cut_off};

const CLIENTS: usize = 4;
/// Requests that a ring runs at once.
const SLOTS: usize = 8;
const EVERY: Duration = Duration::from_secs(20);
/// Duration of a hang, a cut or slowness of a worker.
const LASTS: Duration = Duration::from_secs(8);
/// More than this is not noise.
const GROWTH: u64 = 48 << 20;

pub(crate) async fn storm(args: &Args, report: &mut Report) -> Result<()> {
    if args.storm == 0 {
        return Ok(());
    }
    let mut seed = Seed::new(args.seed + 2);
    let asks: Vec<ChatQuestion> = (0..16)
        .map(|number| match number % 4 {
            3 => ChatQuestion::sampled(question(number * 5), 200, number as u64),
            _ => ChatQuestion::greedy(question(number * 5), 200),
        })
        .collect();
    let mut undisturbed = Undisturbed::new();
    undisturbed.learn(&asks).await?;

    let mut why_not = None;
    let builder = where_cut_off(Cluster::builder().ring_workers(5).stages(3), &mut why_not);
    let mut cluster = builder.start().await?;
    cluster.wait_for_whole_ring().await?;
    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let http = cluster.client()?;
            let (asks, over) = (asks.clone(), Arc::clone(&over));
            let first = seed.below(asks.len());
            Ok(tokio::spawn(one_client(http, asks, first + client, over)))
        })
        .collect::<Result<_>>()?;

    // Every slot has been used by then.
    tokio::time::sleep(EVERY / 2).await;
    let head_before = cluster.mesh.head.resident_bytes()?;
    let workers_before = largest_overhead(&mut cluster).await?;
    let started = Instant::now();
    let mut faults = 0;
    while started.elapsed() < Duration::from_secs(args.storm) {
        let next = Instant::now() + EVERY;
        let mut kinds = vec![Fault::Kill, Fault::Kill, Fault::Stop, Fault::Slow];
        if why_not.is_none() {
            kinds.push(Fault::Cut);
        }
        let fault = kinds[seed.below(kinds.len())];
        let names = cluster.names();
        let victim = names[seed.below(names.len())].clone();
        println!("{:.0} s: {victim} {fault}", started.elapsed().as_secs_f64());
        cluster.strike(&victim, fault)?;
        faults += 1;
        if fault == Fault::Kill {
            cluster.remove(&victim);
            cluster.add_ring_worker().await?;
        } else {
            tokio::time::sleep(LASTS).await;
            cluster.relieve(&victim, fault)?;
        }
        tokio::time::sleep_until(next.into()).await;
    }
    over.store(true, Ordering::Relaxed);

    let mut answers = 0;
    let mut gaps = Gaps::default();
    let mut wrong = 0;
    for (client, task) in clients.into_iter().enumerate() {
        let ended = tokio::time::timeout(CALM * 2, task).await;
        let outcomes = ended.with_context(|| format!("client {client} does not end"))??;
        for (ask, outcome) in outcomes {
            answers += 1;
            let checked = outcome.and_then(|answer| {
                undisturbed.check(&ask, &answer)?;
                Ok(answer.longest_gap())
            });
            match checked {
                Ok(gap) => gaps.add(gap),
                Err(error) => {
                    wrong += 1;
                    report.failure(format!("storm, {:?}: {error:#}", ask.question));
                }
            }
        }
    }
    if wrong > 0 {
        println!("{}", cluster.log_ends());
    }
    report.row(
        &format!("{faults} faults in {} s at {CLIENTS} clients", args.storm),
        format!("{} of {answers} answers identical", answers - wrong),
        Some(wrong == 0),
    );
    report.row(
        "longest pause of each of these answers",
        gaps.to_string(),
        None,
    );
    after_the_storm(&mut cluster, head_before, workers_before, report).await?;
    cluster.shutdown().await
}

async fn after_the_storm(
    cluster: &mut Cluster,
    head_before: u64,
    workers_before: u64,
    report: &mut Report,
) -> Result<()> {
    cluster.wait_until_idle().await?;
    // An unused slot may hold a few rows more in one part than in another, since rows of an ended answer are
    // not replayed. So every slot is used once more; then all parts must hold the same rows, and only those.
    let last: Vec<ChatQuestion> = (0..SLOTS)
        .map(|number| ChatQuestion::greedy(question(number * 11 + 50), 20))
        .collect();
    RunningStreams::start(&cluster.client()?, &last)
        .answers()
        .await?;
    cluster.wait_until_idle().await?;
    // Parts report four times a second at most, so it may take a moment until all of them have said so.
    let level = |ring: &RingView| {
        let mut parts = ring
            .parts()
            .map(|(layers, part)| part.kv_bytes / u64::from(layers));
        let first = parts.next();
        ring.serves() && ring.has_standbys() && parts.all(|bytes| Some(bytes) == first)
    };
    let ring = match cluster.wait_for_ring(level).await {
        Ok(ring) => ring,
        Err(_) => cluster.wait_for_whole_ring().await?,
    };
    let per_layer = || {
        let parts = ring.parts();
        parts.map(|(layers, part)| part.kv_bytes / u64::from(layers))
    };
    let least = per_layer().min().unwrap_or_default();
    let most = per_layer().max().unwrap_or_default();
    report.row(
        "KV bytes per layer that the parts of the idle ring hold, least and most",
        format!("{least}, {most}"),
        Some(least == most),
    );
    let head = cluster.mesh.head.resident_bytes()?;
    let workers = largest_overhead(cluster).await?;
    let mib = |bytes: u64| bytes >> 20;
    report.row(
        "resident memory of the head, before and after",
        format!("{} MiB, {} MiB", mib(head_before), mib(head)),
        Some(head < head_before + GROWTH),
    );
    report.row(
        "most resident memory of a worker besides weights and KV rows, before and after",
        format!("{} MiB, {} MiB", mib(workers_before), mib(workers)),
        Some(workers < workers_before + GROWTH),
    );
    Ok(())
}

/// The most memory that a worker holds besides the weights and KV rows that it reports.
async fn largest_overhead(cluster: &mut Cluster) -> Result<u64> {
    let rings = cluster.rings().await?;
    let mut most = 0;
    for name in cluster.names() {
        let parts = rings.iter().flat_map(RingView::parts);
        let own = parts.filter(|(_, part)| part.worker == name);
        let reported: u64 = own
            .map(|(_, part)| part.weight_bytes + part.kv_bytes + part.kept_bytes)
            .sum();
        let resident = cluster.worker(&name)?.resident_bytes()?;
        most = most.max(resident.saturating_sub(reported));
    }
    Ok(most)
}

/// Asks one question after the other until it is over.
async fn one_client(
    http: HttpClient,
    asks: Vec<ChatQuestion>,
    first: usize,
    over: Arc<AtomicBool>,
) -> Vec<(ChatQuestion, Result<StreamedAnswer>)> {
    let mut outcomes = Vec::new();
    for ask in asks.iter().cycle().skip(first) {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let outcome = tokio::time::timeout(CALM, ask.ask(&http)).await;
        let outcome = outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("no end within {CALM:?}")));
        let failed = outcome.is_err();
        outcomes.push((ask.clone(), outcome));
        if failed {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
    outcomes
}
