//! Workers without an identity: those of DCF v5.0.0 and v5.1, which take plain tasks over UDP.
//!
//! All rules for them that are not transport are here, and the rest of the head knows them by
//! [`Worker::has_identity`] alone. An operator has to admit them. They enter with a heartbeat that proves
//! nothing, report neither models nor load, work on one task after the other and answer with the whole Result.
//! So they serve only requests that can be a plain task (`Requirements::plain`), count as serving for as long as their
//! heartbeats come, and get a request only while no worker of the mesh that serves it can be waited for.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use dcf::Version;

use super::Registry;
use super::served::Service;
use super::worker::{Carrier, Worker, WorkerId};

/// Names of the kinds of workers, as metrics and the API show them.
pub const KINDS: [&str; 3] = [MESH, Version::V5_0.name(), Version::V5_1.name()];

impl Registry {
    /// A heartbeat of a worker without an identity that takes tasks at `address` in this version. True means
    /// that it is new; `None` that there are too many of them.
    pub fn plain_heartbeat(
        &mut self,
        address: SocketAddr,
        version: Version,
        now: Instant,
    ) -> Option<(WorkerId, bool)> {
        let carrier = Carrier::Plain { version };
        let plain = |worker: &&mut Worker| !worker.has_identity();
        let mut known = self.workers.values_mut().filter(plain);
        if let Some(worker) = known.find(|worker| worker.address == address) {
            worker.last_seen = now;
            worker.carrier = carrier;
            return Some((worker.id, false));
        }
        // Heartbeats carry no proof of who sent them, so their number must not decide how much memory they
        // take.
        if self.iter().filter(|worker| !worker.has_identity()).count() >= MOST_PLAIN {
            return None;
        }
        let name = address.to_string();
        let id = self.insert(name, carrier, address, String::new(), Vec::new(), now);
        Some((id, true))
    }

    /// True if no worker has an identity, so that only plain tasks can be served.
    pub fn takes_only_plain(&self) -> bool {
        !self.iter().any(Worker::has_identity)
    }

    /// Decides whether a worker without an identity gets requests.
    pub(crate) fn plain_service(
        &self,
        worker: &Worker,
        now: Instant,
        another: impl FnOnce() -> bool,
    ) -> Service {
        let paused = self.paused(&worker.key(), "", now, another);
        paused.unwrap_or(Service::Serves)
    }
}

impl Worker {
    /// Its kind: one of [`KINDS`].
    pub fn kind(&self) -> &'static str {
        match self.carrier {
            Carrier::Mesh { .. } => MESH,
            Carrier::Plain { version } => version.name(),
        }
    }

    /// Seconds until it has answered one more task, after those that it has.
    pub(crate) fn plain_seconds(&self) -> f64 {
        let one = match self.task_seconds > 0.0 {
            true => self.task_seconds,
            false => ASSUMED_TASK_SECONDS,
        };
        one * f64::from(self.assigned + 1)
    }

    /// It answered a request, which took this long.
    pub(crate) fn took(&mut self, time: Duration) {
        let took = time.as_secs_f64();
        let before = match self.task_seconds > 0.0 {
            true => self.task_seconds,
            false => took,
        };
        self.task_seconds = before + (took - before) * SMOOTHING;
    }
}

const MESH: &str = "mesh";

/// Workers without an identity that a registry holds.
pub(super) const MOST_PLAIN: usize = 1024;

const ASSUMED_TASK_SECONDS: f64 = 5.0;

/// Weight of the newest task in a worker's smoothed duration.
const SMOOTHING: f64 = 0.25;
