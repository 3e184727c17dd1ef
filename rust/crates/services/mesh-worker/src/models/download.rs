//! Gets pieces of one model, as the core's download wants it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_base::random;
use mesh_share::PieceSet;
use mesh_store::{Digest, Named, Pin, Store, StoreError, Work};
use mesh_worker_core::{DownloadStep, SourceEvent};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::context::{Models, blocking};
use super::files::ReplicaFiles;
use super::hub;
use super::source::{self, Order};
use super::writer::Writer;
use crate::core::CoreHandle;

impl Models {
    /// Resolves when all these pieces of a model are here.
    pub(crate) async fn fetch(
        self: &Arc<Self>,
        files: &Arc<ReplicaFiles>,
        pieces: PieceSet,
    ) -> Result<(), String> {
        let (of, core) = (files.map().fingerprint(), &self.core);
        // Another one on each worker.
        let begin = random::number() as u32;
        let mut changes = core.changes();
        let wanted = core.change(|core| core.catalogue.want(&of, pieces, begin, Instant::now()))?;
        let Some((want, begins)) = wanted else {
            return Ok(());
        };
        let _forgets = Forget { core, of, want };
        if begins && let Some(store) = &self.store {
            Download::spawn(self.clone(), store, files.clone());
        }
        loop {
            if let Some(result) = core.with(|core| core.catalogue.take_result(want)) {
                return result;
            }
            changes.next().await;
        }
    }
}

/// Forgets a request that nobody waits for any more.
struct Forget<'a> {
    core: &'a CoreHandle,
    of: Digest,
    want: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        let (of, want) = (&self.of, self.want);
        self.core.with(|core| core.catalogue.forget_want(of, want));
    }
}

struct Download {
    models: Arc<Models>,
    files: Arc<ReplicaFiles>,
    store: Store,
    writer: Arc<Writer>,
    sources: HashMap<String, Source>,
    news: mpsc::UnboundedSender<(String, SourceEvent)>,
    /// Keeps the model in the store while it is fetched.
    pin: Option<Pin>,
    _work: Option<Work>,
    ended: bool,
}

struct Source {
    orders: mpsc::UnboundedSender<Order>,
    _task: AbortOnDropHandle<()>,
}

impl Drop for Download {
    fn drop(&mut self) {
        if !self.ended {
            let (of, core) = (self.of(), &self.models.core);
            let gone = "the task that fetches it is gone";
            core.change(|core| core.catalogue.give_up_download(&of, gone));
        }
    }
}

impl Download {
    fn spawn(models: Arc<Models>, store: &Store, files: Arc<ReplicaFiles>) {
        let (news, incoming) = mpsc::unbounded_channel();
        let download = Download {
            pin: models.pin(&files),
            _work: store.work().ok(),
            writer: Arc::new(Writer::new(store)),
            store: store.clone(),
            sources: HashMap::new(),
            news,
            models,
            files,
            ended: false,
        };
        let runtime = download.models.runtime.clone();
        runtime.spawn(download.run(incoming));
    }

    fn of(&self) -> Digest {
        self.files.map().fingerprint()
    }

    async fn run(mut self, mut incoming: mpsc::UnboundedReceiver<(String, SourceEvent)>) {
        let (of, core) = (self.of(), self.models.core.clone());
        let mut changes = core.changes();
        loop {
            let step = core.with(|core| core.catalogue.poll_download(&of, Instant::now()));
            match step {
                DownloadStep::Prepare(pieces) => {
                    let (writer, files) = (self.writer.clone(), self.files.clone());
                    let begun = blocking(move || writer.begin(&files, &pieces)).await;
                    core.change(|core| core.catalogue.prepared(&of, begun));
                }
                DownloadStep::Open(seat) => self.open(seat),
                DownloadStep::Close { source, bad } => {
                    self.sources.remove(&source);
                    if bad {
                        self.models.counters.bad.inc();
                    }
                }
                DownloadStep::Ask(source, wanted) => self.order(&source, Order::Ask(wanted)),
                DownloadStep::Withdraw(source, piece) => {
                    self.order(&source, Order::Withdraw(piece));
                }
                DownloadStep::Store { all } => {
                    let stored = self.close(all).await.map_err(|error| {
                        let is_false = matches!(error, StoreError::Mismatch { .. });
                        (error.to_string(), is_false)
                    });
                    core.change(|core| core.catalogue.stored(&of, stored));
                }
                DownloadStep::FetchFromHub(name, hub_name) => {
                    self.fetch_from_hub(&name, &hub_name).await;
                }
                DownloadStep::Look => self.look().await,
                DownloadStep::Discard => self.discard().await,
                DownloadStep::End => {
                    self.ended = true;
                    return;
                }
                DownloadStep::Wait(until) => {
                    tokio::select! {
                        Some((source, news)) = incoming.recv() => self.take(source, news),
                        () = changes.next_until(until) => {}
                    }
                    // All other events are taken in before anything is decided.
                    while let Ok((source, news)) = incoming.try_recv() {
                        self.take(source, news);
                    }
                }
            }
        }
    }

    fn open(&mut self, seat: mesh_proto::NodeAddr) {
        let Some(peers) = self.models.peers.get() else {
            return;
        };
        let (orders, received) = mpsc::unbounded_channel();
        let node = seat.node_id.clone();
        let task = tokio::spawn(source::run(
            peers.clone(),
            seat,
            self.files.clone(),
            self.writer.clone(),
            received,
            self.news.clone(),
        ));
        let source = Source {
            orders,
            _task: AbortOnDropHandle::new(task),
        };
        self.sources.insert(node, source);
    }

    fn order(&self, source: &str, order: Order) {
        if let Some(source) = self.sources.get(source) {
            let _ = source.orders.send(order);
        }
    }

    fn take(&mut self, source: String, event: SourceEvent) {
        match &event {
            SourceEvent::Piece(verified) => {
                let wanted = self.files.map().wanted(verified.piece());
                let bytes = wanted.map_or(0, |wanted| wanted.bytes);
                self.models.counters.from_peers.inc_by(bytes.into());
            }
            SourceEvent::Gone { .. } => drop(self.sources.remove(&source)),
            _ => {}
        }
        let (of, now, core) = (self.of(), Instant::now(), &self.models.core);
        core.with(|core| core.catalogue.source_event(&of, source, event, now));
    }

    /// Gets the model from the hub. Others get its pieces from here as they come.
    async fn fetch_from_hub(&self, name: &str, hub_name: &str) {
        let (of, core) = (self.of(), &self.models.core);
        let fetching = hub::fetch(&self.models, &self.store, name, hub_name);
        tokio::pin!(fetching);
        let mut look = tokio::time::interval(HUB_LOOK);
        let fetched = loop {
            tokio::select! {
                fetched = &mut fetching => break Some(fetched),
                _ = look.tick() => {
                    self.look().await;
                    if !core.with(|core| core.catalogue.keeps_hub(&of)) {
                        break None;
                    }
                }
            }
        };
        self.look().await;
        let failure = fetched.and_then(Result::err);
        core.change(|core| core.catalogue.hub_ended(&of, failure, Instant::now()));
    }

    /// Removes this model from the store, whose files are not what its manifest says.
    async fn discard(&mut self) {
        self.models.counters.bad.inc();
        self.pin = None;
        let _ = self.close(true).await;
        let (store, fingerprint) = (self.store.clone(), self.of());
        let removed = tokio::task::spawn_blocking(move || {
            let names = store.names()?;
            let mut names = names
                .iter()
                .filter(|named| named.fingerprint == fingerprint);
            // Another worker's manifest must not remove this machine's own files.
            match names.next() {
                Some(first) if first.is_from_worker() && names.all(Named::is_from_worker) => {
                    store.remove(&fingerprint).map(drop)
                }
                _ => Ok(()),
            }
        });
        if let Ok(Err(error)) = removed.await {
            let model = &self.files.map().manifest().name;
            tracing::warn!(model, %error, "a model that is not what it says stays in the store");
        }
    }

    async fn look(&self) {
        let files = self.files.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || files.look()).await {
            let model = &self.files.map().manifest().name;
            tracing::error!(model, %error, "cannot look what is here of the model");
        }
    }

    async fn close(&self, all: bool) -> Result<(), StoreError> {
        let (writer, files) = (self.writer.clone(), self.files.clone());
        let closed = tokio::task::spawn_blocking(move || writer.close(&files, all)).await;
        let closed = closed.unwrap_or_else(|error| {
            Err(StoreError::Io {
                action: "write to",
                path: self.store.root().to_owned(),
                source: std::io::Error::other(error),
            })
        });
        if let Err(error) = &closed {
            tracing::error!(model = self.files.map().manifest().name, %error, "model not stored");
        }
        closed
    }
}

const HUB_LOOK: Duration = Duration::from_millis(300);
