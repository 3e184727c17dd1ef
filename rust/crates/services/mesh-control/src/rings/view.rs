//! Rings, as operators see them in `/v1/mesh`.

pub(super) use mesh_api::{LeftOut as LeftOutView, StageWorker as ReplicaView};
pub use mesh_api::{
    Path as PathView, Recovery as RecoveryView, Ring as RingView, RingStage as StageView, Unformed,
};
use mesh_proto::Recovery;

use super::ring::{Ring, hex};

/// A recovery that a driver reports, without its age.
pub(super) fn recovery(ring: &Ring, recovery: &Recovery) -> RecoveryView {
    RecoveryView {
        model: ring.model.clone(),
        ring: hex(ring.id),
        epoch: ring.epoch,
        reason: ring.reason_of_epoch.clone(),
        gap_ms: recovery.gap_us as f64 / 1e3,
        rows: recovery.rows,
        requests: recovery.requests,
        seconds_ago: None,
    }
}
