//! Observation of a mesh under attack: memory, processes, processor time, and response of the head's health
//! check.

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arcanum_tests::gaps::Gaps;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// Processor time that a process used so far, seconds.
pub(crate) fn processor_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold blanks.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest);
    let mut fields = fields.unwrap_or_default().split_whitespace();
    let ticks = |field: Option<&str>| field.and_then(|field| field.parse::<f64>().ok());
    let user = ticks(fields.nth(11)).unwrap_or_default();
    let system = ticks(fields.next()).unwrap_or_default();
    // USER_HZ is 100 on every Linux that this runs on.
    (user + system) / 100.0
}

/// Processor time that everything on this machine used so far, seconds.
pub(crate) fn machine_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq, steal
    let busy = [0, 1, 2, 5, 6, 7]
        .iter()
        .filter_map(|&index| ticks.get(index));
    busy.sum::<f64>() / 100.0
}

/// Processor time of groups of processes over a phase.
#[derive(Debug, Default)]
pub(crate) struct Processors {
    before: HashMap<u32, f64>,
    latest: HashMap<u32, f64>,
}

impl Processors {
    /// Looks at these processes.
    pub(crate) fn look(&mut self, pids: impl IntoIterator<Item = u32>) {
        for pid in pids {
            let now = processor_seconds(pid);
            self.before.entry(pid).or_insert(now);
            if now > 0.0 {
                self.latest.insert(pid, now);
            }
        }
    }

    /// Seconds that they used between the first and the last look.
    pub(crate) fn used(&self) -> f64 {
        let used = self.latest.iter();
        used.fold(0.0, |sum, (pid, now)| {
            sum + now - self.before.get(pid).unwrap_or(now)
        })
    }
}

/// Asks `/health` once a second, each time on a new connection.
#[derive(Debug)]
pub(crate) struct HealthProbe {
    over: Arc<AtomicBool>,
    task: JoinHandle<HealthResults>,
}

/// Results of repeated health checks.
#[derive(Debug, Default)]
pub(crate) struct HealthResults {
    /// Times of answers with 200.
    pub(crate) times: Gaps,
    /// After how many seconds there was none, and why.
    pub(crate) failures: Vec<(f64, String)>,
}

impl HealthProbe {
    pub(crate) fn start(head: SocketAddr) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let done = Arc::clone(&over);
        let task = tokio::spawn(async move {
            let (begun, mut asked) = (Instant::now(), HealthResults::default());
            while !done.load(Ordering::Relaxed) {
                let started = Instant::now();
                let answered = tokio::time::timeout(HEALTH_LIMIT, health(head)).await;
                match answered {
                    Ok(Ok(())) => asked.times.add(started.elapsed()),
                    Ok(Err(error)) => {
                        let at = begun.elapsed().as_secs_f64();
                        asked.failures.push((at, error.to_string()));
                    }
                    Err(_) => {
                        let at = begun.elapsed().as_secs_f64();
                        asked
                            .failures
                            .push((at, format!("none within {HEALTH_LIMIT:?}")));
                    }
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            asked
        });
        Self { over, task }
    }

    pub(crate) async fn end(self) -> HealthResults {
        self.over.store(true, Ordering::Relaxed);
        self.task.await.unwrap_or_default()
    }
}

async fn health(head: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(head).await?;
    let request = format!("GET /health HTTP/1.1\r\nhost: {head}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    if answer.starts_with(b"HTTP/1.1 200") {
        return Ok(());
    }
    let line = String::from_utf8_lossy(&answer);
    let line = line.lines().next().unwrap_or_default().to_owned();
    Err(std::io::Error::other(format!("{line:?} instead of 200")))
}

/// Longest time for an answer about health; a later one counts as missing.
const HEALTH_LIMIT: Duration = Duration::from_secs(5);
