//! The download of one model's pieces, from several workers at once or from the hub. [`Swarm`] decides which
//! piece to ask of which worker; this decides which workers to use, when the hub is asked instead, when files
//! are stored, and who is told.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_base::units::about_bytes;
use mesh_proto::{BadSource, NodeAddr};
use mesh_share::{Action, BadPiece, DropReason, Kind, PieceSet, Settings, Swarm, Verified, Wanted};

use crate::knowledge::Knowledge;
use crate::piece_map::PieceMap;
use crate::replica::Replica;

/// What a download wants done next. [`DownloadStep::Prepare`], [`DownloadStep::Store`],
/// [`DownloadStep::FetchFromHub`] and [`DownloadStep::Look`] are carried out before the next step is asked
/// for, and their results reported.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the variants' comments name the fields")]
pub enum DownloadStep {
    /// Open the files that these pieces belong to, and make room for them.
    Prepare(PieceSet),
    /// Open a stream to this source.
    Open(NodeAddr),
    /// Close the stream to it; `bad` if it sent something else than the manifest says.
    Close { source: String, bad: bool },
    /// Ask it for this piece.
    Ask(String, Wanted),
    /// It need not send this piece.
    Withdraw(String, u32),
    /// Make blobs of the files that are whole; with `all`, close the others, too.
    Store { all: bool },
    /// Get the model that is sought by the first name from the hub, where it has the second one, for as long
    /// as [`crate::Catalogue::keeps_hub`].
    FetchFromHub(String, String),
    /// Check which pieces are on the disk.
    Look,
    /// Remove the model from the store, unless it is this machine's own: its manifest is false.
    Discard,
    /// Nothing before that time, or before something changes.
    Wait(Instant),
    /// Nobody waits for pieces any more: this was the last step.
    End,
}

/// An event of a source of pieces.
#[derive(Debug)]
#[allow(missing_docs, reason = "the variants' comments name the fields")]
pub enum SourceEvent {
    /// It holds these pieces.
    Has(PieceSet),
    /// It is sending: a sign of life.
    Sends,
    /// A piece came, is the manifest's and is written.
    Piece(Verified),
    /// A piece came that is not.
    Bad(BadPiece),
    /// It has not got this piece.
    Refuses(u32),
    /// It sends no more; `refused` if it has not got the model.
    Gone { reason: String, refused: bool },
    /// This machine cannot write what it sent.
    DiskFailed(String),
}

/// A request for pieces that waits.
#[derive(Debug)]
pub(crate) struct Want {
    /// `None` once nobody waits for its result.
    pub(crate) id: Option<u64>,
    pub(crate) pieces: PieceSet,
}

impl Want {
    fn ends(self, result: Result<(), String>, results: &mut Results) {
        if let Some(id) = self.id {
            results.insert(id, result);
        }
    }
}

/// Results of requests, by their ids, until they are taken.
pub(crate) type Results = BTreeMap<u64, Result<(), String>>;

/// The download of pieces of one model, for as long as a request waits for some.
pub(crate) struct Download {
    map: Arc<PieceMap>,
    /// Name by which the model is sought.
    name: String,
    swarm: Swarm<String>,
    /// Requests whose files are not prepared yet.
    new: VecDeque<Want>,
    waiting: Vec<Want>,
    /// Node ids of the sources with a stream, each with its name.
    sources: BTreeMap<String, String>,
    /// Sources that could not be reached, each with the time of the next attempt.
    pauses: BTreeMap<String, Instant>,
    /// Time until which the hub is left alone.
    rest: Option<Instant>,
    stage: Stage,
    queue: VecDeque<DownloadStep>,
    next_look: Instant,
    started: Instant,
    logged: (Instant, u64),
}

/// What has yet to report its result.
enum Stage {
    Nothing,
    Preparing(Want),
    /// Files that are whole are stored before their requests are told.
    Settling,
    /// The files are the hub's to write from then on.
    Handing(String),
    AtHub,
    /// Back from the hub: what is still missing is fetched as before.
    Resuming(Option<String>),
    Closing,
    Closed,
}

impl Download {
    pub(crate) fn new(map: Arc<PieceMap>, name: String, begin: u32, now: Instant) -> Self {
        let settings = Settings {
            begin,
            ..Settings::default()
        };
        Download {
            map,
            name,
            swarm: Swarm::new([], settings),
            new: VecDeque::new(),
            waiting: Vec::new(),
            sources: BTreeMap::new(),
            pauses: BTreeMap::new(),
            rest: None,
            stage: Stage::Nothing,
            queue: VecDeque::new(),
            next_look: now,
            started: now,
            logged: (now, 0),
        }
    }

    /// `None` once its manifest was found to be false.
    fn replica<'a>(&self, known: &'a Knowledge) -> Option<&'a Replica> {
        known.replicas.get(&self.map.fingerprint())
    }

    fn missing(&self, pieces: &PieceSet, known: &Knowledge) -> PieceSet {
        let replica = self.replica(known);
        replica.map_or_else(|| pieces.clone(), |replica| replica.missing(pieces))
    }

    pub(crate) fn want(&mut self, want: Want) {
        self.new.push_back(want);
    }

    /// Nobody waits for this request's result any more. Its pieces are fetched nevertheless.
    pub(crate) fn forget(&mut self, id: u64) {
        let preparing = match &mut self.stage {
            Stage::Preparing(want) => Some(want),
            _ => None,
        };
        let waiting = self.new.iter_mut().chain(&mut self.waiting);
        let mut all = waiting.chain(preparing);
        if let Some(want) = all.find(|want| want.id == Some(id)) {
            want.id = None;
        }
    }

    pub(crate) fn poll(
        &mut self,
        now: Instant,
        known: &mut Knowledge,
        results: &mut Results,
    ) -> DownloadStep {
        loop {
            if let Some(step) = self.queue.pop_front() {
                return step;
            }
            match self.stage {
                Stage::Nothing => {}
                Stage::Closed if self.new.is_empty() => {
                    self.end(now, known);
                    return DownloadStep::End;
                }
                Stage::Closed => self.stage = Stage::Nothing,
                _ => return DownloadStep::Wait(now + LOOK),
            }
            if let Some(want) = self.new.pop_front() {
                if self.replica(known).is_none() {
                    let gone = "its files are not what its manifest says".to_owned();
                    want.ends(Err(gone), results);
                    continue;
                }
                let missing = self.missing(&want.pieces, known);
                self.stage = Stage::Preparing(want);
                return DownloadStep::Prepare(missing);
            }
            if now >= self.next_look && !self.waiting.is_empty() {
                self.next_look = now + LOOK;
                self.look(now, known);
                if let Some(name) = self.hub_name(now, known) {
                    self.close_sources();
                    self.stage = Stage::Handing(name);
                    self.queue.push_back(DownloadStep::Store { all: true });
                }
                continue;
            }
            self.act(now, known);
            if !self.queue.is_empty() {
                continue;
            }
            let is_whole = |want: &Want| self.missing(&want.pieces, known).is_empty();
            if self.waiting.iter().any(is_whole) {
                self.stage = Stage::Settling;
                return DownloadStep::Store { all: false };
            }
            if self.waiting.is_empty() {
                self.stage = Stage::Closing;
                return DownloadStep::Store { all: true };
            }
            let timer = self.swarm.next_timer().unwrap_or(self.next_look);
            return DownloadStep::Wait(self.next_look.min(timer));
        }
    }

    /// Opens streams to sources that the head or the LAN names, closes those to others, and notes the
    /// progress.
    fn look(&mut self, now: Instant, known: &mut Knowledge) {
        let seats = self.sources_known(known);
        let named = |node: &String| seats.iter().any(|seat| seat.node_id == *node);
        let gone: Vec<String> = self.sources.keys().filter(|n| !named(n)).cloned().collect();
        for node in gone {
            self.close(node, false);
        }
        self.pauses.retain(|_, until| *until > now);
        for seat in seats.into_iter().filter(|_| known.own.is_some()) {
            let node = seat.node_id.clone();
            let usable = !self.sources.contains_key(&node)
                && !self.pauses.contains_key(&node)
                && self.swarm.admits(&node, now)
                && self.sources.len() < MOST_SOURCES;
            if usable {
                self.sources.insert(node, seat.name.clone());
                self.queue.push_back(DownloadStep::Open(seat));
            }
        }
        self.report(known);
        let elapsed = now.saturating_duration_since(self.logged.0);
        if elapsed >= LOG {
            let progress = self.swarm.progress();
            let news = progress.bytes.saturating_sub(self.logged.1);
            tracing::info!(
                model = self.name,
                "{} of {} are here, {}/s from {} workers",
                about_bytes(progress.bytes),
                about_bytes(progress.bytes_total),
                about_bytes((news as f64 / elapsed.as_secs_f64()) as u64),
                progress.sources,
            );
            self.logged = (now, progress.bytes);
        }
    }

    /// Workers that may have pieces of the model, according to the head and on the LAN.
    fn sources_known(&self, known: &Knowledge) -> Vec<NodeAddr> {
        let fingerprint = self.map.fingerprint().to_string();
        let of_model = known.told.values().filter(|m| m.fingerprint == fingerprint);
        let all = of_model.flat_map(|model| &model.holders).chain(&known.lan);
        let own = known.own.as_ref().map(|(node_id, _)| node_id);
        let mut seats: Vec<NodeAddr> = Vec::new();
        for seat in all.filter(|seat| Some(&seat.node_id) != own) {
            if !seats.iter().any(|other| other.node_id == seat.node_id) {
                seats.push(seat.clone());
            }
        }
        seats
    }

    /// The model's name on the hub, if this worker is to get from there what no worker has: all of the model,
    /// since others may lack other parts. They get its pieces from here as they come.
    fn hub_name(&mut self, now: Instant, known: &mut Knowledge) -> Option<String> {
        if self.rest.is_some_and(|until| until <= now) {
            self.rest = None;
            known.report.seeks(&self.name, |s| s.origin_error.clear());
        }
        let name = self.replica(known)?.hub_name()?;
        (self.rest.is_none() && self.is_given(known)).then(|| name.to_owned())
    }

    /// True if this worker is the one that gets the model from the hub.
    pub(crate) fn is_given(&self, known: &Knowledge) -> bool {
        known.is_given(&self.name)
    }

    /// Queues the swarm's decisions.
    fn act(&mut self, now: Instant, known: &mut Knowledge) {
        for action in self.swarm.poll(now) {
            match action {
                Action::Ask { source, piece } => {
                    if let Some(wanted) = self.swarm.wanted(piece) {
                        let step = DownloadStep::Ask(source, wanted.clone());
                        self.queue.push_back(step);
                    }
                }
                Action::Withdraw { source, piece } => {
                    self.queue.push_back(DownloadStep::Withdraw(source, piece));
                }
                Action::Drop { source, reason } => {
                    let worker = self.sources.get(&source).unwrap_or(&source);
                    tracing::warn!(model = self.name, worker, %reason, "source of a model dropped");
                    let bad = matches!(reason, DropReason::BadPiece { .. });
                    if bad {
                        known.report.accuse(BadSource {
                            node_id: source.clone(),
                            fingerprint: self.map.fingerprint().to_string(),
                            reason: reason.to_string(),
                        });
                    }
                    self.close(source, bad);
                }
            }
        }
    }

    fn close(&mut self, source: String, bad: bool) {
        self.swarm.gone(&source);
        self.sources.remove(&source);
        self.queue.push_back(DownloadStep::Close { source, bad });
    }

    fn close_sources(&mut self) {
        let all: Vec<String> = self.sources.keys().cloned().collect();
        all.into_iter().for_each(|source| self.close(source, false));
    }

    fn report(&self, known: &mut Knowledge) {
        let missing = PieceSet::of(self.map.count(), self.swarm.missing());
        let progress = self.swarm.progress();
        let replica = self.replica(known);
        let origin = known.rules.hub && replica.is_some_and(|replica| replica.hub_name().is_some());
        known.report.seeks(&self.name, |sought| {
            sought.origin = origin;
            sought.fingerprint = self.map.fingerprint().to_string();
            sought.missing = Some(missing.to_proto());
            (sought.bytes, sought.bytes_total) = (progress.bytes, progress.bytes_total);
        });
    }

    fn want_missing(&mut self, missing: &PieceSet) {
        let wanted = missing.iter().filter_map(|piece| self.map.wanted(piece));
        self.swarm.want(wanted.collect::<Vec<_>>());
    }

    fn forget_pieces(&mut self) {
        self.swarm = Swarm::new([], self.swarm.settings().clone());
    }

    /// All requests end with this error.
    pub(crate) fn give_up(mut self, error: &str, results: &mut Results) {
        self.fail(error, results);
        let preparing = match self.stage {
            Stage::Preparing(want) => Some(want),
            _ => None,
        };
        for want in self.new.into_iter().chain(preparing) {
            want.ends(Err(error.to_owned()), results);
        }
    }

    /// All requests that wait end with this error.
    pub(crate) fn fail(&mut self, error: &str, results: &mut Results) {
        for want in self.waiting.drain(..) {
            want.ends(Err(error.to_owned()), results);
        }
    }

    /// Result of [`DownloadStep::Prepare`].
    pub(crate) fn prepared(
        &mut self,
        result: Result<(), String>,
        known: &mut Knowledge,
        results: &mut Results,
    ) {
        match std::mem::replace(&mut self.stage, Stage::Nothing) {
            Stage::Preparing(want) => match result {
                Ok(()) => {
                    self.want_missing(&self.missing(&want.pieces, known));
                    self.waiting.push(want);
                    self.report(known);
                }
                Err(error) => want.ends(Err(error), results),
            },
            Stage::Resuming(hub_error) => {
                if let Err(error) = result {
                    self.fail(&error, results);
                }
                self.want_missing(&self.lacking(known));
                self.report(known);
                if let Some(error) = hub_error {
                    known.report.seeks(&self.name, |s| s.origin_error = error);
                }
            }
            other => self.stage = other,
        }
    }

    /// Pieces that requests wait for.
    fn lacking(&self, known: &Knowledge) -> PieceSet {
        let mut lacking = PieceSet::none(self.map.count());
        for want in &self.waiting {
            lacking.union(&self.missing(&want.pieces, known));
        }
        lacking
    }

    /// Result of [`DownloadStep::Store`]; with an error, true if a file is not what the manifest says. Returns
    /// true if the manifest is false.
    pub(crate) fn stored(
        &mut self,
        result: Result<(), (String, bool)>,
        known: &Knowledge,
        results: &mut Results,
    ) -> bool {
        match (std::mem::replace(&mut self.stage, Stage::Nothing), result) {
            (Stage::Settling, Ok(())) => {
                let waiting = std::mem::take(&mut self.waiting);
                let is_whole = |want: &Want| self.missing(&want.pieces, known).is_empty();
                let (done, waiting): (Vec<Want>, _) = waiting.into_iter().partition(is_whole);
                self.waiting = waiting;
                done.into_iter().for_each(|want| want.ends(Ok(()), results));
            }
            (Stage::Settling, Err((error, is_false))) => {
                self.close_sources();
                // Pieces that were not stored are not here, and are fetched again on the next request.
                self.forget_pieces();
                self.queue.push_back(match is_false {
                    true => DownloadStep::Discard,
                    false => DownloadStep::Look,
                });
                self.fail(&error, results);
                return is_false;
            }
            (Stage::Handing(name), _) => {
                self.stage = Stage::AtHub;
                let sought = self.name.clone();
                self.queue
                    .push_back(DownloadStep::FetchFromHub(sought, name));
            }
            (Stage::Closing, result) => {
                // Errors of the store were reported to the requests that waited.
                if result.is_err() {
                    self.queue.push_back(DownloadStep::Look);
                }
                self.stage = Stage::Closed;
            }
            (other, _) => self.stage = other,
        }
        false
    }

    /// Result of [`DownloadStep::FetchFromHub`]: the error, for which the hub is left alone for a while.
    pub(crate) fn hub_ended(
        &mut self,
        failure: Option<(String, Duration)>,
        now: Instant,
        known: &Knowledge,
    ) {
        let error = failure.map(|(error, pause)| {
            tracing::error!(model = self.name, error, "the hub does not give the model");
            self.rest = Some(now + pause);
            error
        });
        self.forget_pieces();
        self.stage = Stage::Resuming(error);
        self.queue
            .push_back(DownloadStep::Prepare(self.lacking(known)));
    }

    /// Takes in an event of a source.
    pub(crate) fn source_event(
        &mut self,
        source: String,
        event: SourceEvent,
        now: Instant,
        results: &mut Results,
    ) {
        match event {
            SourceEvent::Has(pieces) if self.sources.contains_key(&source) => {
                self.swarm.source(source, Kind::Peer, pieces, now);
            }
            SourceEvent::Has(_) => {}
            SourceEvent::Sends => self.swarm.heard(&source, now),
            SourceEvent::Refuses(piece) => self.swarm.refused(&source, piece),
            SourceEvent::Piece(verified) => {
                self.swarm.arrived(&source, &verified, now);
            }
            SourceEvent::Bad(bad) => self.swarm.bad(&source, &bad),
            SourceEvent::Gone { reason, refused } => {
                self.swarm.gone(&source);
                if let Some(worker) = self.sources.remove(&source) {
                    tracing::debug!(model = self.name, worker, reason, "source gone");
                    // A worker that has not got it will hardly have it in a moment.
                    let pause = if refused { REFUSED } else { PAUSE };
                    self.pauses.insert(source, now + pause);
                }
            }
            SourceEvent::DiskFailed(error) => self.fail(&error, results),
        }
    }

    fn end(&mut self, now: Instant, known: &mut Knowledge) {
        let progress = self.swarm.progress();
        tracing::info!(
            model = self.name,
            bytes = progress.bytes,
            twice = progress.bytes_twice,
            seconds = now.saturating_duration_since(self.started).as_secs_f64(),
            "pieces of the model came from other workers"
        );
        known.report.ends(&self.name);
    }
}

const LOOK: Duration = Duration::from_millis(100);
const LOG: Duration = Duration::from_secs(5);
/// Time for which a source that could not be reached is left alone.
const PAUSE: Duration = Duration::from_secs(2);
/// The same for one that has not got the model.
const REFUSED: Duration = Duration::from_secs(30);
const MOST_SOURCES: usize = 16;
