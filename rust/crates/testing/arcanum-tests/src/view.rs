//! Rings as the head shows them in `/v1/mesh`.

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

/// A ring with its stages and state.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct RingView {
    /// Name of the model.
    pub model: String,
    /// Id of the ring, in hex.
    pub ring: String,
    /// Counts the changes of its members.
    pub epoch: u32,
    /// `forming`, `serving`, `recovering` or `retiring`.
    pub state: String,
    /// Reason for its choice of members.
    pub reason: String,
    /// In order; the last one's member is the driver.
    pub stages: Vec<StageView>,
}

/// A stage of a ring.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct StageView {
    /// First layer, one past the last.
    pub layers: [u32; 2],
    /// The member that runs the stage.
    pub member: PartView,
    /// The standby of the stage, if it has one.
    pub standby: Option<PartView>,
    /// KV rows that the standby does not have yet.
    pub lag_rows: u64,
}

/// A stage on a worker.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct PartView {
    /// Name of the worker.
    pub worker: String,
    /// `loading`, `ready` or `failed`.
    pub phase: String,
    /// Milliseconds of its last steps.
    pub step_ms: f64,
    /// Seconds that loading took.
    pub load_seconds: f64,
    /// Seconds that its steps of more than a few rows took since then.
    pub prefill_seconds: f64,
    /// Bytes of weights in memory.
    pub weight_bytes: u64,
    /// Bytes of KV rows.
    pub kv_bytes: u64,
    /// Bytes of outputs kept for a replay.
    pub kept_bytes: u64,
}

impl RingView {
    /// All rings of `/v1/mesh`.
    ///
    /// # Errors
    /// If it does not show them as documented.
    pub fn all(mesh: &Value) -> Result<Vec<Self>> {
        let rings = mesh.get("rings").context("no rings in /v1/mesh")?;
        Ok(Vec::deserialize(rings)?)
    }

    /// True if the ring serves and all its members are ready.
    pub fn serves(&self) -> bool {
        self.state == "serving" && self.stages.iter().all(|stage| stage.member.is_ready())
    }

    /// True if every stage has a standby that is ready.
    pub fn has_standbys(&self) -> bool {
        let ready = |stage: &StageView| stage.standby.as_ref().is_some_and(PartView::is_ready);
        self.stages.iter().all(ready)
    }

    /// True if all standbys have all KV rows, judged by the bytes that they hold.
    pub fn is_mirrored(&self) -> bool {
        let behind = |stage: &StageView| {
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
    pub fn parts(&self) -> impl Iterator<Item = (u32, &PartView)> {
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

impl PartView {
    /// True if the part has loaded and can work.
    pub fn is_ready(&self) -> bool {
        self.phase == "ready"
    }
}
