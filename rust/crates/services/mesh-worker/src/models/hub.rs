//! Gets a model from the hub, when the head gives this worker its download.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_base::units::about_bytes;
use mesh_hub::{Expected, Hub, HubError, HubName, PullOptions, Watch, pull};
use mesh_store::{Digest, Store};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::context::{Models, blocking};

struct Counting {
    models: Arc<Models>,
    name: String,
    arrived: AtomicU64,
    present: AtomicU64,
    total: AtomicU64,
}

impl Counting {
    fn show(&self) {
        let arrived = self.arrived.load(Ordering::Relaxed);
        let present = self.present.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        self.models.core.with(|core| {
            let catalogue = &mut core.catalogue;
            catalogue.hub_progress(&self.name, present + arrived, total);
        });
    }
}

impl Watch for Counting {
    fn planned(&self, missing: u64, present: u64) {
        self.present.store(present, Ordering::Relaxed);
        let total = self.arrived.load(Ordering::Relaxed) + missing + present;
        self.total.store(total, Ordering::Relaxed);
    }

    fn arrived(&self, bytes: u64) {
        self.arrived.fetch_add(bytes, Ordering::Relaxed);
        self.models.counters.from_origin.inc_by(bytes);
    }

    fn waiting(&self, reason: &str, pause: Duration) {
        tracing::warn!(model = self.name, reason, ?pause, "the hub is asked again");
    }
}

/// The reason for which the hub does not give a model, and the time for which it is left alone.
pub(super) type HubFailure = (String, Duration);

fn of_hub(error: HubError) -> HubFailure {
    let pause = if error.is_refusal() { REFUSED } else { FAILED };
    (error.to_string(), pause)
}

/// Something else than the hub is in the way.
pub(super) fn hindered(reason: impl ToString) -> HubFailure {
    (reason.to_string(), FAILED)
}

/// What came is not accepted.
pub(super) fn unaccepted(reason: impl ToString) -> HubFailure {
    (reason.to_string(), REFUSED)
}

/// Brings the model that is sought as `name`, and called `hub_name` on the hub, into `store`. Dropping the
/// future stops the transfer; bytes that have arrived by then are kept.
pub(super) async fn fetch(
    models: &Arc<Models>,
    store: &Store,
    name: &str,
    hub_name: &str,
) -> Result<Digest, HubFailure> {
    let hub_name: HubName = hub_name.parse().map_err(of_hub)?;
    let counting = Arc::new(Counting {
        models: models.clone(),
        name: name.to_owned(),
        arrived: AtomicU64::new(0),
        present: AtomicU64::new(0),
        total: AtomicU64::new(0),
    });
    tracing::info!(model = name, "this worker gets the model from the hub");
    let stop = CancellationToken::new();
    let _stops_when_dropped = stop.clone().drop_guard();
    let (store, runtime) = (store.clone(), Handle::current());
    // A thread of its own: the hub's future stays on one.
    let pulling = tokio::task::spawn_blocking(move || {
        runtime.block_on(async {
            tokio::select! {
                pulled = run(&store, &hub_name, counting) => Some(pulled),
                () = stop.cancelled() => None,
            }
        })
    });
    match pulling.await {
        Ok(Some(pulled)) => pulled,
        Ok(None) => Err(hindered("it was broken off")),
        Err(error) => Err(hindered(error)),
    }
}

/// Asks the hub for the files of the model `name`.
pub(super) async fn expected(name: &str) -> Result<Expected, String> {
    let name: HubName = name.parse().map_err(|error: HubError| error.to_string())?;
    let runtime = Handle::current();
    // A thread of its own: the hub's future stays on one.
    let asking = move || {
        runtime.block_on(async {
            let hub = Hub::from_env().map_err(|error| error.to_string())?;
            let asked = tokio::time::timeout(ASK_LIMIT, hub.expected(&name, &Silent)).await;
            let asked =
                asked.map_err(|_| format!("it did not answer in {} s", ASK_LIMIT.as_secs()))?;
            asked.map_err(|error| error.to_string())
        })
    };
    blocking(asking).await
}

/// Shows no progress: the answer is a few kilobytes.
struct Silent;

impl Watch for Silent {
    fn planned(&self, _: u64, _: u64) {}
    fn arrived(&self, _: u64) {}
    fn waiting(&self, _: &str, _: Duration) {}
}

async fn run(
    store: &Store,
    hub_name: &HubName,
    counting: Arc<Counting>,
) -> Result<Digest, HubFailure> {
    let hub = Hub::from_env().map_err(of_hub)?;
    let options = PullOptions::default();
    let watch: Arc<dyn Watch> = counting.clone();
    let pulling = pull(&hub, store, hub_name, &options, watch);
    tokio::pin!(pulling);
    let model = &counting.name;
    let mut tick = tokio::time::interval(TICK);
    let mut ticks = 0u32;
    let pulled = loop {
        tokio::select! {
            pulled = &mut pulling => break pulled.map_err(of_hub)?,
            _ = tick.tick() => {
                counting.show();
                ticks += 1;
                if ticks.is_multiple_of(LOG_TICKS) {
                    let arrived = counting.arrived.load(Ordering::Relaxed);
                    let total = counting.total.load(Ordering::Relaxed);
                    tracing::info!(model, "{} of {} came from the hub", about_bytes(arrived), about_bytes(total));
                }
            }
        }
    };
    tracing::info!(
        model,
        bytes = pulled.fetched,
        commit = pulled.commit,
        "the model came from the hub"
    );
    let fingerprint = pulled.fingerprint;
    fingerprint.ok_or_else(|| hindered("only a part of the model came"))
}

/// Time limit for the hub's answer about the files of a model.
const ASK_LIMIT: Duration = Duration::from_secs(20);
const TICK: Duration = Duration::from_millis(250);
/// Every 5 s.
const LOG_TICKS: u32 = 20;
/// Time for which the hub is left alone after it could not be reached, and after it refused.
const FAILED: Duration = Duration::from_secs(30);
const REFUSED: Duration = Duration::from_secs(300);
