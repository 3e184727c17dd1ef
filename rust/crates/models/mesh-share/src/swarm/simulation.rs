//! A network of sources with faults, in simulated time.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::{Duration, Instant};

use super::{Action, DropReason, Kind, Settings, Swarm, Wanted};
use crate::PieceSet;

/// A source and its faults.
#[derive(Debug, Clone)]
pub(super) struct Simulated {
    pub(super) kind: Kind,
    pub(super) has: Vec<u32>,
    /// Bytes per second.
    pub(super) pace: f64,
    pub(super) latency: Duration,
    /// The source sends wrong data instead of every n-th piece.
    pub(super) lies: Option<u32>,
    /// Time from which the source is silent, with its link still open.
    pub(super) silent_from: Option<Duration>,
    /// Time at which the source's link breaks.
    pub(super) dies_at: Option<Duration>,
}

impl Simulated {
    pub(super) fn peer(has: impl IntoIterator<Item = u32>) -> Self {
        Simulated {
            kind: Kind::Peer,
            has: has.into_iter().collect(),
            pace: 50e6,
            latency: Duration::from_millis(2),
            lies: None,
            silent_from: None,
            dies_at: None,
        }
    }
}

/// Outcome of a simulated fetch.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) done: bool,
    pub(super) took: Duration,
    /// Pieces asked of each source.
    pub(super) asked: BTreeMap<usize, u32>,
    /// Pieces that counted, from each source.
    pub(super) counted: BTreeMap<usize, u32>,
    pub(super) dropped: Vec<(usize, DropReason)>,
    pub(super) most_in_flight: u64,
    pub(super) bytes_sent: u64,
    pub(super) bytes_twice: u64,
    pub(super) withdrawn: u32,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrives {
        source: usize,
        piece: u32,
        bad: bool,
    },
    Dies {
        source: usize,
    },
    Timer,
}

pub(super) const PIECE: u32 = 1 << 20;

/// The piece of that number: a few bytes stand for its length, so that thousands are quick to hash.
pub(super) fn contents(piece: u32) -> Vec<u8> {
    piece.to_le_bytes().to_vec()
}

pub(super) fn wanted(pieces: impl IntoIterator<Item = u32>) -> Vec<Wanted> {
    let one = |piece: u32| {
        use sha2::Digest;
        Wanted {
            piece,
            bytes: 4,
            sha256: sha2::Sha256::digest(contents(piece)).into(),
            urgent: false,
        }
    };
    pieces.into_iter().map(one).collect()
}

/// Gets `wanted` from `sources` until all is here, nothing moves any more, or `limit` has passed. Every piece
/// takes as long on its way as [`PIECE`] bytes do.
pub(super) fn run(
    wanted: Vec<Wanted>,
    settings: Settings,
    sources: &[Simulated],
    limit: Duration,
) -> Outcome {
    let begin = Instant::now();
    let total = wanted.iter().map(|w| w.piece + 1).max().unwrap_or(0);
    let mut swarm: Swarm<usize> = Swarm::new(wanted, settings);
    let mut outcome = Outcome::default();
    let mut events: BinaryHeap<Reverse<(Duration, u64, Event)>> = BinaryHeap::new();
    let mut order = 0;
    let mut push = |events: &mut BinaryHeap<_>, at: Duration, event| {
        order += 1;
        events.push(Reverse((at, order, event)));
    };
    // When each source's wire is free again.
    let mut free = vec![Duration::ZERO; sources.len()];
    let mut owed: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    for (index, source) in sources.iter().enumerate() {
        let has = PieceSet::of(total, source.has.iter().copied());
        swarm.source(index, source.kind, has, begin);
        if let Some(at) = source.dies_at {
            push(&mut events, at, Event::Dies { source: index });
        }
    }
    let mut now = Duration::ZERO;
    loop {
        for action in swarm.poll(begin + now) {
            match action {
                Action::Ask { source, piece } => {
                    let simulated = &sources[source];
                    assert!(simulated.has.contains(&piece), "asked for what it has not");
                    let queue = owed.entry(source).or_default();
                    assert!(!queue.contains(&piece), "asked twice");
                    queue.push(piece);
                    let asked = outcome.asked.entry(source).or_default();
                    *asked += 1;
                    let bad = simulated.lies.is_some_and(|every| *asked % every == 0);
                    let sends = Duration::from_secs_f64(f64::from(PIECE) / simulated.pace);
                    free[source] = free[source].max(now) + sends;
                    let at = free[source] + simulated.latency;
                    if simulated.silent_from.is_none_or(|from| at < from) {
                        outcome.bytes_sent += 4;
                        push(&mut events, at, Event::Arrives { source, piece, bad });
                    }
                }
                Action::Withdraw { source, piece } => {
                    outcome.withdrawn += 1;
                    owed.entry(source).or_default().retain(|p| *p != piece);
                }
                Action::Drop { source, reason } => {
                    owed.remove(&source);
                    outcome.dropped.push((source, reason));
                }
            }
        }
        let in_flight = owed.values().map(|queue| 4 * queue.len() as u64).sum();
        outcome.most_in_flight = outcome.most_in_flight.max(in_flight);
        outcome.took = now;
        outcome.done = swarm.missing().next().is_none();
        outcome.bytes_twice = swarm.progress().bytes_twice;
        if outcome.done || now >= limit {
            return outcome;
        }
        if let Some(timer) = swarm.next_timer() {
            let at = timer.saturating_duration_since(begin).max(now);
            push(&mut events, at, Event::Timer);
        }
        let Some(Reverse((at, _, event))) = events.pop() else {
            return outcome;
        };
        now = at.max(now);
        match event {
            Event::Timer => {}
            Event::Dies { source } => {
                owed.remove(&source);
                swarm.gone(&source);
            }
            Event::Arrives { source, piece, bad } => {
                if sources[source].dies_at.is_some_and(|at| at <= now) {
                    continue;
                }
                let Some(queue) = owed.get_mut(&source) else {
                    continue;
                };
                let before = queue.len();
                queue.retain(|p| *p != piece);
                if queue.len() == before {
                    continue;
                }
                let mut data = contents(piece);
                if bad {
                    data[3] ^= 0x80;
                }
                let Some(wanted) = swarm.wanted(piece).cloned() else {
                    continue;
                };
                match wanted.verify(&data) {
                    Ok(verified) => {
                        assert!(!bad, "a lie passed");
                        if swarm.arrived(&source, &verified, begin + now) {
                            *outcome.counted.entry(source).or_default() += 1;
                        }
                    }
                    Err(error) => swarm.bad(&source, &error),
                }
            }
        }
    }
}
