//! Measures the paths to the head and to other workers, for the head's plans.

use std::convert::Infallible;
use std::time::Duration;

use super::context::Rings;
use crate::peers::{self, bandwidth};
use mesh_net::quic::Link;

impl Rings {
    /// Measures the paths to the head and to other workers, each once, while no ring has anything to do, and
    /// reports changes to the head, for as long as it is polled.
    pub(crate) async fn keep_paths_known(&self, head: &Link) -> Infallible {
        tokio::time::sleep(FIRST_LOOK).await;
        let mut measured = false;
        loop {
            // Round trips before anything fills these paths.
            let rtt_us = peers::path("", head.rtt(), 0.0).rtt_us;
            let note = |bandwidth| {
                self.core()
                    .with(|core| core.offers.head_path(rtt_us, bandwidth));
            };
            note(None);
            if let Some(net) = self.net.get().filter(|_| self.is_offering()) {
                net.peers.note_round_trips();
                if !measured && self.is_idle() {
                    measured = true;
                    note(bandwidth(head).await);
                }
                net.peers.measure(|| self.is_idle()).await;
            }
            self.offer();
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// A mesh that starts all at once is loading until then, and its machines are too busy to measure anything.
/// Parts from an earlier run are planned in the same places again without figures that are new each time.
const FIRST_LOOK: Duration = Duration::from_secs(10);

const LOOK: Duration = Duration::from_secs(60);
