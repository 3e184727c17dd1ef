//! Attacks by clients: each sends a bounded load and prints its counts at its end.

mod greedy;
mod poison;
mod slow;
mod templates;
mod udp;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::ValueEnum;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::targets::Targets;

/// An attack by a client, or by somebody with the addresses only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Play {
    /// Chats with 8 MiB of the digit 1
    PoisonDigits,
    /// JSON made of millions of small objects
    PoisonObjects,
    /// 200 connections whose request's head never ends
    SlowHeaders,
    /// 150 connections whose body stops before its end
    SlowBodies,
    /// Streams that nobody reads
    SlowReaders,
    /// 1,100 connections that say nothing
    IdleHttp,
    /// 16 MiB of small objects in Chunks, and payloads that are never whole
    ChunkBombs,
    /// The same through the shim, by a stranger with a cookie
    ShimBombs,
    /// One key with 80 connections and n = 16
    Greedy,
    /// Model files with hostile chat templates in a worker's folder
    Templates,
    /// Heartbeats of a worker that has no identity
    Forged,
    /// Random and mutated datagrams at all ports
    Datagrams,
}

impl Play {
    pub(crate) fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// True if the attacker has an API key, or is in a trusted network.
    pub(crate) fn is_client(self) -> bool {
        use Play::{
            ChunkBombs, Forged, Greedy, PoisonDigits, PoisonObjects, SlowReaders, Templates,
        };
        matches!(
            self,
            PoisonDigits | PoisonObjects | SlowReaders | ChunkBombs | Greedy | Templates | Forged
        )
    }

    pub(crate) async fn run(self, targets: Targets, lasts: Duration) -> Tally {
        let tally = Tally::default();
        let targets = Arc::new(targets);
        let attack = {
            let (targets, tally) = (targets.clone(), tally.clone());
            async move {
                match self {
                    Play::PoisonDigits => poison::digits(targets, tally).await,
                    Play::PoisonObjects => poison::objects(targets, tally).await,
                    Play::SlowHeaders => slow::headers(targets, tally).await,
                    Play::SlowBodies => slow::bodies(targets, tally).await,
                    Play::SlowReaders => slow::readers(targets, tally).await,
                    Play::IdleHttp => slow::idle(targets, tally).await,
                    Play::ChunkBombs => udp::bombs(targets.clients, targets, tally).await,
                    Play::ShimBombs => udp::bombs(targets.shim, targets, tally).await,
                    Play::Greedy => greedy::greedy(targets, tally).await,
                    Play::Templates => templates::templates(targets, tally).await,
                    Play::Forged => udp::forged(targets, tally).await,
                    Play::Datagrams => udp::datagrams(targets, tally).await,
                }
            }
        };
        let _ = tokio::time::timeout(lasts, attack).await;
        tally
    }
}

/// Counts of sent requests and their outcomes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally(Arc<Mutex<BTreeMap<String, u64>>>);

impl Tally {
    pub(crate) fn count(&self, what: impl Display) {
        self.add(what, 1);
    }

    pub(crate) fn add(&self, what: impl Display, how_many: u64) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Words of the other side end up here: they are not to grow for ever.
        let what: String = what.to_string().chars().take(80).collect();
        if counts.len() < 40 || counts.contains_key(&what) {
            *counts.entry(what).or_default() += how_many;
        }
    }

    pub(crate) fn to_json(&self, attack: &str) -> Value {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        json!({"attack": attack, "counts": *counts})
    }
}

/// Raises the limit of open files as far as this process may.
pub(crate) fn raise_file_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// The head of a POST with a body of `length` bytes.
fn post(targets: &Targets, path: &str, length: usize) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: {}\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n",
        targets.http, targets.key
    )
}

/// Sends a whole request and reads the answer; returns the status, or the failure.
async fn exchange(targets: &Targets, path: &str, body: &[u8]) -> String {
    let exchange = async {
        let mut stream = TcpStream::connect(targets.http).await?;
        stream
            .write_all(post(targets, path, body.len()).as_bytes())
            .await?;
        // A head that refuses may close before it has read all.
        let sent = stream.write_all(body).await;
        let mut answer = vec![0; 512];
        let got = stream.read(&mut answer).await?;
        if got == 0 {
            sent?;
        }
        let answer = String::from_utf8_lossy(&answer[..got]).into_owned();
        let status = answer.split(' ').nth(1).unwrap_or("nothing");
        Ok::<_, std::io::Error>(status.to_owned())
    };
    match tokio::time::timeout(EXCHANGE_LIMIT, exchange).await {
        Ok(Ok(status)) => format!("status {status}"),
        Ok(Err(error)) => error.kind().to_string(),
        Err(_) => format!("no answer within {EXCHANGE_LIMIT:?}"),
    }
}

const EXCHANGE_LIMIT: Duration = Duration::from_secs(60);
