//! Rings as the head shows them in `/v1/mesh`.

use std::ops::Deref;

use mesh_api::{Mesh, Ring, RingStage, StageWorker};

/// A ring with its stages and state.
#[derive(Debug, Clone, PartialEq)]
pub struct RingView(Ring);

impl Deref for RingView {
    type Target = Ring;

    fn deref(&self) -> &Ring {
        &self.0
    }
}

impl RingView {
    /// All rings of `/v1/mesh`.
    pub fn all(mesh: Mesh) -> Vec<Self> {
        mesh.rings.into_iter().map(Self).collect()
    }

    /// True if the ring serves and all its members are ready.
    pub fn serves(&self) -> bool {
        self.state == "serving" && self.stages.iter().all(|stage| is_ready(&stage.member))
    }

    /// True if every stage has a standby that is ready.
    pub fn has_standbys(&self) -> bool {
        let ready = |stage: &RingStage| stage.standby.as_ref().is_some_and(is_ready);
        self.stages.iter().all(ready)
    }

    /// True if all standbys have all KV rows, judged by the bytes that they hold.
    pub fn is_mirrored(&self) -> bool {
        let behind = |stage: &RingStage| {
            let standby = stage.standby.as_ref();
            standby.is_none_or(|standby| standby.kv_bytes < stage.member.kv_bytes)
        };
        self.has_standbys() && !self.stages.iter().any(behind)
    }

    /// Names of the workers that run its stages, in order.
    pub fn members(&self) -> Vec<&str> {
        let stages = self.stages.iter();
        stages.map(|stage| stage.member.worker.as_str()).collect()
    }

    /// Number of different workers that run its stages.
    pub fn distinct_members(&self) -> usize {
        let mut members = self.members();
        members.sort_unstable();
        members.dedup();
        members.len()
    }

    /// Name of the worker that drives it.
    pub fn driver(&self) -> &str {
        self.members().last().copied().unwrap_or_default()
    }

    /// Name of the standby of a stage.
    pub fn standby(&self, stage: usize) -> Option<&str> {
        let standby = self.stages.get(stage)?.standby.as_ref()?;
        Some(&standby.worker)
    }

    /// True if the worker is a member or standby of the ring.
    pub fn includes(&self, worker: &str) -> bool {
        self.parts().any(|(_, part)| part.worker == worker)
    }

    /// All parts, each with how many layers it has.
    pub fn parts(&self) -> impl Iterator<Item = (u32, &StageWorker)> {
        self.stages.iter().flat_map(|stage| {
            let layers = stage.layers[1] - stage.layers[0];
            let parts = [Some(&stage.member), stage.standby.as_ref()];
            parts.into_iter().flatten().map(move |part| (layers, part))
        })
    }

    /// Most bytes of KV rows per layer that one part holds. Parts of one ring that is idle and mirrored all hold the same
    /// rows.
    pub fn kv_bytes_per_layer(&self) -> u64 {
        let per_layer = self
            .parts()
            .map(|(layers, part)| part.kv_bytes / u64::from(layers.max(1)));
        per_layer.max().unwrap_or_default()
    }

    /// The stages as one line for a test's output: `worker-1 0..10 (worker-2), ...`.
    pub fn layout(&self) -> String {
        let stages = self.stages.iter().map(|stage| {
            let standby = stage.standby.as_ref().map(|part| part.worker.as_str());
            let [start, end] = stage.layers;
            let member = &stage.member.worker;
            format!("{member} {start}..{end} ({})", standby.unwrap_or("-"))
        });
        stages.collect::<Vec<_>>().join(", ")
    }
}

/// True if the part has loaded and can work.
fn is_ready(part: &StageWorker) -> bool {
    part.phase == "ready"
}
