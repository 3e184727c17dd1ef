//! Gets pieces of one model from several workers at once. [`Swarm`] decides which piece to ask of which
//! worker.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_base::units::about_bytes;
use mesh_proto::{BadSource, ModelSources, NodeAddr};
use mesh_share::{Action, DropReason, Kind, PieceSet, Settings, Swarm};
use mesh_store::{Begun, PartialFile, PartialKey, Pin, Store, StoreError, Work};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use super::held::Held;
use super::source::{self, News, Order, REFUSES};
use super::{Models, origin};

/// A request for pieces that waits.
pub(super) struct Want {
    pub(super) pieces: PieceSet,
    pub(super) done: oneshot::Sender<Result<(), String>>,
}

/// The files of a model that are written, each opened when its first piece is wanted.
pub(super) struct Writer {
    store: Store,
    files: Mutex<HashMap<u32, Arc<PartialFile>>>,
}

impl Writer {
    /// Opens the files that these pieces belong to, and makes room for them.
    fn begin(&self, held: &Held, wanted: &PieceSet) -> Result<(), StoreError> {
        let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
        for id in wanted.iter().filter_map(|piece| held.id(piece)) {
            if let Some((_, piece)) = held.manifest().piece(id) {
                *bytes.entry(id.file).or_default() += u64::from(piece.bytes);
            }
        }
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, bytes) in bytes {
            let Some(file) = held.manifest().files.get(index as usize) else {
                continue;
            };
            let here = held.here();
            let first = held.number(mesh_store::PieceId {
                file: index,
                piece: 0,
            });
            let last = first + file.pieces.len() as u32;
            let had = PieceSet::of(held.pieces(), (first..last).filter(|p| here.contains(*p)));
            match files.get(&index) {
                Some(_) => self.store.admit(bytes)?,
                None => {
                    let key = PartialKey::Blob(file.sha256);
                    let wanted = bytes + held.bytes_of(&had);
                    let begun = patiently(|| self.store.begin(key, file.bytes, wanted))?;
                    if let Begun::Partial(partial) = begun {
                        files.insert(index, Arc::new(partial));
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes a verified piece. Blocks.
    pub(super) fn write(&self, held: &Held, piece: u32, data: &[u8]) -> Result<(), String> {
        let found = held
            .id(piece)
            .and_then(|id| Some((id, held.manifest().piece(id)?)));
        let Some((id, (_, described))) = found else {
            return Err(format!("there is no piece {piece}"));
        };
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let file = files.get(&id.file).cloned();
        drop(files);
        let Some(file) = file else {
            // It came twice, and the file is a blob by now.
            return match held.here().contains(piece) {
                true => Ok(()),
                false => Err("its file is not open".to_owned()),
            };
        };
        file.write_at(described.offset, data)
            .map_err(|error| error.to_string())
    }

    /// Makes blobs of files that are whole, and closes them; with `all`, the others, too. Blocks.
    fn close(&self, held: &Held, all: bool) -> Result<(), StoreError> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let closing: Vec<u32> = files
            .iter()
            .filter(|(_, file)| all || file.is_complete())
            .map(|(index, _)| *index)
            .collect();
        let closing: Vec<(u32, Arc<PartialFile>)> = closing
            .iter()
            .filter_map(|index| files.remove_entry(index))
            .collect();
        drop(files);
        let close = |index: u32, file: Arc<PartialFile>| {
            file.flush()?;
            // A piece that comes twice may be about to be written into it; then the next one makes the blob.
            if file.is_complete()
                && let Ok(file) = Arc::try_unwrap(file)
                && let Some(described) = held.manifest().files.get(index as usize)
            {
                file.complete_as(described)?;
            }
            Ok(())
        };
        // The first error is told; the other files are kept for all that.
        let closed: Vec<Result<(), StoreError>> = closing
            .into_iter()
            .map(|(index, file)| close(index, file))
            .collect();
        closed.into_iter().collect()
    }
}

/// Tries again for a while where another writer is still at work.
fn patiently<T>(mut work: impl FnMut() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let mut attempts = 0;
    loop {
        match work() {
            Err(StoreError::Busy { .. }) if attempts < BUSY_ATTEMPTS => {
                attempts += 1;
                std::thread::sleep(BUSY_PAUSE);
            }
            done => return done,
        }
    }
}

/// The task that gets pieces of one model, for as long as a request waits for some.
pub(super) struct Fetch {
    models: Arc<Models>,
    held: Arc<Held>,
    /// Name by which the model is sought.
    name: String,
    swarm: Swarm<String>,
    writer: Arc<Writer>,
    waiting: Vec<Want>,
    sources: HashMap<String, Source>,
    /// Sources that could not be reached, each with the time of the next attempt.
    pauses: HashMap<String, Instant>,
    news: mpsc::UnboundedSender<(String, News)>,
    started: Instant,
    store: Store,
    /// Time until which the hub is left alone.
    rest: Option<Instant>,
    logged: (Instant, u64),
    /// Keeps the model in the store while it is fetched.
    _pin: Option<Pin>,
    _work: Option<Work>,
}

struct Source {
    orders: mpsc::UnboundedSender<Order>,
    name: String,
    _task: AbortOnDropHandle<()>,
}

impl Fetch {
    /// Starts it; wants go into the channel.
    pub(super) fn spawn(
        models: Arc<Models>,
        store: Store,
        held: Arc<Held>,
        name: String,
    ) -> mpsc::UnboundedSender<Want> {
        let (sender, wants) = mpsc::unbounded_channel();
        let (news, incoming) = mpsc::unbounded_channel();
        let settings = Settings {
            begin: models.begin_at(),
            ..Settings::default()
        };
        let fetch = Fetch {
            _pin: models.pin(&held),
            _work: store.work().ok(),
            swarm: Swarm::new([], settings),
            writer: Arc::new(Writer {
                store: store.clone(),
                files: Mutex::default(),
            }),
            models,
            held,
            name,
            waiting: Vec::new(),
            sources: HashMap::new(),
            pauses: HashMap::new(),
            news,
            started: Instant::now(),
            store,
            rest: None,
            logged: (Instant::now(), 0),
        };
        let runtime = fetch.models.runtime.clone();
        runtime.spawn(fetch.run(wants, incoming));
        sender
    }

    async fn run(
        mut self,
        mut wants: mpsc::UnboundedReceiver<Want>,
        mut incoming: mpsc::UnboundedReceiver<(String, News)>,
    ) {
        let mut told = self.models.told();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // At the start at least one request waits.
        let mut idle = false;
        while !idle {
            let timer = self.swarm.next_timer();
            let due = async {
                match timer {
                    Some(timer) => tokio::time::sleep_until(timer.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(want) = wants.recv() => self.want(want).await,
                Some((source, news)) = incoming.recv() => self.take(source, news),
                _ = look.tick() => {
                    self.look(&mut told);
                    self.run_errand().await;
                }
                () = due => {}
            }
            // All other events are taken in before anything is decided.
            while let Ok((source, news)) = incoming.try_recv() {
                self.take(source, news);
            }
            self.act();
            self.settle().await;
            if self.waiting.is_empty() {
                idle = self.end(&wants).await;
            }
        }
    }

    async fn want(&mut self, want: Want) {
        let missing = self.held.missing(&want.pieces);
        let (writer, held) = (self.writer.clone(), self.held.clone());
        let begin = missing.clone();
        let begun = tokio::task::spawn_blocking(move || writer.begin(&held, &begin)).await;
        let begun = begun
            .map_err(|error| error.to_string())
            .and_then(|begun| begun.map_err(|error| error.to_string()));
        if let Err(error) = begun {
            let _ = want.done.send(Err(error));
            return;
        }
        let wanted = missing.iter().filter_map(|piece| self.held.wanted(piece));
        self.swarm.want(wanted.collect::<Vec<_>>());
        self.waiting.push(want);
        self.report();
    }

    fn take(&mut self, source: String, news: News) {
        let now = Instant::now();
        match news {
            News::Here(pieces) => {
                self.swarm.source(source, Kind::Peer, pieces, now);
            }
            News::Heard => self.swarm.heard(&source, now),
            News::Refused(piece) => self.swarm.refused(&source, piece),
            News::Piece(verified) => {
                let bytes = self.held.wanted(verified.piece()).map_or(0, |w| w.bytes);
                self.models.counters.from_peers.inc_by(bytes.into());
                self.swarm.arrived(&source, &verified, now);
                self.held.has(verified.piece());
            }
            News::Bad(bad) => self.swarm.bad(&source, &bad),
            News::Gone(reason) => {
                self.swarm.gone(&source);
                if let Some(gone) = self.sources.remove(&source) {
                    tracing::debug!(model = self.name, worker = gone.name, reason, "source gone");
                    // A worker that has not got it will hardly have it in a moment.
                    let pause = if reason.starts_with(REFUSES) {
                        REFUSED
                    } else {
                        PAUSE
                    };
                    self.pauses.insert(source, now + pause);
                }
            }
            News::Disk(error) => {
                for want in self.waiting.drain(..) {
                    let _ = want.done.send(Err(error.clone()));
                }
            }
        }
    }

    /// Carries out the swarm's decisions.
    fn act(&mut self) {
        for action in self.swarm.poll(Instant::now()) {
            match action {
                Action::Ask { source, piece } => {
                    if let (Some(source), Some(wanted)) =
                        (self.sources.get(&source), self.swarm.wanted(piece))
                    {
                        let _ = source.orders.send(Order::Ask(wanted.clone()));
                    }
                }
                Action::Withdraw { source, piece } => {
                    if let Some(source) = self.sources.get(&source) {
                        let _ = source.orders.send(Order::Withdraw(piece));
                    }
                }
                Action::Drop { source, reason } => {
                    let dropped = self.sources.remove(&source);
                    let worker = dropped.map_or_else(|| source.clone(), |source| source.name);
                    tracing::warn!(model = self.name, worker, %reason, "source of a model dropped");
                    if matches!(reason, DropReason::BadPiece { .. }) {
                        self.models.counters.bad.inc();
                        self.models.accuse(BadSource {
                            node_id: source,
                            fingerprint: self.held.fingerprint().to_string(),
                            reason: reason.to_string(),
                        });
                    }
                }
            }
        }
    }

    /// Opens streams to sources that the head named, closes those to others, and says how far it is.
    fn look(&mut self, told: &mut watch::Receiver<BTreeMap<String, ModelSources>>) {
        let now = Instant::now();
        let seats: Vec<NodeAddr> = self.models.seats(&told.borrow_and_update(), &self.held);
        let named = |node: &String| seats.iter().any(|seat| seat.node_id == *node);
        let dropped: Vec<String> = self
            .sources
            .keys()
            .filter(|node| !named(node))
            .cloned()
            .collect();
        for node in dropped {
            self.swarm.gone(&node);
            self.sources.remove(&node);
        }
        self.pauses.retain(|_, until| *until > now);
        let Some(peers) = self.models.peers() else {
            return;
        };
        for seat in seats {
            let node = seat.node_id.clone();
            if self.sources.contains_key(&node)
                || self.pauses.contains_key(&node)
                || !self.swarm.admits(&node, now)
                || self.sources.len() >= MOST_SOURCES
            {
                continue;
            }
            let (orders, received) = mpsc::unbounded_channel();
            let name = seat.name.clone();
            let task = tokio::spawn(source::run(
                peers.clone(),
                seat,
                self.held.clone(),
                self.writer.clone(),
                received,
                self.news.clone(),
            ));
            let source = Source {
                orders,
                name,
                _task: AbortOnDropHandle::new(task),
            };
            self.sources.insert(node, source);
        }
        self.report();
        if self.logged.0.elapsed() >= LOG {
            let progress = self.swarm.progress();
            let seconds = self.logged.0.elapsed().as_secs_f64();
            let rate = (progress.bytes - self.logged.1.min(progress.bytes)) as f64 / seconds;
            tracing::info!(
                model = self.name,
                "{} of {} are here, {}/s from {} workers",
                about_bytes(progress.bytes),
                about_bytes(progress.bytes_total),
                about_bytes(rate as u64),
                progress.sources,
            );
            self.logged = (Instant::now(), progress.bytes);
        }
    }

    /// Gets pieces that no worker holds from the hub, if this worker is the one to do it: all of the model,
    /// since others may lack other parts. They get its pieces from here as they come.
    async fn run_errand(&mut self) {
        if self.rest.is_some_and(|until| until <= Instant::now()) {
            self.rest = None;
            self.models.seeks(&self.name, |s| s.origin_error.clear());
        }
        let told = self.models.told().borrow().get(&self.name).cloned();
        let Some(hub_name) = self
            .held
            .hub_name()
            .filter(|_| self.rest.is_none() && self.models.has_errand(&self.name, told.as_ref()))
        else {
            return;
        };
        // The files are the hub's to write now.
        for source in std::mem::take(&mut self.sources).into_keys() {
            self.swarm.gone(&source);
        }
        let _ = self.close(true).await;
        let fetching = origin::fetch(&self.models, &self.store, &self.name, &hub_name);
        tokio::pin!(fetching);
        let mut look = tokio::time::interval(ERRAND_LOOK);
        let fetched = loop {
            tokio::select! {
                fetched = &mut fetching => break Some(fetched),
                _ = look.tick() => {
                    self.look_again().await;
                    let told = self.models.told().borrow().get(&self.name).cloned();
                    if !self.models.has_errand(&self.name, told.as_ref()) {
                        break None;
                    }
                }
            }
        };
        self.look_again().await;
        let mut error = None;
        if let Some(Err(failed)) = fetched {
            tracing::error!(model = self.name, error = %failed, "the hub does not give the model");
            self.rest = Some(Instant::now() + failed.pause);
            error = Some(failed.to_string());
        }
        // Pieces that are still missing are fetched as before.
        let mut lacking = PieceSet::none(self.held.pieces());
        for want in &self.waiting {
            lacking.union(&self.held.missing(&want.pieces));
        }
        self.swarm = Swarm::new([], self.swarm.settings().clone());
        let (writer, held, begin) = (self.writer.clone(), self.held.clone(), lacking.clone());
        let begun = tokio::task::spawn_blocking(move || writer.begin(&held, &begin)).await;
        if let Ok(Err(error)) = begun {
            for want in self.waiting.drain(..) {
                let _ = want.done.send(Err(error.to_string()));
            }
        }
        let wanted = lacking.iter().filter_map(|piece| self.held.wanted(piece));
        self.swarm.want(wanted.collect::<Vec<_>>());
        self.report();
        if let Some(error) = error {
            self.models.seeks(&self.name, |s| s.origin_error = error);
        }
    }

    fn report(&self) {
        let mut missing = PieceSet::none(self.held.pieces());
        for piece in self.swarm.missing() {
            missing.insert(piece);
        }
        let progress = self.swarm.progress();
        let origin = self.models.config.store.hub && self.held.hub_name().is_some();
        self.models.seeks(&self.name, |sought| {
            sought.origin = origin;
            sought.fingerprint = self.held.fingerprint().to_string();
            sought.missing = Some(missing.to_proto());
            (sought.bytes, sought.bytes_total) = (progress.bytes, progress.bytes_total);
        });
    }

    /// Tells those whose pieces are all here. Files that are whole become blobs before that.
    async fn settle(&mut self) {
        let here = self.held.here();
        let is_whole = |want: &Want| {
            let mut missing = want.pieces.clone();
            missing.subtract(&here);
            missing.is_empty()
        };
        if !self.waiting.iter().any(is_whole) {
            return;
        }
        if let Err(error) = self.close(false).await {
            let text = error.to_string();
            if matches!(error, StoreError::Mismatch { .. }) {
                self.disown(&text).await;
            } else {
                // Pieces that were not stored are not here, and are fetched again on the next request.
                self.sources.clear();
                self.swarm = Swarm::new([], self.swarm.settings().clone());
                self.look_again().await;
            }
            for want in self.waiting.drain(..) {
                let _ = want.done.send(Err(text.clone()));
            }
            return;
        }
        let waiting = std::mem::take(&mut self.waiting);
        let (done, waiting): (Vec<Want>, Vec<Want>) = waiting.into_iter().partition(is_whole);
        self.waiting = waiting;
        for want in done {
            let _ = want.done.send(Ok(()));
        }
    }

    /// Withdraws this model, whose files are not what its manifest says, and removes it from the store.
    async fn disown(&mut self, reason: &str) {
        self.models.disown(&self.held, reason);
        self._pin = None;
        let _ = self.close(true).await;
        let (store, held) = (self.store.clone(), self.held.clone());
        let fingerprint = held.fingerprint();
        let removed = tokio::task::spawn_blocking(move || {
            held.look();
            let names = store.names()?;
            let mut names = names
                .iter()
                .filter(|named| named.fingerprint == fingerprint);
            // Another worker's manifest must not remove this machine's own files.
            let from_others = names.next().is_some_and(|first| {
                first.is_from_worker() && names.all(mesh_store::Named::is_from_worker)
            });
            match from_others {
                true => store.remove(&fingerprint).map(drop),
                false => Ok(()),
            }
        });
        if let Ok(Err(error)) = removed.await {
            tracing::warn!(model = self.name, %error, "a model that is not what it says stays in the store");
        }
    }

    /// Checks which of its pieces are on the disk.
    async fn look_again(&self) {
        let held = self.held.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || held.look()).await {
            tracing::error!(model = self.name, %error, "cannot look what is here of the model");
        }
    }

    async fn close(&self, all: bool) -> Result<(), StoreError> {
        let (writer, held) = (self.writer.clone(), self.held.clone());
        let closed = tokio::task::spawn_blocking(move || writer.close(&held, all)).await;
        let closed = closed.unwrap_or_else(|error| {
            Err(StoreError::Io {
                action: "write to",
                path: self.store.root().to_owned(),
                source: std::io::Error::other(error),
            })
        });
        if let Err(error) = &closed {
            tracing::error!(model = self.name, %error, "model not stored");
        }
        closed
    }

    /// Cleans up when no request waits any more. Returns true if that is the end.
    async fn end(&mut self, wants: &mpsc::UnboundedReceiver<Want>) -> bool {
        // Errors of the store were reported to the requests that waited.
        if self.close(true).await.is_err() {
            self.look_again().await;
        }
        if !self.models.end_fetch(&self.held.fingerprint(), wants) {
            return false;
        }
        let progress = self.swarm.progress();
        tracing::info!(
            model = self.name,
            bytes = progress.bytes,
            twice = progress.bytes_twice,
            seconds = self.started.elapsed().as_secs_f64(),
            "pieces of the model came from other workers"
        );
        self.models.no_longer_seeks(&self.name);
        true
    }
}

const BUSY_ATTEMPTS: u32 = 100;
const BUSY_PAUSE: Duration = Duration::from_millis(100);
const LOOK: Duration = Duration::from_millis(100);
const ERRAND_LOOK: Duration = Duration::from_millis(300);
const LOG: Duration = Duration::from_secs(5);
/// Time for which a source that could not be reached is left alone.
const PAUSE: Duration = Duration::from_secs(2);
const REFUSED: Duration = Duration::from_secs(30);
const MOST_SOURCES: usize = 16;
