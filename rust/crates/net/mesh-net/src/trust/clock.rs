//! The mesh's time: the head's clock, which issues certificates and is the only one that judges their dates.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mesh_base::sync::lock;

/// A node's estimate of the head's clock, from the timestamps of the head's messages and this machine's
/// monotonic clock since then. Before the first message, and at the head, it is the system's clock. Clones
/// share their state.
#[derive(Clone, Debug, Default)]
pub struct MeshClock(Arc<Mutex<Option<(SystemTime, Instant)>>>);

impl MeshClock {
    /// The mesh's time now.
    pub fn now(&self) -> SystemTime {
        match *lock(&self.0) {
            Some((time, since)) => time + since.elapsed(),
            None => SystemTime::now(),
        }
    }

    /// Records the timestamp of an authenticated message of the head, in microseconds since the Unix epoch.
    pub fn heard(&self, timestamp_us: u64) {
        let time = UNIX_EPOCH + Duration::from_micros(timestamp_us);
        *lock(&self.0) = Some((time, Instant::now()));
    }

    /// Takes over what another one knows.
    pub(crate) fn adopt(&self, other: &Self) {
        let known = *lock(&other.0);
        *lock(&self.0) = known;
    }

    /// The lead of this machine's own clock over the mesh's, in seconds; 0 while that is unknown.
    pub fn offset(&self) -> f64 {
        let (own, mesh) = (SystemTime::now(), self.now());
        match own.duration_since(mesh) {
            Ok(ahead) => ahead.as_secs_f64(),
            Err(behind) => -behind.duration().as_secs_f64(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_heads_word_counts_whatever_this_machine_thinks() {
        let clock = MeshClock::default();
        assert!(clock.offset().abs() < 5.0);
        let year_2100 = 4_102_444_800_000_000;
        clock.heard(year_2100);
        let since = clock
            .now()
            .duration_since(UNIX_EPOCH + Duration::from_micros(year_2100));
        assert!(since.expect("later") < Duration::from_secs(60));
        assert!(clock.offset() < -365.0 * 86_400.0, "this machine is behind");
        clock.clone().heard(0);
        assert!(clock.offset() > 365.0 * 86_400.0, "clones share it");
    }
}
