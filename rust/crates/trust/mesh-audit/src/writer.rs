//! The writer: a thread that takes records from a bounded queue. Whoever records something never waits for
//! it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tracing::{error, info, warn};

use crate::home::{Lock, Tier};
use crate::kept::{SHOWN, ShownEpochs};
use crate::keys::Identity;
use crate::record::{Event, Text};
use crate::store::{Limits, Store, StoreError};

/// Settings of a writer.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the mesh, which becomes a part of the names of trails.
    pub mesh: String,
    /// Version of the program.
    pub version: String,
    /// Longest time between a record and the signature and sync of its group: a loss of power costs at most
    /// these records.
    pub sync_interval: Duration,
    /// Pause between publications of tiles.
    pub publish_interval: Duration,
    /// Time over which envelopes of like messages are counted into one record; 0 records each.
    pub message_interval: Duration,
    /// Records that may wait; more are lost, and counted.
    pub queue: usize,
    /// Limits of each trail.
    pub limits: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mesh: "hydramesh".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            sync_interval: Duration::from_secs(1),
            publish_interval: Duration::from_secs(10),
            message_interval: Duration::from_secs(60),
            queue: 16_384,
            limits: Limits::default(),
        }
    }
}

/// Numbers since the start.
#[derive(Debug, Default)]
pub struct Counts {
    /// Records that were written.
    pub written: AtomicU64,
    /// Records that are signed and on disk.
    pub synced: AtomicU64,
    /// Groups that were signed.
    pub groups: AtomicU64,
    /// Records that were lost because the queue was full or the disk failed.
    pub lost: AtomicU64,
    /// Failed writes.
    pub failures: AtomicU64,
    /// Records in the queue.
    pub waiting: AtomicU64,
}

/// The trails of a node, for writing. Clones write to the same.
#[derive(Debug, Clone)]
pub struct Audit(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    sender: Mutex<Option<SyncSender<Item>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    counts: Arc<Counts>,
    epochs: Arc<Mutex<Epochs>>,
}

/// The last epochs of each trail that is open.
type Epochs = BTreeMap<Tier, ShownEpochs>;

#[derive(Debug)]
enum Item {
    Event(Tier, Box<Event>),
    Messages(Envelope, Tally),
}

/// What a message shows of itself without its contents.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Envelope {
    /// `dcf`, `bus` or `link`.
    pub carrier: &'static str,
    /// Type of the message.
    pub message: String,
    /// Id of the node, or address of the client.
    pub from: String,
}

/// Messages that differ in nothing but time and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// Number of messages.
    pub count: u64,
    /// Payload bytes of all of them.
    pub bytes: u64,
    /// Time of the first one, in milliseconds since the Unix epoch.
    pub since: u64,
}

impl Audit {
    /// Opens the trails in a folder, and begins to write.
    ///
    /// # Errors
    /// If another process writes them, or files cannot be read or written.
    pub fn start(
        dir: &Path,
        settings: Settings,
        identity: Option<Box<dyn Identity + Send>>,
    ) -> Result<Self, StoreError> {
        let counts = Arc::new(Counts::default());
        let epochs = Arc::new(Mutex::new(Epochs::new()));
        let mut writer = Writer {
            lock: Lock::take(dir)?,
            identity,
            stores: BTreeMap::new(),
            messages: BTreeMap::new(),
            counts: counts.clone(),
            epochs: epochs.clone(),
            unsynced: None,
            told: None,
            settings,
        };
        let (mesh, version) = (&writer.settings.mesh, &writer.settings.version);
        let start = Event::Start {
            mesh: mesh.into(),
            version: version.into(),
        };
        writer.append(Tier::Master, &start)?;
        writer.sync()?;
        writer.show_epochs();
        let (sender, receiver) = sync_channel(writer.settings.queue);
        let thread = std::thread::Builder::new().name("audit".to_owned());
        let thread = thread.spawn(move || writer.run(&receiver))?;
        Ok(Self(Arc::new(Shared {
            sender: Mutex::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
            counts,
            epochs,
        })))
    }

    /// Records an event. It never waits: if the queue is full, the record is lost, and the trail says how
    /// many were.
    pub fn record(&self, tier: Tier, event: Event) {
        self.send(Item::Event(tier, Box::new(event)));
    }

    /// Records the envelope of an accepted message with so many payload bytes.
    pub fn message(&self, envelope: Envelope, bytes: u64) {
        let tally = Tally {
            count: 1,
            bytes,
            since: now(),
        };
        self.messages(envelope, tally);
    }

    /// Records the envelope of messages that were counted already.
    pub fn messages(&self, envelope: Envelope, tally: Tally) {
        self.send(Item::Messages(envelope, tally));
    }

    fn send(&self, item: Item) {
        let counts = &self.0.counts;
        // Held for the time of a push to the queue.
        let sender = self.0.sender.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(sender) = sender.as_ref() else {
            return;
        };
        counts.waiting.fetch_add(1, Ordering::Relaxed);
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = sender.try_send(item) {
            counts.waiting.fetch_sub(1, Ordering::Relaxed);
            counts.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Numbers since the start.
    pub fn counts(&self) -> &Counts {
        &self.0.counts
    }

    /// The last epochs that have ended, of each trail with records since the start.
    pub fn epochs(&self) -> Vec<ShownEpochs> {
        let epochs = self.0.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        epochs.values().cloned().collect()
    }

    /// Writes what waits, signs, syncs and publishes it, and ends the thread. Blocks for the time that this
    /// takes.
    pub fn stop(&self) {
        let sender = &self.0.sender;
        drop(sender.lock().unwrap_or_else(PoisonError::into_inner).take());
        let thread = self
            .0
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            error!("the writer of the audit trail panicked");
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let sender = self
            .sender
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        drop(sender.take());
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            let _ = thread.join();
        }
    }
}

struct Writer {
    lock: Lock,
    identity: Option<Box<dyn Identity + Send>>,
    stores: BTreeMap<Tier, Store>,
    /// Messages that were counted and not recorded yet.
    messages: BTreeMap<Envelope, Tally>,
    counts: Arc<Counts>,
    epochs: Arc<Mutex<Epochs>>,
    /// Time of the first record that is not synced.
    unsynced: Option<Instant>,
    /// Time of the last complaint.
    told: Option<Instant>,
    settings: Settings,
}

impl Writer {
    fn run(mut self, queue: &Receiver<Item>) {
        let mut published = Instant::now();
        let mut counted = Instant::now();
        let mut reported = 0;
        loop {
            let wait = match self.unsynced {
                Some(first) => self.settings.sync_interval.saturating_sub(first.elapsed()),
                None => self.settings.publish_interval.min(IDLE),
            };
            match queue.recv_timeout(wait) {
                Ok(item) => {
                    self.take(item);
                    // A busy queue is still synced in time.
                    for item in queue.try_iter().take(BATCH) {
                        self.take(item);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if counted.elapsed() >= self.settings.message_interval
                || self.messages.len() > MOST_SENDERS
            {
                self.flush_messages();
                counted = Instant::now();
            }
            reported = self.report_lost(reported);
            if self
                .unsynced
                .is_some_and(|first| first.elapsed() >= self.settings.sync_interval)
            {
                let synced = self.sync();
                self.check(synced);
            }
            if published.elapsed() >= self.settings.publish_interval {
                let maintained = self.maintain();
                self.check(maintained);
                published = Instant::now();
            }
        }
        self.flush_messages();
        self.report_lost(reported);
        let ended = self
            .append(Tier::Master, &Event::Stop)
            .and_then(|()| self.maintain());
        self.check(ended);
    }

    fn take(&mut self, item: Item) {
        self.counts.waiting.fetch_sub(1, Ordering::Relaxed);
        match item {
            Item::Event(tier, event) => self.write(tier, &event),
            Item::Messages(envelope, tally) if self.settings.message_interval.is_zero() => {
                self.write(Tier::Master, &messages(&envelope, tally));
            }
            Item::Messages(envelope, tally) => {
                let counted = self.messages.entry(envelope).or_insert(Tally {
                    count: 0,
                    bytes: 0,
                    ..tally
                });
                counted.count += tally.count;
                counted.bytes = counted.bytes.saturating_add(tally.bytes);
            }
        }
    }

    fn flush_messages(&mut self) {
        for (envelope, tally) in std::mem::take(&mut self.messages) {
            self.write(Tier::Master, &messages(&envelope, tally));
        }
    }

    /// Records how many records were lost since `reported`, and returns the new number.
    fn report_lost(&mut self, reported: u64) -> u64 {
        let lost = self.counts.lost.load(Ordering::Relaxed);
        let Some(count) = lost.checked_sub(reported).filter(|count| *count > 0) else {
            return reported;
        };
        if self.append(Tier::Master, &Event::Lost { count }).is_err() {
            return reported;
        }
        warn!(
            count,
            "records of the audit trail were lost: they came faster than they can be written"
        );
        lost
    }

    /// Writes a record; one that cannot be written is lost.
    fn write(&mut self, tier: Tier, event: &Event) {
        let written = self.append(tier, event);
        if written.is_err() {
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
        }
        self.check(written);
    }

    fn check(&mut self, done: Result<(), StoreError>) {
        let Err(error) = done else { return };
        self.counts.failures.fetch_add(1, Ordering::Relaxed);
        // What failed is tried again at the next interval, not at once.
        self.unsynced = self.unsynced.map(|_| Instant::now());
        if self.told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            error!(%error, "the audit trail cannot be written");
            self.told = Some(Instant::now());
        }
    }

    fn append(&mut self, tier: Tier, event: &Event) -> Result<(), StoreError> {
        let now = now();
        if !self.stores.contains_key(&tier) {
            let store = self.open(tier, now)?;
            self.stores.insert(tier, store);
        }
        let store = self.stores.get_mut(&tier).expect("it was opened above");
        store.append(event, now)?;
        self.counts.written.fetch_add(1, Ordering::Relaxed);
        self.unsynced.get_or_insert_with(Instant::now);
        Ok(())
    }

    fn open(&self, tier: Tier, now: u64) -> Result<Store, StoreError> {
        let identity = self.identity.as_deref();
        let identity = identity.map(|identity| identity as &dyn Identity);
        let (mesh, limits) = (&self.settings.mesh, self.settings.limits);
        let opened = self.lock.open(tier, mesh, identity, limits, now)?;
        let recovered = opened.recovered;
        if recovered.is_notable() {
            warn!(
                %tier,
                records = recovered.records,
                unsigned = recovered.unsigned,
                cut_bytes = recovered.cut_bytes,
                "the audit trail was recovered after a crash"
            );
        }
        if let Some((path, reason)) = opened.set_aside {
            error!(
                %tier,
                path = %path.display(),
                reason,
                "the audit trail was damaged: it was set aside and a new one begun; look at it with `hydramesh audit verify`"
            );
        }
        info!(%tier, origin = opened.store.origin(), records = opened.store.size(), "audit trail");
        Ok(opened.store)
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        let now = now();
        let mut synced = 0;
        for store in self.stores.values_mut() {
            let before = store.synced();
            let after = store.sync(now)?;
            synced += after - before;
            self.counts
                .groups
                .fetch_add(u64::from(after > before), Ordering::Relaxed);
        }
        self.counts.synced.fetch_add(synced, Ordering::Relaxed);
        self.unsynced = None;
        Ok(())
    }

    fn maintain(&mut self) -> Result<(), StoreError> {
        self.sync()?;
        for store in self.stores.values_mut() {
            store.maintain(now())?;
        }
        self.show_epochs();
        Ok(())
    }

    /// Notes the last epochs of trails in which one has ended.
    fn show_epochs(&self) {
        let mut shown = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        for (&tier, store) in &self.stores {
            let last = shown.get(&tier).and_then(|shown| shown.epochs.last());
            if last.map_or(0, |last| last.epoch + 1) == store.epoch() {
                continue;
            }
            match store.ended_epochs(SHOWN) {
                Ok(epochs) => {
                    let trail = store.origin().to_owned();
                    let epochs = ShownEpochs {
                        tier,
                        trail,
                        epochs,
                    };
                    shown.insert(tier, epochs);
                }
                Err(error) => warn!(%tier, %error, "the epochs of the audit trail are not shown"),
            }
        }
    }
}

fn messages(envelope: &Envelope, tally: Tally) -> Event {
    Event::Message {
        carrier: envelope.carrier.into(),
        message: Text::from(&envelope.message),
        from: Text::from(&envelope.from),
        count: tally.count,
        bytes: tally.bytes,
        since: tally.since,
    }
}

/// Milliseconds since the Unix epoch.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// Records between two looks at the clock.
const BATCH: usize = 1024;
/// Like messages that are counted at a time.
const MOST_SENDERS: usize = 4096;
const IDLE: Duration = Duration::from_secs(1);
const TELL_EVERY: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::Archive;
    use crate::record;
    use crate::verify::{Options, verify};

    fn kinds(dir: &Path, tier: Tier) -> Vec<Event> {
        let archive = Archive::open(&dir.join(tier.as_str())).unwrap();
        let report = verify(&archive, &Options::default()).unwrap();
        assert_eq!(report.findings, []);
        let mut events = Vec::new();
        let taken = archive.entries(0, |_, entry| {
            events.push(record::event(record::split(entry).unwrap().0).unwrap());
            true
        });
        taken.unwrap();
        events
    }

    #[test]
    fn records_of_each_tier_go_to_its_trail_and_messages_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::start(dir.path(), Settings::default(), None).unwrap();
        assert!(
            Audit::start(dir.path(), Settings::default(), None).is_err(),
            "one writer"
        );
        assert!(Lock::is_taken(dir.path()));
        let leave = || Event::Leave {
            node: "a".into(),
            name: "pi".into(),
            reason: "gone".into(),
        };
        audit.record(Tier::Master, leave());
        audit.record(Tier::Goodlife, leave());
        for bytes in [10, 20, 30] {
            let envelope = Envelope {
                carrier: "bus",
                message: "SealedHeartbeat".to_owned(),
                from: "a".to_owned(),
            };
            audit.message(envelope, bytes);
        }
        audit.stop();
        audit.record(Tier::Master, leave());
        let master = kinds(dir.path(), Tier::Master);
        assert_eq!(master.len(), 4, "{master:?}");
        assert!(matches!(&master[0], Event::Start { .. }));
        assert_eq!(master[1], leave());
        assert!(matches!(
            &master[2],
            Event::Message {
                count: 3,
                bytes: 60,
                ..
            }
        ));
        assert_eq!(master[3], Event::Stop);
        assert_eq!(kinds(dir.path(), Tier::Goodlife), [leave()]);
        assert_eq!(audit.counts().synced.load(Ordering::Relaxed), 5);
        assert!(!Lock::is_taken(dir.path()));
    }

    #[test]
    fn a_full_queue_loses_records_counts_them_and_nobody_waits() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            queue: 4,
            ..Settings::default()
        };
        let audit = Audit::start(dir.path(), settings, None).unwrap();
        for _ in 0..20_000 {
            audit.record(Tier::Master, Event::Stop);
        }
        audit.stop();
        let lost = audit.counts().lost.load(Ordering::Relaxed);
        assert!(lost > 0);
        let events = kinds(dir.path(), Tier::Master);
        let told: u64 = events
            .iter()
            .map(|event| {
                if let Event::Lost { count } = event {
                    *count
                } else {
                    0
                }
            })
            .sum();
        assert_eq!(told, lost);
        let kept = events.iter().filter(|event| **event == Event::Stop).count() as u64;
        assert_eq!(kept, 20_000 - lost + 1);
    }
}
