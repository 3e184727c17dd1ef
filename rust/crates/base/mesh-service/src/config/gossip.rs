//! Settings that head and worker have in common.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::units;

/// Signed gossip with the other nodes: who is alive, the condition of the machines, sightings of attacks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GossipConfig {
    /// Take part.
    pub enabled: bool,
    /// Interval between two frames while nothing happens.
    #[serde(with = "units::duration")]
    pub interval: Duration,
}

impl Default for GossipConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            interval: Duration::from_secs(1),
        }
    }
}
