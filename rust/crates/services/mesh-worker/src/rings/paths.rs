//! Measures the paths to the head and to other workers, for the head's plans.

use std::convert::Infallible;
use std::time::Duration;

use mesh_net::quic::Link;
use mesh_proto::PathProfile;

use super::{Rings, lock};
use crate::peers::{self, bandwidth};

impl Rings {
    /// Measures the paths to the head and to other workers, each once, while no ring has anything to do, and
    /// reports changes to the head, for as long as it is polled.
    pub(crate) async fn keep_paths_known(&self, head: &Link) -> Infallible {
        tokio::time::sleep(FIRST_LOOK).await;
        let mut measured = false;
        loop {
            // Round trips before anything fills these paths.
            lock(&self.head_path).rtt_us = peers::path("", head.rtt(), 0.0).rtt_us;
            let net = lock(&self.net).clone().filter(|_| self.is_offering());
            if let Some(net) = net {
                net.peers.note_round_trips();
                if !measured && self.is_idle() {
                    measured = true;
                    if let Some(bandwidth) = bandwidth(head).await {
                        lock(&self.head_path).bandwidth = bandwidth;
                    }
                }
                net.peers.measure(|| self.is_idle()).await;
            }
            self.offer();
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Returns true if a plan might judge them differently: a new path, a round trip that is half as long again,
/// or another bandwidth.
pub(super) fn differ(before: &[PathProfile], now: &[PathProfile]) -> bool {
    now.iter().any(|path| {
        let known = before.iter().find(|known| known.node_id == path.node_id);
        known.is_none_or(|known| {
            let (least, most) = (known.rtt_us.min(path.rtt_us), known.rtt_us.max(path.rtt_us));
            most > least.max(LEAST_RTT) / 2 * 3 || known.bandwidth != path.bandwidth
        })
    })
}

/// Round trips below this, microseconds, are all the same to a plan.
const LEAST_RTT: u32 = 1_000;

/// A mesh that starts all at once is loading until then, and its machines are too busy to measure anything.
/// Parts from an earlier run are planned in the same places again without figures that are new each time.
const FIRST_LOOK: Duration = Duration::from_secs(10);

/// Interval between looks at the paths.
const LOOK: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_matters_is_told_again() {
        let path =
            |node: &str, ms, bandwidth| peers::path(node, Duration::from_millis(ms), bandwidth);
        let before = [path("", 2, 1e6), path("a", 0, 0.0)];
        assert!(!differ(&before, &before[..1]));
        for (now, news) in [
            (path("", 3, 1e6), false),
            (path("", 4, 1e6), true),
            (path("", 2, 2e6), true),
            (path("a", 1, 0.0), false),
            (path("a", 0, 1e6), true),
            (path("b", 0, 0.0), true),
        ] {
            assert_eq!(differ(&before, std::slice::from_ref(&now)), news, "{now:?}");
        }
    }
}
