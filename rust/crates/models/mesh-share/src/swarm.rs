//! The choice of pieces to request and of sources to request them from.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::PieceSet;

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

/// Limits and timeouts of a [`Swarm`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Maximum number of concurrent requests to one source.
    pub window: u32,
    /// Maximum bytes requested and not yet received, over all sources.
    pub in_flight: u64,
    /// Minimum time after which a request is late and its piece is requested from another source, too.
    pub patience: Duration,
    /// The same as a multiple of the time that the source's pace so far predicts.
    pub slack: u32,
    /// Silence of a source that owes pieces after which it is dropped.
    pub silence: Duration,
    /// Time for which a source that was dropped for silence is not used.
    pub pause: Duration,
    /// Maximum number of sources that one piece is requested from at once.
    pub repeats: usize,
    /// Number of the piece to begin with: nodes that begin at different ones have something to give each
    /// other.
    pub begin: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            window: 8,
            in_flight: 64 << 20,
            patience: Duration::from_secs(2),
            slack: 3,
            silence: Duration::from_secs(10),
            pause: Duration::from_secs(20),
            repeats: 3,
            begin: 0,
        }
    }
}

/// A piece to get, as the manifest describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Number of the piece.
    pub piece: u32,
    /// Length in bytes.
    pub bytes: u32,
    /// SHA-256 of the piece.
    pub sha256: [u8; 32],
    /// Requested before all pieces that are not urgent.
    pub urgent: bool,
}

impl Wanted {
    /// Checks received bytes against length and digest of the manifest.
    ///
    /// # Errors
    /// If the length or the digest differs.
    pub fn verify(&self, data: &[u8]) -> Result<Verified, BadPiece> {
        let sha256: [u8; 32] = Sha256::digest(data).into();
        if data.len() as u64 != u64::from(self.bytes) || sha256 != self.sha256 {
            return Err(BadPiece { piece: self.piece });
        }
        Ok(Verified {
            piece: self.piece,
            sha256,
        })
    }
}

/// Proof that a piece has the manifest's digest; only [`Wanted::verify`] creates it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    piece: u32,
    sha256: [u8; 32],
}

impl Verified {
    /// Number of the piece.
    pub fn piece(&self) -> u32 {
        self.piece
    }
}

/// Error for a piece with another digest than the manifest's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("piece {piece} does not have the digest of the manifest")]
pub struct BadPiece {
    /// Number of the piece.
    pub piece: u32,
}

/// Kind of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Another node of the mesh.
    Peer,
    /// A source outside the mesh; used only for pieces that no peer has.
    Origin,
}

/// Instruction to the caller of [`Swarm::poll`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action<S> {
    /// Ask this source for this piece.
    Ask {
        /// Source that the action concerns.
        source: S,
        /// Number of the piece.
        piece: u32,
    },
    /// Cancel the request for this piece.
    Withdraw {
        /// Source that the action concerns.
        source: S,
        /// Number of the piece.
        piece: u32,
    },
    /// Stop using this source.
    Drop {
        /// Source that the action concerns.
        source: S,
        /// Reason for dropping it.
        reason: DropReason,
    },
}

/// Reasons for dropping a source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DropReason {
    /// It sent a piece that does not match the manifest; it is not used again.
    #[error("it sent piece {piece} with other contents than the manifest's")]
    BadPiece {
        /// Number of the piece.
        piece: u32,
    },
    /// It owed pieces and sent nothing; it may come back after a while.
    #[error("it owed pieces and sent nothing for {} s", silence.as_secs_f64())]
    Silent {
        /// Duration of the silence.
        silence: Duration,
    },
}

/// Progress of a swarm.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Number of pieces received.
    pub pieces: u32,
    /// Number of pieces wanted.
    pub pieces_total: u32,
    /// Bytes received.
    pub bytes: u64,
    /// Bytes wanted.
    pub bytes_total: u64,
    /// Bytes of pieces that were received more than once.
    pub bytes_twice: u64,
    /// Number of sources with a piece that is still missing.
    pub sources: usize,
}

/// Gets pieces from sources, each named by an `S`.
#[derive(Debug, Clone)]
pub struct Swarm<S: Ord + Clone> {
    settings: Settings,
    pieces: BTreeMap<u32, PieceState<S>>,
    /// Pieces that are not here yet.
    open: BTreeSet<u32>,
    sources: BTreeMap<S, SourceState>,
    /// Sources that sent a bad piece.
    banned: BTreeSet<S>,
    /// Sources that were silent, with the end of their pause.
    paused: BTreeMap<S, Instant>,
    actions: Vec<Action<S>>,
    bytes: u64,
    bytes_total: u64,
    bytes_twice: u64,
}

#[derive(Debug, Clone)]
struct PieceState<S> {
    wanted: Wanted,
    /// Sources that the piece was requested from.
    asked: Vec<S>,
}

#[derive(Debug, Clone)]
struct SourceState {
    kind: Kind,
    has: PieceSet,
    requests: BTreeMap<u32, Request>,
    /// Number of requests that the source may have now.
    window: u32,
    /// Bytes per second, smoothed.
    pace: Option<f64>,
    /// Time at which it last sent something, or first owed something.
    heard: Instant,
    /// Time at which its last piece was complete.
    arrived: Option<Instant>,
}

#[derive(Debug, Clone)]
struct Request {
    at: Instant,
    /// Time after which the request is late.
    due: Instant,
    late: bool,
}

impl<S: Ord + Clone> Swarm<S> {
    /// Creates a swarm that wants these pieces and has no sources yet.
    pub fn new(wanted: impl IntoIterator<Item = Wanted>, settings: Settings) -> Self {
        let mut swarm = Swarm {
            settings,
            pieces: BTreeMap::new(),
            open: BTreeSet::new(),
            sources: BTreeMap::new(),
            banned: BTreeSet::new(),
            paused: BTreeMap::new(),
            actions: Vec::new(),
            bytes: 0,
            bytes_total: 0,
            bytes_twice: 0,
        };
        swarm.want(wanted);
        swarm
    }

    /// Limits and timeouts of the swarm.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Wants these pieces, too; those that are wanted already stay as they are.
    pub fn want(&mut self, wanted: impl IntoIterator<Item = Wanted>) {
        for wanted in wanted {
            if self.pieces.contains_key(&wanted.piece) {
                continue;
            }
            self.bytes_total += u64::from(wanted.bytes);
            self.open.insert(wanted.piece);
            let asked = Vec::new();
            let piece = wanted.piece;
            self.pieces.insert(piece, PieceState { wanted, asked });
        }
    }

    /// Adds a source, or updates its pieces. A dropped source is not accepted again before its pause ends.
    pub fn source(&mut self, source: S, kind: Kind, has: PieceSet, now: Instant) {
        if !self.admits(&source, now) {
            return;
        }
        self.paused.remove(&source);
        let new = || SourceState {
            kind,
            has: PieceSet::none(0),
            requests: BTreeMap::new(),
            window: FIRST_WINDOW.min(self.settings.window),
            pace: None,
            heard: now,
            arrived: None,
        };
        self.sources.entry(source).or_insert_with(new).has = has;
    }

    /// True if a source would be accepted now.
    pub fn admits(&self, source: &S, now: Instant) -> bool {
        !self.banned.contains(source) && self.paused.get(source).is_none_or(|until| *until <= now)
    }

    /// Removes a source. Its outstanding pieces are requested from others.
    pub fn gone(&mut self, source: &S) {
        if let Some(gone) = self.sources.remove(source) {
            for piece in gone.requests.keys() {
                self.forget_ask(source, *piece);
            }
        }
    }

    /// A source sends: a part of a piece came.
    pub fn heard(&mut self, source: &S, now: Instant) {
        if let Some(source) = self.sources.get_mut(source) {
            source.heard = source.heard.max(now);
        }
    }

    /// Records that a source does not have this piece.
    pub fn refused(&mut self, source: &S, piece: u32) {
        if let Some(known) = self.sources.get_mut(source) {
            known.has.remove(piece);
            known.requests.remove(&piece);
            self.forget_ask(source, piece);
        }
    }

    /// A piece came from this source. Says whether it is news: what came twice need not be kept.
    pub fn arrived(&mut self, source: &S, verified: &Verified, now: Instant) -> bool {
        let Some(piece) = self.pieces.get_mut(&verified.piece) else {
            return false;
        };
        if piece.wanted.sha256 != verified.sha256 {
            return false;
        }
        let bytes = piece.wanted.bytes;
        if let Some(source) = self.sources.get_mut(source) {
            source.delivered(verified.piece, bytes, self.settings.window, now);
        }
        let news = self.open.remove(&verified.piece);
        let asked = std::mem::take(&mut piece.asked);
        if !news {
            self.bytes_twice += u64::from(bytes);
            return false;
        }
        self.bytes += u64::from(bytes);
        for other in asked.into_iter().filter(|other| other != source) {
            if let Some(known) = self.sources.get_mut(&other) {
                known.requests.remove(&verified.piece);
            }
            self.actions.push(Action::Withdraw {
                source: other,
                piece: verified.piece,
            });
        }
        true
    }

    /// A piece came from this source that is not the one of the manifest: it is dropped for good.
    pub fn bad(&mut self, source: &S, bad: &BadPiece) {
        if !self.banned.insert(source.clone()) {
            return;
        }
        self.gone(source);
        self.actions.push(Action::Drop {
            source: source.clone(),
            reason: DropReason::BadPiece { piece: bad.piece },
        });
    }

    /// Actions that are due; call it after events and at [`Swarm::next_timer`].
    pub fn poll(&mut self, now: Instant) -> Vec<Action<S>> {
        self.drop_silent(now);
        self.note_late(now);
        self.ask(now);
        std::mem::take(&mut self.actions)
    }

    /// Time at which [`Swarm::poll`] is due without an event.
    pub fn next_timer(&self) -> Option<Instant> {
        let owing = self.sources.values().filter(|s| !s.requests.is_empty());
        let silent = owing.map(|source| source.heard + self.settings.silence);
        let requests = self.sources.values().flat_map(|s| s.requests.values());
        let late = requests.filter(|ask| !ask.late).map(|ask| ask.due);
        silent.chain(late).min()
    }

    /// A piece that is wanted and not here.
    pub fn wanted(&self, piece: u32) -> Option<&Wanted> {
        let known = self.pieces.get(&piece);
        let open = known.filter(|_| self.open.contains(&piece));
        open.map(|piece| &piece.wanted)
    }

    /// The pieces that are wanted and not here, ascending.
    pub fn missing(&self) -> impl Iterator<Item = u32> + '_ {
        self.open.iter().copied()
    }

    /// Current progress.
    pub fn progress(&self) -> Progress {
        let useful =
            |source: &&SourceState| self.open.iter().any(|piece| source.has.contains(*piece));
        let total = self.pieces.len() as u32;
        Progress {
            pieces: total - self.open.len() as u32,
            pieces_total: total,
            bytes: self.bytes,
            bytes_total: self.bytes_total,
            bytes_twice: self.bytes_twice,
            sources: self.sources.values().filter(useful).count(),
        }
    }

    fn drop_silent(&mut self, now: Instant) {
        let silence = |source: &SourceState| now.saturating_duration_since(source.heard);
        let limit = self.settings.silence;
        let silent: Vec<(S, Duration)> = self
            .sources
            .iter()
            .filter(|(_, source)| !source.requests.is_empty() && silence(source) >= limit)
            .map(|(name, source)| (name.clone(), silence(source)))
            .collect();
        for (source, silence) in silent {
            self.gone(&source);
            self.paused
                .insert(source.clone(), now + self.settings.pause);
            self.actions.push(Action::Drop {
                source,
                reason: DropReason::Silent { silence },
            });
        }
    }

    fn note_late(&mut self, now: Instant) {
        for source in self.sources.values_mut() {
            let mut any = false;
            for ask in source.requests.values_mut().filter(|ask| !ask.late) {
                ask.late = ask.due <= now;
                any |= ask.late;
            }
            if any {
                source.window = (source.window / 2).max(1);
            }
        }
    }

    /// Makes one request to each source that has room, in turn, so that the load is spread over the sources.
    fn ask(&mut self, now: Instant) {
        let names: Vec<S> = self.sources.keys().cloned().collect();
        let mut in_flight = self.in_flight();
        let mut asked = true;
        while asked && in_flight < self.settings.in_flight {
            asked = false;
            for name in &names {
                let Some(piece) = self.choose(name) else {
                    continue;
                };
                in_flight += u64::from(self.ask_one(name, piece, now));
                asked = true;
                if in_flight >= self.settings.in_flight {
                    break;
                }
            }
        }
    }

    /// The piece to request from this source, if it has room and a piece that is wanted. Urgent pieces come
    /// first, then those that are not requested elsewhere, then the rarest.
    fn choose(&self, name: &S) -> Option<u32> {
        let source = self.sources.get(name)?;
        if source.requests.len() >= source.window as usize {
            return None;
        }
        let total = source.has.pieces().max(1);
        let begin = self.settings.begin % total;
        let askable = self.open.iter().filter(|&&piece| {
            source.has.contains(piece)
                && !source.requests.contains_key(&piece)
                && self.is_free(piece)
        });
        let ranked = askable.filter_map(|&piece| {
            let entry = self.pieces.get(&piece)?;
            let peers = self.peers_with(piece);
            if source.kind == Kind::Origin && peers > 0 {
                return None;
            }
            let turn = (piece % total + total - begin) % total;
            let rank = (!entry.wanted.urgent, entry.asked.len(), peers, turn);
            Some((rank, piece))
        });
        ranked.min().map(|(_, piece)| piece)
    }

    /// True if no source owes this piece, or all that owe it are late.
    fn is_free(&self, piece: u32) -> bool {
        let Some(entry) = self.pieces.get(&piece) else {
            return false;
        };
        let late = |source: &S| {
            let source = self.sources.get(source);
            let ask = source.and_then(|source| source.requests.get(&piece));
            ask.is_none_or(|ask| ask.late)
        };
        entry.asked.len() < self.settings.repeats && entry.asked.iter().all(late)
    }

    fn peers_with(&self, piece: u32) -> usize {
        let peers = self.sources.values().filter(|s| s.kind == Kind::Peer);
        peers.filter(|source| source.has.contains(piece)).count()
    }

    fn ask_one(&mut self, name: &S, piece: u32, now: Instant) -> u32 {
        let bytes = self.pieces.get(&piece).map_or(0, |p| p.wanted.bytes);
        let owed = self.owed_by(name) + u64::from(bytes);
        let Some(source) = self.sources.get_mut(name) else {
            return 0;
        };
        let expected = source.pace.map(|pace| owed as f64 / pace.max(1.0));
        // Whose pace is unknown gets twice the patience: making the first link takes its time, too.
        let limit = match expected {
            Some(seconds) => {
                let seconds = seconds * f64::from(self.settings.slack);
                let limit = Duration::from_secs_f64(seconds.min(LONGEST.as_secs_f64()));
                limit.max(self.settings.patience)
            }
            None => self.settings.patience * 2,
        };
        if source.requests.is_empty() {
            source.heard = now;
        }
        let ask = Request {
            at: now,
            due: now + limit,
            late: false,
        };
        source.requests.insert(piece, ask);
        if let Some(entry) = self.pieces.get_mut(&piece) {
            entry.asked.push(name.clone());
        }
        self.actions.push(Action::Ask {
            source: name.clone(),
            piece,
        });
        bytes
    }

    fn owed_by(&self, name: &S) -> u64 {
        let requests = self.sources.get(name).into_iter();
        requests
            .flat_map(|source| source.requests.keys())
            .filter_map(|piece| self.pieces.get(piece))
            .map(|piece| u64::from(piece.wanted.bytes))
            .sum()
    }

    fn in_flight(&self) -> u64 {
        self.sources.keys().map(|name| self.owed_by(name)).sum()
    }

    fn forget_ask(&mut self, source: &S, piece: u32) {
        if let Some(piece) = self.pieces.get_mut(&piece) {
            piece.asked.retain(|other| other != source);
        }
    }
}

impl SourceState {
    fn delivered(&mut self, piece: u32, bytes: u32, most: u32, now: Instant) {
        self.heard = self.heard.max(now);
        let Some(ask) = self.requests.remove(&piece) else {
            return;
        };
        // With several requests under way a piece takes what passed since the one before it.
        let begun = self.arrived.map_or(ask.at, |arrived| arrived.max(ask.at));
        let seconds = now.saturating_duration_since(begun).as_secs_f64();
        let pace = f64::from(bytes) / seconds.max(1e-3);
        self.pace = Some(self.pace.map_or(pace, |before| 0.7 * before + 0.3 * pace));
        self.arrived = Some(now);
        if !ask.late {
            self.window = (self.window + 1).min(most);
        }
    }
}

/// Requests that a source has at once before it has shown its pace: one that is sent while the next waits.
const FIRST_WINDOW: u32 = 2;

/// No request is waited for longer before another source is asked, however slow its source was.
const LONGEST: Duration = Duration::from_secs(120);
