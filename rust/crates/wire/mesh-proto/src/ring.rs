//! Messages of rings: between head and workers, and between the members of a ring. See
//! docs/reference/protocol.md, "Rings"; field numbers are never reused.
//!
//! A *ring* is one deployment of one model: stages `0..n`, each a contiguous range of layers on one worker, perhaps with a
//! standby that holds the same layers. The worker of the last stage is the ring's *driver*: it schedules the steps, samples,
//! and answers the head as a worker with the whole model would. Every change of a ring's members is a new *epoch*.

use bytes::Bytes;
use prost::Message;

use crate::ModelCard;

/// A worker's profile and the layers that it can hold (DCF 0x40); worker to head, after the Welcome and
/// whenever it changes.
#[derive(Clone, PartialEq, Message)]
pub struct Offer {
    /// UDP port of the ring listener, for other workers.
    #[prost(uint32, tag = "1")]
    pub ring_port: u32,
    /// Hardware and measured speeds of the machine.
    #[prost(message, optional, tag = "2")]
    pub profile: Option<NodeProfile>,
    /// Models of which the worker may hold a range of layers.
    #[prost(message, repeated, tag = "3")]
    pub models: Vec<LayerOffer>,
}

/// Hardware of a machine and its measured speeds.
#[derive(Clone, PartialEq, Message)]
pub struct NodeProfile {
    /// Number of compute threads.
    #[prost(uint32, tag = "1")]
    pub threads: u32,
    /// Widest instruction set that its kernels use (`avx512vnni`, `avx2`, `neon`, `scalar`, ...).
    #[prost(string, tag = "2")]
    pub isa: String,
    /// Total memory in bytes.
    #[prost(uint64, tag = "3")]
    pub memory_total: u64,
    /// Memory that may be used for weights and KV cache, bytes.
    #[prost(uint64, tag = "4")]
    pub memory_available: u64,
    /// Read bandwidth of the memory, bytes per second; 0 is unknown, as everywhere here.
    #[prost(double, tag = "5")]
    pub memory_bandwidth: f64,
    /// Read speed of the disk with the models, bytes per second.
    #[prost(double, tag = "6")]
    pub disk_read: f64,
    /// GPUs of the machine.
    #[prost(message, repeated, tag = "7")]
    pub gpus: Vec<GpuProfile>,
    /// Paths to other nodes.
    #[prost(message, repeated, tag = "8")]
    pub paths: Vec<PathProfile>,
    /// Processes ready to run per core, beside this one's own, when it was measured.
    #[prost(float, tag = "9")]
    pub load: f32,
    /// Purposes that the operator reserved this node for (`embeddings`, ...); empty allows all.
    #[prost(string, repeated, tag = "10")]
    pub reserved_for: Vec<String>,
}

/// A GPU and its memory.
#[derive(Clone, PartialEq, Message)]
pub struct GpuProfile {
    /// Name that the driver reports.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Vendor: `nvidia` or `amd`.
    #[prost(string, tag = "2")]
    pub vendor: String,
    /// Total GPU memory in bytes.
    #[prost(uint64, tag = "3")]
    pub vram_total: u64,
    /// Free GPU memory in bytes.
    #[prost(uint64, tag = "4")]
    pub vram_free: u64,
}

/// A measured path to another node.
#[derive(Clone, PartialEq, Message)]
pub struct PathProfile {
    /// Node id of the other end; empty for the head.
    #[prost(string, tag = "1")]
    pub node_id: String,
    /// Round-trip time in microseconds.
    #[prost(uint32, tag = "2")]
    pub rtt_us: u32,
    /// Bandwidth in bytes per second; 0 is unknown.
    #[prost(double, tag = "3")]
    pub bandwidth: f64,
}

/// A model of which a worker may hold any contiguous range of layers.
#[derive(Clone, PartialEq, Message)]
pub struct LayerOffer {
    /// The model: name, architecture, fingerprint, context, size; slots and speeds are those of the ring, not in here.
    #[prost(message, optional, tag = "1")]
    pub card: Option<ModelCard>,
    /// Number of layers in the model.
    #[prost(uint32, tag = "2")]
    pub layers: u32,
    /// Length of a hidden row.
    #[prost(uint32, tag = "3")]
    pub hidden: u32,
    /// Mean bytes of one layer in memory.
    #[prost(uint64, tag = "4")]
    pub layer_bytes: u64,
    /// Additional bytes for the first stage (embedding).
    #[prost(uint64, tag = "5")]
    pub first_bytes: u64,
    /// Additional bytes for the last stage (output matrix).
    #[prost(uint64, tag = "6")]
    pub last_bytes: u64,
    /// Bytes of KV cache per token and layer.
    #[prost(uint64, tag = "7")]
    pub kv_bytes: u64,
    /// Weight format that the worker would use: `file` (as stored), `int8` or `int4`.
    #[prost(string, tag = "8")]
    pub format: String,
    /// Microseconds that one layer takes for one decode row.
    #[prost(float, tag = "9")]
    pub decode_us: f32,
    /// Microseconds that one layer takes per row of a prefill chunk.
    #[prost(float, tag = "10")]
    pub prefill_us: f32,
    /// Additional microseconds of the last stage for one row of logits.
    #[prost(float, tag = "11")]
    pub logits_us: f32,
}

/// The members of a ring (DCF 0x41); head to every member, on the control stream. A higher epoch replaces a lower one.
#[derive(Clone, PartialEq, Message)]
pub struct Ring {
    /// Identifier of the ring.
    #[prost(fixed64, tag = "1")]
    pub ring: u64,
    /// Number of the membership, from 1; raised with each change of members.
    #[prost(uint32, tag = "2")]
    pub epoch: u32,
    /// Name of the model.
    #[prost(string, tag = "3")]
    pub model: String,
    /// SHA-256 of the model file, lower-case hex.
    #[prost(string, tag = "4")]
    pub fingerprint: String,
    /// In order; the last one's worker is the driver. Empty means that the ring is dissolved and everything of it is to be
    /// unloaded.
    #[prost(message, repeated, tag = "5")]
    pub stages: Vec<RingStage>,
    /// Number of requests that the ring runs at once.
    #[prost(uint32, tag = "6")]
    pub slots: u32,
    /// Maximum tokens of prompt and answer together.
    #[prost(uint32, tag = "7")]
    pub context: u32,
    /// KV memory of the ring in tokens, that of its smallest stage.
    #[prost(uint64, tag = "8")]
    pub kv_tokens: u64,
    /// Hidden rows travel as f16 rather than f32.
    #[prost(bool, tag = "9")]
    pub half_rows: bool,
    /// Reason for this epoch, for the log: "worker attic is lost", ...
    #[prost(string, tag = "10")]
    pub reason: String,
}

/// A stage of a ring.
#[derive(Clone, PartialEq, Message)]
pub struct RingStage {
    /// First layer of the stage.
    #[prost(uint32, tag = "1")]
    pub layer_start: u32,
    /// One past the last layer.
    #[prost(uint32, tag = "2")]
    pub layer_end: u32,
    /// The member that computes this stage.
    #[prost(message, optional, tag = "3")]
    pub member: Option<NodeAddr>,
    /// The standby of this stage, with the same layers and a copy of its KV rows, if there is one.
    #[prost(message, optional, tag = "4")]
    pub standby: Option<NodeAddr>,
    /// Weight format of all holders: `file`, `int8` or `int4`, as the first member offered. A different
    /// format would give different tokens after a failover. If empty, each holder chooses its own.
    #[prost(string, tag = "5")]
    pub format: String,
}

/// Node id, name and addresses of a worker.
#[derive(Clone, PartialEq, Message)]
pub struct NodeAddr {
    /// Node id: SHA-256 of its public key, lower-case hex.
    #[prost(string, tag = "1")]
    pub node_id: String,
    /// Name of the worker, for people.
    #[prost(string, tag = "2")]
    pub name: String,
    /// `ip:port` of the worker's ring listener.
    #[prost(string, tag = "3")]
    pub address: String,
    /// Further `ip:port` addresses of the listener, to try if the first does not work.
    #[prost(string, repeated, tag = "4")]
    pub addresses: Vec<String>,
}

/// State of a worker's parts in a ring (DCF 0x42); worker to head, on changes, at most four times a second.
#[derive(Clone, PartialEq, Message)]
pub struct RingState {
    /// Identifier of the ring, as in [`Ring::ring`].
    #[prost(fixed64, tag = "1")]
    pub ring: u64,
    /// Epoch of the ring at this worker.
    #[prost(uint32, tag = "2")]
    pub epoch: u32,
    /// One entry for each stage that the worker holds, as member or as standby.
    #[prost(message, repeated, tag = "3")]
    pub parts: Vec<PartState>,
    /// Driver: a token came back through every stage of this epoch; requests may be sent.
    #[prost(bool, tag = "4")]
    pub serving: bool,
    /// Driver: the card to serve under, speeds measured.
    #[prost(message, optional, tag = "5")]
    pub card: Option<ModelCard>,
    /// Node ids of members that, from this worker, do not answer or have a closed link.
    #[prost(string, repeated, tag = "6")]
    pub suspects: Vec<String>,
    /// Driver: report on the last change of epoch; sent once.
    #[prost(message, optional, tag = "7")]
    pub recovery: Option<Recovery>,
    /// Those of `suspects` to which this worker's link is closed, or whose links let nothing pass: waiting does not help. An
    /// older worker does not tell them apart.
    #[prost(string, repeated, tag = "8")]
    pub severed: Vec<String>,
}

/// One stage that a worker holds.
#[derive(Clone, PartialEq, Message)]
pub struct PartState {
    /// Index of the stage.
    #[prost(uint32, tag = "1")]
    pub stage: u32,
    /// True for the standby, false for the member.
    #[prost(bool, tag = "2")]
    pub standby: bool,
    /// State of this part.
    #[prost(enumeration = "PartPhase", tag = "3")]
    pub phase: i32,
    /// Cause of the failure, if `phase` is `Failed`.
    #[prost(string, tag = "4")]
    pub error: String,
    /// Member: KV rows that its standby does not have yet, over all slots.
    #[prost(uint64, tag = "5")]
    pub lag_rows: u64,
    /// Member: smoothed duration of its steps in microseconds.
    #[prost(float, tag = "6")]
    pub step_us: f32,
    /// Duration of loading in seconds.
    #[prost(float, tag = "7")]
    pub load_seconds: f32,
    /// Memory of the weights in bytes.
    #[prost(uint64, tag = "8")]
    pub weight_bytes: u64,
    /// Memory of the KV rows in bytes.
    #[prost(uint64, tag = "9")]
    pub kv_bytes: u64,
    /// Microseconds that its steps of more than a few rows took, all of them together: prompts, and what had to be replayed.
    #[prost(uint64, tag = "10")]
    pub prefill_us: u64,
    /// Bytes of outputs kept in case the next stage needs them again.
    #[prost(uint64, tag = "11")]
    pub kept_bytes: u64,
    /// Progress of loading, in a unit of the worker's own that only grows; 0 if unknown.
    #[prost(uint64, tag = "12")]
    pub progress: u64,
}

/// State of a part of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum PartPhase {
    /// Unset.
    Unspecified = 0,
    /// Its weights are being loaded.
    Loading = 1,
    /// The part can compute steps.
    Ready = 2,
    /// The part failed; `error` has the cause.
    Failed = 3,
}

/// A driver's report on recovery after a change of epoch.
#[derive(Clone, PartialEq, Message)]
pub struct Recovery {
    /// Microseconds from the last token before the change to the first one after it.
    #[prost(uint64, tag = "1")]
    pub gap_us: u64,
    /// Rows that were computed again or replayed.
    #[prost(uint64, tag = "2")]
    pub rows: u64,
    /// Number of requests that were running.
    #[prost(uint32, tag = "3")]
    pub requests: u32,
}

/// First message of a stream between members (DCF 0x43), from the dialling side.
#[derive(Clone, PartialEq, Message)]
pub struct RingHello {
    /// Identifier of the ring.
    #[prost(fixed64, tag = "1")]
    pub ring: u64,
    /// Epoch at the dialling side.
    #[prost(uint32, tag = "2")]
    pub epoch: u32,
    /// Index of the stage that the dialling side connects to.
    #[prost(uint32, tag = "3")]
    pub stage: u32,
    /// Purpose of the stream.
    #[prost(enumeration = "RingPurpose", tag = "4")]
    pub purpose: i32,
}

/// Purpose of a stream between members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum RingPurpose {
    /// Unset.
    Unspecified = 0,
    /// The driver drives a member: Steps with tokens to stage 0, Pings and Resends to all; Held, Pongs and failures back.
    Drive = 1,
    /// Rows flow from one stage to the next; Mirrored flows back.
    Rows = 2,
    /// KV rows flow to a standby; Mirrored flows back.
    Mirror = 3,
}

/// A step on its way around the ring (DCF 0x44).
#[derive(Clone, PartialEq, Message)]
pub struct RingStep {
    /// Epoch in which it was planned; members drop those of another epoch.
    #[prost(uint32, tag = "1")]
    pub epoch: u32,
    /// Number of the step within its epoch, from 0.
    #[prost(uint64, tag = "2")]
    pub step: u64,
    /// Changes to slots, before the segments.
    #[prost(message, repeated, tag = "3")]
    pub slot_ops: Vec<RingSlotOp>,
    /// Runs of rows that this step computes.
    #[prost(message, repeated, tag = "4")]
    pub segments: Vec<RingSegment>,
    /// Token ids of all rows, back to back: the input of stage 0, and for the other stages the tokens of the
    /// rows they hold.
    #[prost(uint32, repeated, tag = "5")]
    pub tokens: Vec<u32>,
    /// Hidden rows, row-major, little-endian f32 or f16; empty toward stage 0.
    #[prost(bytes = "bytes", tag = "6")]
    pub rows: Bytes,
    /// Number of the last stage that takes the rows in, plus one. The driver thus learns when they are in
    /// that stage's KV cache. 0 for a step through all stages.
    #[prost(uint32, tag = "8")]
    pub through: u32,
}

/// A change to a KV slot.
#[derive(Clone, PartialEq, Message)]
pub struct RingSlotOp {
    /// Index of the slot that changes.
    #[prost(uint32, tag = "1")]
    pub slot: u32,
    /// Number of rows in the slot after the change.
    #[prost(uint32, tag = "2")]
    pub len: u32,
    /// Number of the source slot plus one, to copy from it; 0 truncates the slot instead.
    #[prost(uint32, tag = "3")]
    pub from_plus_one: u32,
}

/// Consecutive rows of one slot.
#[derive(Clone, PartialEq, Message)]
pub struct RingSegment {
    /// Index of the slot.
    #[prost(uint32, tag = "1")]
    pub slot: u32,
    /// Position of the first row.
    #[prost(uint32, tag = "2")]
    pub position: u32,
    /// Number of rows.
    #[prost(uint32, tag = "3")]
    pub rows: u32,
}

/// Contents of a KV cache (DCF 0x45): the answer to a RingHello, member to driver on a Drive stream, standby
/// to member on a Mirror stream.
#[derive(Clone, PartialEq, Message)]
pub struct RingHeld {
    /// Epoch that this report is for.
    #[prost(uint32, tag = "1")]
    pub epoch: u32,
    /// Slots that are not empty.
    #[prost(message, repeated, tag = "2")]
    pub slots: Vec<HeldSlot>,
}

/// Contents of one slot.
#[derive(Clone, PartialEq, Message)]
pub struct HeldSlot {
    /// Index of the slot.
    #[prost(uint32, tag = "1")]
    pub slot: u32,
    /// Tokens whose KV rows the slot holds.
    #[prost(uint32, repeated, tag = "2")]
    pub tokens: Vec<u32>,
    /// Position of the first row whose output is still kept for the next stage; `tokens.len()` if no output
    /// is kept.
    #[prost(uint32, tag = "3")]
    pub kept_from: u32,
    /// Number of steps since the slot last changed.
    #[prost(uint64, tag = "4")]
    pub age: u64,
}

/// KV rows for a standby (DCF 0x46). Changes to slots travel the same way, in order.
#[derive(Clone, PartialEq, Message)]
pub struct RingMirror {
    /// Number of the message in its stream, from 1; echoed in Mirrored.
    #[prost(uint64, tag = "1")]
    pub count: u64,
    /// A change to a slot; nothing else is set then.
    #[prost(message, optional, tag = "2")]
    pub slot_op: Option<RingSlotOp>,
    /// Index of the slot.
    #[prost(uint32, tag = "3")]
    pub slot: u32,
    /// Position of the first row; the slot is cut off there first.
    #[prost(uint32, tag = "4")]
    pub position: u32,
    /// Tokens of the rows.
    #[prost(uint32, repeated, tag = "5")]
    pub tokens: Vec<u32>,
    /// The rows, in the engine's own layout.
    #[prost(bytes = "bytes", tag = "6")]
    pub rows: Bytes,
}

/// Replication progress of a standby (DCF 0x47): standby to member on a Mirror stream, and from there to the
/// stage before it on the Rows stream, which may then discard the outputs it kept.
#[derive(Clone, PartialEq, Message)]
pub struct RingMirrored {
    /// On a Mirror stream: messages taken in. On a Rows stream: one more than the number of the last step computed.
    #[prost(uint64, tag = "1")]
    pub count: u64,
    /// On a Rows stream: the slot whose first `len` rows are safe.
    #[prost(uint32, tag = "2")]
    pub slot: u32,
    /// On a Rows stream: number of rows that are safe.
    #[prost(uint32, tag = "3")]
    pub len: u32,
}

/// Liveness check (DCF 0x48). Driver to member; the member's own network task answers, however long a step
/// takes.
#[derive(Clone, PartialEq, Message)]
pub struct RingPing {
    /// Number that the answer repeats.
    #[prost(uint64, tag = "1")]
    pub nonce: u64,
    /// In the answer: number of steps of this epoch that arrived.
    #[prost(uint64, tag = "2")]
    pub received: u64,
    /// In the answer: number of steps of this epoch that were passed on.
    #[prost(uint64, tag = "3")]
    pub sent: u64,
}

/// Order to send kept outputs to the next stage again (DCF 0x49); driver to a member.
#[derive(Clone, PartialEq, Message)]
pub struct RingResend {
    /// Epoch of the ring.
    #[prost(uint32, tag = "1")]
    pub epoch: u32,
    /// Number of the first step that carries the rows.
    #[prost(uint64, tag = "2")]
    pub step: u64,
    /// Index of the slot.
    #[prost(uint32, tag = "3")]
    pub slot: u32,
    /// Position of the first row.
    #[prost(uint32, tag = "4")]
    pub from: u32,
    /// One past the last row.
    #[prost(uint32, tag = "5")]
    pub to: u32,
    /// Maximum rows of one step.
    #[prost(uint32, tag = "6")]
    pub chunk: u32,
    /// Stages that take the rows in, as in [`RingStep::through`].
    #[prost(uint32, tag = "8")]
    pub through: u32,
}

/// Arrival rate of the Probes of a stream (DCF 0x4C), as their answer.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Probed {
    /// Payload bytes of the later half of the Probes. The first half determines how much may be sent at once.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
    /// Microseconds in which those bytes arrived.
    #[prost(uint64, tag = "2")]
    pub microseconds: u64,
}

/// Outcome of a step at a member (DCF 0x4A); member to driver, for failures and for rows that went no
/// further.
#[derive(Clone, PartialEq, Message)]
pub struct RingOutcome {
    /// Epoch of the step.
    #[prost(uint32, tag = "1")]
    pub epoch: u32,
    /// Number of the step within its epoch.
    #[prost(uint64, tag = "2")]
    pub step: u64,
    /// Cause of the failure; empty on success.
    #[prost(string, tag = "3")]
    pub error: String,
}
