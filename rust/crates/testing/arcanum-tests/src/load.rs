//! Streams on a machine that has something else to do: nothing fails, and no worker counts as dead.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::clients::{ANSWER_LIMIT, ChatQuestion, StreamedAnswer};
use crate::cluster::Cluster;
use crate::gaps::Gaps;
use crate::undisturbed::Undisturbed;

/// Threads that keep processors busy as a compiler does. Dropping it ends them.
#[derive(Debug)]
pub struct Burn {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Burn {
    /// Starts `threads` threads that burn processor time.
    #[must_use]
    pub fn start(threads: usize) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let threads = (0..threads).map(|_| {
            let over = Arc::clone(&over);
            std::thread::spawn(move || {
                // Larger than a cache, so that memory is in use, too.
                let mut numbers = vec![1u64; 1 << 20];
                while !over.load(Ordering::Relaxed) {
                    for number in &mut numbers {
                        *number = number.wrapping_mul(6_364_136_223_846_793_005) ^ 7;
                    }
                    black_box(&numbers);
                }
            })
        });
        Self {
            threads: threads.collect(),
            over,
        }
    }
}

impl Drop for Burn {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The outcome of the streams.
#[derive(Debug, Default)]
pub struct LoadResult {
    /// Answers that are as they are without load.
    pub good: usize,
    /// Errors of the others.
    pub failures: Vec<String>,
    /// The longest pause of each good answer.
    pub gaps: Gaps,
    /// Changes of members, reruns of requests, and doubts about members, as the head counts them.
    pub alarms: Vec<(&'static str, f64)>,
}

impl LoadResult {
    /// True if nothing failed and no worker was suspected.
    pub fn is_clean(&self) -> bool {
        self.failures.is_empty() && self.alarms.iter().all(|(_, count)| *count == 0.0)
    }
}

/// Keeps `streams` streams open for as long as `lasts`, each asking one of `asks` after the other, while `burn` threads burn
/// processor time.
///
/// # Errors
/// If the head does not answer.
pub async fn under_load(
    cluster: &Cluster,
    undisturbed: &Undisturbed,
    asks: &[ChatQuestion],
    streams: usize,
    burn: usize,
    lasts: Duration,
) -> Result<LoadResult> {
    let before = alarms(cluster).await?;
    let burning = Burn::start(burn);
    let until = Instant::now() + lasts;
    let mut clients = Vec::new();
    for stream in 0..streams {
        let (http, asks) = (cluster.client()?, asks.to_vec());
        clients.push(tokio::spawn(async move {
            let mut answers: Vec<(ChatQuestion, Result<StreamedAnswer>)> = Vec::new();
            for ask in asks.iter().cycle().skip(stream) {
                if Instant::now() >= until {
                    break;
                }
                let answer = tokio::time::timeout(ANSWER_LIMIT, ask.ask(&http)).await;
                let late = |_| Err(anyhow::anyhow!("no end within {ANSWER_LIMIT:?}"));
                answers.push((ask.clone(), answer.unwrap_or_else(late)));
            }
            answers
        }));
    }
    let mut outcome = LoadResult::default();
    for client in clients {
        for (ask, answer) in client.await.context("a client panicked")? {
            let checked = answer.and_then(|answer| {
                undisturbed.check(&ask, &answer)?;
                Ok(answer.longest_gap())
            });
            match checked {
                Ok(gap) => {
                    outcome.good += 1;
                    outcome.gaps.add(gap);
                }
                Err(error) => outcome
                    .failures
                    .push(format!("{:?}: {error:#}", ask.question)),
            }
        }
    }
    drop(burning);
    let after = alarms(cluster).await?;
    let added = after.into_iter().zip(before);
    outcome.alarms = added
        .map(|((name, after), (_, before))| (name, after - before))
        .collect();
    Ok(outcome)
}

async fn alarms(cluster: &Cluster) -> Result<Vec<(&'static str, f64)>> {
    let mut alarms = Vec::new();
    for name in [
        "hydramesh_head_ring_failovers_total",
        "hydramesh_head_ring_suspicions_total",
        "hydramesh_head_reruns_total",
    ] {
        alarms.push((name, cluster.metric(name).await?));
    }
    Ok(alarms)
}
