//! The state of a mesh: its workers, models and rings.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::rings::{Holding, Recovery, Ring, Unformed};

/// The state of a mesh, as its head sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Mesh {
    /// Name of the mesh.
    pub mesh: String,
    /// Version of the head.
    pub version: String,
    /// True if a model answers.
    pub ready: bool,
    /// Cause of not being ready.
    pub reason: Option<String>,
    /// Seconds since the head started.
    pub uptime_seconds: f64,
    /// True if the head is about to stop.
    pub draining: bool,
    /// Requests now and so far.
    pub requests: RequestCounts,
    /// Tokens so far.
    pub tokens: TokenCounts,
    /// The connected workers.
    pub workers: Vec<Worker>,
    /// Models that workers hold pieces of or seek.
    pub models: Vec<SharedModel>,
    /// The rings.
    pub rings: Vec<Ring>,
    /// The last changes of members of rings, oldest first.
    pub recoveries: Vec<Recovery>,
    /// Models that no ring could be planned for.
    pub unformed: Vec<Unformed>,
    /// Names of drained workers by their node ids, connected or not.
    pub drained: BTreeMap<String, String>,
    /// Nodes in quarantine.
    pub quarantined: Vec<Quarantine>,
    /// Identities that two machines have.
    pub duplicates: Vec<DuplicateIdentity>,
    /// Names that several models claim.
    pub name_conflicts: Vec<NameConflict>,
    /// Problems that an operator should look at, each as a sentence.
    pub warnings: Vec<String>,
    /// The nodes that gossip; absent where the head does not.
    pub gossip: Option<Gossip>,
}

/// The nodes that gossip, as the head sees them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Gossip {
    /// Peers that answer.
    pub alive: usize,
    /// Peers that did not answer a probe.
    pub suspect: usize,
    /// Peers that are taken for dead.
    pub down: usize,
    /// Sightings of attacks in the last day.
    pub threats: usize,
    /// The latest of them, at most 32.
    pub sightings: Vec<Sighting>,
    /// Records that every node keeps, sightings included.
    pub records: usize,
    /// Frames, documents and records that the head refused since its start.
    pub refused: u64,
    /// Condition of the machines.
    pub fleet: Fleet,
}

/// A node's report of an attack.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Sighting {
    /// Id of the node that reports it.
    pub reporter: String,
    /// Its name, if the head knows it.
    pub reporter_name: Option<String>,
    /// Kind, for example `expelled` or `audit-rewritten`.
    pub kind: String,
    /// The node or address that it is about.
    pub subject: String,
    /// Text for people.
    pub detail: String,
    /// Time of the sighting, in seconds since the Unix epoch.
    pub seen: u64,
}

/// Condition of the machines that gossip, the head's included.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Fleet {
    /// Nodes that report theirs.
    pub nodes: usize,
    /// Load average of one minute, in percent of a machine's processors.
    pub load_percent: Option<Spread>,
    /// Highest temperature of a machine, in degrees Celsius.
    pub temperature_celsius: Option<Spread>,
    /// Memory that programs can still get, in bytes.
    pub memory_available: u64,
    /// Memory, in bytes.
    pub memory_total: u64,
    /// Free space where nodes keep their state, in bytes.
    pub disk_available: u64,
    /// Size of these file systems, in bytes.
    pub disk_total: u64,
    /// Seconds since the machine that was started last was started.
    pub shortest_uptime_seconds: Option<u64>,
    /// Machines that run on their battery.
    pub on_battery: usize,
    /// Lowest charge among these, in percent.
    pub lowest_battery_percent: Option<u32>,
}

/// A value over several machines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Spread {
    /// Smallest value.
    pub least: f64,
    /// Arithmetic mean.
    pub mean: f64,
    /// Greatest value.
    pub most: f64,
}

/// Requests of the head.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct RequestCounts {
    /// Requests that wait for a worker.
    pub queued: usize,
    /// Most requests that may wait.
    pub queue_limit: usize,
    /// Requests that run on workers.
    pub running: usize,
    /// Attempts so far that another worker had to repeat.
    pub reruns: u64,
}

/// Tokens since the head started.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct TokenCounts {
    /// Tokens of answers.
    pub generated: u64,
    /// Tokens of prompts.
    pub prompt: u64,
    /// Tokens of prompts that were found in a KV cache.
    pub cached: u64,
}

/// A connected worker.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Worker {
    /// Number of the worker within this head.
    pub id: u64,
    /// Name of the worker.
    pub name: String,
    /// `mesh`, or the version of DCF that an old worker speaks.
    pub kind: Cow<'static, str>,
    /// `joining` until a token came back, `ready`, `held` while its answers differ from those of others,
    /// `quarantined` or `draining`.
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["joining", "ready", "held", "quarantined", "draining"])))]
    pub state: Cow<'static, str>,
    /// Its node id; old workers have none.
    pub node_id: Option<String>,
    /// `ip:port` of its link.
    pub address: String,
    /// Version of its program; empty for old workers.
    pub version: String,
    /// Models that it serves.
    pub models: Vec<ServedModel>,
    /// Purposes that its operator reserves it for; empty means any.
    pub reserved_for: Vec<String>,
    /// Requests that hold a slot, by its last report.
    pub running: u32,
    /// Requests that wait for a slot, by its last report.
    pub queued: u32,
    /// Requests of this head that run on it.
    pub assigned: u32,
    /// KV cache in use, in tokens.
    pub kv_tokens_used: u64,
    /// Size of the KV cache, in tokens.
    pub kv_tokens_total: u64,
    /// Resident memory of its process, in bytes.
    pub resident_bytes: u64,
    /// Answers that it completed.
    pub completed: u64,
    /// Attempts that failed on it.
    pub failed: u64,
    /// Seconds since it joined.
    pub connected_seconds: f64,
    /// Seconds since its last sign of life.
    pub last_seen_seconds: f64,
    /// Seconds since a token last came back.
    pub last_success_seconds: Option<f64>,
    /// Round trip of its link, in milliseconds.
    pub round_trip_ms: Option<f64>,
    /// Lead of its clock over the head's, in seconds.
    pub clock_offset_seconds: f64,
    /// Reason why it gets no requests, or why one of its models gets none.
    pub not_used: Option<String>,
    /// Its stages of rings, as a drain sees them.
    pub holds: Vec<Holding>,
    /// Paths that it measured.
    pub paths: Vec<Path>,
}

/// A model that a worker serves.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ServedModel {
    /// Name of the model.
    pub name: String,
    /// Architecture, such as `llama`.
    pub architecture: String,
    /// Format of the weights, such as `Q4_0`.
    pub quantization: String,
    /// Fingerprint of the file's contents.
    pub fingerprint: String,
    /// `chat`, `embed` or `image`.
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["chat", "embed", "image"])))]
    pub kind: Cow<'static, str>,
    /// Most tokens of a request.
    pub context: u32,
    /// Requests that it runs at once.
    pub slots: u32,
    /// Size of its files, in bytes.
    pub file_bytes: u64,
    /// First layer, one past the last.
    pub layers: [u32; 2],
    /// Id of the ring that the worker drives for it, hexadecimal.
    pub ring: Option<String>,
    /// Decode speed of a single stream; 0 is unknown. Of a model for images, squares of 64 by 64 pixels times steps.
    pub decode_tokens_per_second: f64,
    /// Prefill speed; 0 is unknown.
    pub prefill_tokens_per_second: f64,
    /// Reason why the worker gets no requests for it.
    pub not_used: Option<String>,
    /// Device that computes it: `cpu`, `cuda`, `migraphx` or `webgpu`; unknown of older workers and of rings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// Division of its layers between a GPU and the CPU; absent if none is on a GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<DeviceSplit>,
}

/// The layers of a model on a GPU and on the CPU beside it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct DeviceSplit {
    /// Layers on the GPU, the first ones.
    pub device_layers: u32,
    /// Layers among those whose experts the CPU computes.
    pub expert_layers: u32,
    /// Layers on the CPU.
    pub cpu_layers: u32,
    /// Bytes of weights and KV cache on the GPU when the model was loaded.
    pub device_bytes: u64,
    /// Bytes of weights on the CPU.
    pub cpu_bytes: u64,
}

/// A path that a worker measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Path {
    /// Name of the worker at its other end; absent if that is the head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// Round trip, in milliseconds.
    pub round_trip_ms: f64,
    /// Bytes per second that its other end receives; unknown until the path was idle once.
    pub bytes_per_second: Option<f64>,
}

/// A model that workers hold or seek.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct SharedModel {
    /// Name of the model.
    pub name: String,
    /// SHA-256 of its manifest; absent while no worker has one.
    pub fingerprint: Option<String>,
    /// Bytes of its files; 0 while they are unknown.
    pub bytes: u64,
    /// True if its manifest is signed.
    pub signed: bool,
    /// Workers that hold pieces of it.
    pub holders: Vec<ModelHolder>,
    /// Workers that seek pieces of it.
    pub seekers: Vec<ModelSeeker>,
    /// The worker that downloads it from outside the mesh.
    pub origin: Option<String>,
}

/// A worker with pieces of a model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ModelHolder {
    /// Name of the worker.
    pub worker: String,
    /// Pieces that it has.
    pub pieces: u32,
    /// Pieces of the model.
    pub of: u32,
    /// Workers that say it sent them bad pieces.
    pub accused_by: Vec<String>,
}

/// A worker that seeks pieces of a model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ModelSeeker {
    /// Name of the worker.
    pub worker: String,
    /// Bytes that it has of those that it needs.
    pub bytes: u64,
    /// Bytes that it needs; 0 while they are unknown.
    pub bytes_total: u64,
    /// Error of its attempt to fetch the model from outside the mesh, if it tried.
    pub error: Option<String>,
}

/// A node in quarantine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Quarantine {
    /// Id of the node.
    pub node_id: String,
    /// Name of the node when its quarantine began.
    pub name: String,
    /// Evidence against the node.
    pub reason: String,
    /// Seconds until it is asked again.
    pub seconds_left: f64,
    /// Number of quarantines so far.
    pub times: u32,
}

/// An identity that two machines have.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct DuplicateIdentity {
    /// Name of the worker.
    pub worker: String,
    /// The machine that is connected.
    pub kept: Machine,
    /// The one that was refused last.
    pub refused: Machine,
    /// Number of refusals.
    pub times: u64,
}

/// A machine.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Machine {
    /// Its `ip:port`.
    pub address: String,
    /// Its host name; empty if it did not say.
    pub host: String,
}

/// A name that several models claim.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct NameConflict {
    /// The disputed name.
    pub name: String,
    /// Fingerprints, and the names of the workers that claim the name for them. A pinned one that no worker has
    /// is among them.
    pub claims: BTreeMap<String, Vec<String>>,
    /// Fingerprint that the name is pinned to.
    pub pinned: Option<String>,
    /// True if an operator set the pin. If not, no worker takes either model on this head's word.
    pub decided: bool,
    /// Workers that refuse the pinned model, as the hub has another model under the name.
    pub refused_by: Vec<String>,
    /// The models are served: their fingerprints are those of files, which no pin can name.
    pub served: bool,
}
