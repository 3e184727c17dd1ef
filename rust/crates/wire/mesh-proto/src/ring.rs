//! Messages of rings: between head and workers, and between the members of a ring. See
//! docs/reference/protocol.md, "Rings"; field numbers are never reused.
//!
//! A *ring* is one deployment of one model: stages `0..n`, each a contiguous range of layers on one worker, perhaps with a
//! standby that holds the same layers. The worker of the last stage is the ring's *driver*: it schedules the steps, samples,
//! and answers the head as a worker with the whole model would. Every change of a ring's members is a new *epoch*.

use bytes::Bytes;
use prost::Message;

use crate::ModelCard;

messages! {
    /// A worker's profile and the layers that it can hold (DCF 0x40); worker to head, after the Welcome and
    /// whenever it changes.
    pub struct Offer {
        /// UDP port of the ring listener, for other workers.
        ring_port: u32 = [uint32, tag = 1],
        /// Hardware and measured speeds of the machine.
        profile: Option<NodeProfile> = [message, optional, tag = 2],
        /// Models of which the worker may hold a range of layers.
        models: Vec<LayerOffer> = [message, repeated, tag = 3],
    }

    /// Hardware of a machine and its measured speeds.
    pub struct NodeProfile {
        /// Number of compute threads.
        threads: u32 = [uint32, tag = 1],
        /// Widest instruction set that its kernels use (`avx512vnni`, `avx2`, `neon`, `scalar`, ...).
        isa: String = [string, tag = 2],
        /// Total memory in bytes.
        memory_total: u64 = [uint64, tag = 3],
        /// Memory that may be used for weights and KV cache, bytes.
        memory_available: u64 = [uint64, tag = 4],
        /// Read bandwidth of the memory, bytes per second; 0 is unknown, as everywhere here.
        memory_bandwidth: f64 = [double, tag = 5],
        /// Read speed of the disk with the models, bytes per second.
        disk_read: f64 = [double, tag = 6],
        /// GPUs of the machine.
        gpus: Vec<GpuProfile> = [message, repeated, tag = 7],
        /// Paths to other nodes.
        paths: Vec<PathProfile> = [message, repeated, tag = 8],
        /// Processes ready to run per core, beside this one's own, when it was measured.
        load: f32 = [float, tag = 9],
        /// Purposes that the operator reserved this node for (`embeddings`, ...); empty allows all.
        reserved_for: Vec<String> = [string, repeated, tag = 10],
    }

    /// A GPU and its memory.
    pub struct GpuProfile {
        /// Name that the driver reports.
        name: String = [string, tag = 1],
        /// Vendor: `nvidia` or `amd`.
        vendor: String = [string, tag = 2],
        /// Total GPU memory in bytes.
        vram_total: u64 = [uint64, tag = 3],
        /// Free GPU memory in bytes.
        vram_free: u64 = [uint64, tag = 4],
    }

    /// A measured path to another node.
    pub struct PathProfile {
        /// Node id of the other end; empty for the head.
        node_id: String = [string, tag = 1],
        /// Round-trip time in microseconds.
        rtt_us: u32 = [uint32, tag = 2],
        /// Bandwidth in bytes per second; 0 is unknown.
        bandwidth: f64 = [double, tag = 3],
    }

    /// A model of which a worker may hold any contiguous range of layers.
    pub struct LayerOffer {
        /// The model: name, architecture, fingerprint, context, size; slots and speeds are those of the ring, not in here.
        card: Option<ModelCard> = [message, optional, tag = 1],
        /// Number of layers in the model.
        layers: u32 = [uint32, tag = 2],
        /// Length of a hidden row.
        hidden: u32 = [uint32, tag = 3],
        /// Mean bytes of one layer in memory.
        layer_bytes: u64 = [uint64, tag = 4],
        /// Additional bytes for the first stage (embedding).
        first_bytes: u64 = [uint64, tag = 5],
        /// Additional bytes for the last stage (output matrix).
        last_bytes: u64 = [uint64, tag = 6],
        /// Bytes of KV cache per token and layer.
        kv_bytes: u64 = [uint64, tag = 7],
        /// Weight format that the worker would use: `file` (as stored), `int8` or `int4`.
        format: String = [string, tag = 8],
        /// Microseconds that one layer takes for one decode row.
        decode_us: f32 = [float, tag = 9],
        /// Microseconds that one layer takes per row of a prefill chunk.
        prefill_us: f32 = [float, tag = 10],
        /// Additional microseconds of the last stage for one row of logits.
        logits_us: f32 = [float, tag = 11],
    }

    /// The members of a ring (DCF 0x41); head to every member, on the control stream. A higher epoch replaces a lower one.
    pub struct Ring {
        /// Identifier of the ring.
        ring: u64 = [fixed64, tag = 1],
        /// Number of the membership, from 1; raised with each change of members.
        epoch: u32 = [uint32, tag = 2],
        /// Name of the model.
        model: String = [string, tag = 3],
        /// SHA-256 of the model file, lower-case hex.
        fingerprint: String = [string, tag = 4],
        /// In order; the last one's worker is the driver. Empty means that the ring is dissolved and everything of it is to be
        /// unloaded.
        stages: Vec<RingStage> = [message, repeated, tag = 5],
        /// Number of requests that the ring runs at once.
        slots: u32 = [uint32, tag = 6],
        /// Maximum tokens of prompt and answer together.
        context: u32 = [uint32, tag = 7],
        /// KV memory of the ring in tokens, that of its smallest stage.
        kv_tokens: u64 = [uint64, tag = 8],
        /// Hidden rows travel as f16 rather than f32.
        half_rows: bool = [bool, tag = 9],
        /// Reason for this epoch, for the log: "worker attic is lost", ...
        reason: String = [string, tag = 10],
    }

    /// A stage of a ring.
    pub struct RingStage {
        /// First layer of the stage.
        layer_start: u32 = [uint32, tag = 1],
        /// One past the last layer.
        layer_end: u32 = [uint32, tag = 2],
        /// The member that computes this stage.
        member: Option<NodeAddr> = [message, optional, tag = 3],
        /// The standby of this stage, with the same layers and a copy of its KV rows, if there is one.
        standby: Option<NodeAddr> = [message, optional, tag = 4],
        /// Weight format of all holders: `file`, `int8` or `int4`, as the first member offered. A different
        /// format would give different tokens after a failover. If empty, each holder chooses its own.
        format: String = [string, tag = 5],
    }

    /// Node id, name and addresses of a worker.
    pub struct NodeAddr {
        /// Node id: SHA-256 of its public key, lower-case hex.
        node_id: String = [string, tag = 1],
        /// Name of the worker, for people.
        name: String = [string, tag = 2],
        /// `ip:port` of the worker's ring listener.
        address: String = [string, tag = 3],
        /// Further `ip:port` addresses of the listener, to try if the first does not work.
        addresses: Vec<String> = [string, repeated, tag = 4],
    }

    /// State of a worker's parts in a ring (DCF 0x42); worker to head, on changes, at most four times a second.
    pub struct RingState {
        /// Identifier of the ring, as in [`Ring::ring`].
        ring: u64 = [fixed64, tag = 1],
        /// Epoch of the ring at this worker.
        epoch: u32 = [uint32, tag = 2],
        /// One entry for each stage that the worker holds, as member or as standby.
        parts: Vec<PartState> = [message, repeated, tag = 3],
        /// Driver: a token came back through every stage of this epoch; requests may be sent.
        serving: bool = [bool, tag = 4],
        /// Driver: the card to serve under, speeds measured.
        card: Option<ModelCard> = [message, optional, tag = 5],
        /// Node ids of members that, from this worker, do not answer or have a closed link.
        suspects: Vec<String> = [string, repeated, tag = 6],
        /// Driver: report on the last change of epoch; sent once.
        recovery: Option<Recovery> = [message, optional, tag = 7],
        /// Those of `suspects` to which this worker's link is closed, or whose links let nothing pass: waiting does not help. An
        /// older worker does not tell them apart.
        severed: Vec<String> = [string, repeated, tag = 8],
    }

    /// One stage that a worker holds.
    pub struct PartState {
        /// Index of the stage.
        stage: u32 = [uint32, tag = 1],
        /// True for the standby, false for the member.
        standby: bool = [bool, tag = 2],
        /// State of this part.
        phase: i32 = [enumeration = "PartPhase", tag = 3],
        /// Cause of the failure, if `phase` is `Failed`.
        error: String = [string, tag = 4],
        /// Member: KV rows that its standby does not have yet, over all slots.
        lag_rows: u64 = [uint64, tag = 5],
        /// Member: smoothed duration of its steps in microseconds.
        step_us: f32 = [float, tag = 6],
        /// Duration of loading in seconds.
        load_seconds: f32 = [float, tag = 7],
        /// Memory of the weights in bytes.
        weight_bytes: u64 = [uint64, tag = 8],
        /// Memory of the KV rows in bytes.
        kv_bytes: u64 = [uint64, tag = 9],
        /// Microseconds that its steps of more than a few rows took, all of them together: prompts, and what had to be replayed.
        prefill_us: u64 = [uint64, tag = 10],
        /// Bytes of outputs kept in case the next stage needs them again.
        kept_bytes: u64 = [uint64, tag = 11],
        /// Progress of loading, in a unit of the worker's own that only grows; 0 if unknown.
        progress: u64 = [uint64, tag = 12],
    }
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

messages! {
    /// A driver's report on recovery after a change of epoch.
    pub struct Recovery {
        /// Microseconds from the last token before the change to the first one after it.
        gap_us: u64 = [uint64, tag = 1],
        /// Rows that were computed again or replayed.
        rows: u64 = [uint64, tag = 2],
        /// Number of requests that were running.
        requests: u32 = [uint32, tag = 3],
    }

    /// First message of a stream between members (DCF 0x43), from the dialling side.
    pub struct RingHello {
        /// Identifier of the ring.
        ring: u64 = [fixed64, tag = 1],
        /// Epoch at the dialling side.
        epoch: u32 = [uint32, tag = 2],
        /// Index of the stage that the dialling side connects to.
        stage: u32 = [uint32, tag = 3],
        /// Purpose of the stream.
        purpose: i32 = [enumeration = "RingPurpose", tag = 4],
    }
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

messages! {
    /// A step on its way around the ring (DCF 0x44).
    pub struct RingStep {
        /// Epoch in which it was planned; members drop those of another epoch.
        epoch: u32 = [uint32, tag = 1],
        /// Number of the step within its epoch, from 0.
        step: u64 = [uint64, tag = 2],
        /// Changes to slots, before the segments.
        slot_ops: Vec<RingSlotOp> = [message, repeated, tag = 3],
        /// Runs of rows that this step computes.
        segments: Vec<RingSegment> = [message, repeated, tag = 4],
        /// Token ids of all rows, back to back: the input of stage 0, and for the other stages the tokens of the
        /// rows they hold.
        tokens: Vec<u32> = [uint32, repeated, tag = 5],
        /// Hidden rows, row-major, little-endian f32 or f16; empty toward stage 0.
        rows: Bytes = [bytes = "bytes", tag = 6],
        /// Number of the last stage that takes the rows in, plus one. The driver thus learns when they are in
        /// that stage's KV cache. 0 for a step through all stages.
        through: u32 = [uint32, tag = 8],
    }

    /// A change to a KV slot.
    pub struct RingSlotOp {
        /// Index of the slot that changes.
        slot: u32 = [uint32, tag = 1],
        /// Number of rows in the slot after the change.
        len: u32 = [uint32, tag = 2],
        /// Number of the source slot plus one, to copy from it; 0 truncates the slot instead.
        from_plus_one: u32 = [uint32, tag = 3],
    }

    /// Consecutive rows of one slot.
    pub struct RingSegment {
        /// Index of the slot.
        slot: u32 = [uint32, tag = 1],
        /// Position of the first row.
        position: u32 = [uint32, tag = 2],
        /// Number of rows.
        rows: u32 = [uint32, tag = 3],
    }

    /// Contents of a KV cache (DCF 0x45): the answer to a RingHello, member to driver on a Drive stream, standby
    /// to member on a Mirror stream.
    pub struct RingHeld {
        /// Epoch that this report is for.
        epoch: u32 = [uint32, tag = 1],
        /// Slots that are not empty.
        slots: Vec<HeldSlot> = [message, repeated, tag = 2],
    }

    /// Contents of one slot.
    pub struct HeldSlot {
        /// Index of the slot.
        slot: u32 = [uint32, tag = 1],
        /// Tokens whose KV rows the slot holds.
        tokens: Vec<u32> = [uint32, repeated, tag = 2],
        /// Position of the first row whose output is still kept for the next stage; `tokens.len()` if no output
        /// is kept.
        kept_from: u32 = [uint32, tag = 3],
        /// Number of steps since the slot last changed.
        age: u64 = [uint64, tag = 4],
    }

    /// KV rows for a standby (DCF 0x46). Changes to slots travel the same way, in order.
    pub struct RingMirror {
        /// Number of the message in its stream, from 1; echoed in Mirrored.
        count: u64 = [uint64, tag = 1],
        /// A change to a slot; nothing else is set then.
        slot_op: Option<RingSlotOp> = [message, optional, tag = 2],
        /// Index of the slot.
        slot: u32 = [uint32, tag = 3],
        /// Position of the first row; the slot is cut off there first.
        position: u32 = [uint32, tag = 4],
        /// Tokens of the rows.
        tokens: Vec<u32> = [uint32, repeated, tag = 5],
        /// The rows, in the engine's own layout.
        rows: Bytes = [bytes = "bytes", tag = 6],
    }

    /// Replication progress of a standby (DCF 0x47): standby to member on a Mirror stream, and from there to the
    /// stage before it on the Rows stream, which may then discard the outputs it kept.
    pub struct RingMirrored {
        /// On a Mirror stream: messages taken in. On a Rows stream: one more than the number of the last step computed.
        count: u64 = [uint64, tag = 1],
        /// On a Rows stream: the slot whose first `len` rows are safe.
        slot: u32 = [uint32, tag = 2],
        /// On a Rows stream: number of rows that are safe.
        len: u32 = [uint32, tag = 3],
    }

    /// Liveness check (DCF 0x48). Driver to member; the member's own network task answers, however long a step
    /// takes.
    pub struct RingPing {
        /// Number that the answer repeats.
        nonce: u64 = [uint64, tag = 1],
        /// In the answer: number of steps of this epoch that arrived.
        received: u64 = [uint64, tag = 2],
        /// In the answer: number of steps of this epoch that were passed on.
        sent: u64 = [uint64, tag = 3],
    }

    /// Order to send kept outputs to the next stage again (DCF 0x49); driver to a member.
    pub struct RingResend {
        /// Epoch of the ring.
        epoch: u32 = [uint32, tag = 1],
        /// Number of the first step that carries the rows.
        step: u64 = [uint64, tag = 2],
        /// Index of the slot.
        slot: u32 = [uint32, tag = 3],
        /// Position of the first row.
        from: u32 = [uint32, tag = 4],
        /// One past the last row.
        to: u32 = [uint32, tag = 5],
        /// Maximum rows of one step.
        chunk: u32 = [uint32, tag = 6],
        /// Stages that take the rows in, as in [`RingStep::through`].
        through: u32 = [uint32, tag = 8],
    }
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

messages! {
    /// Outcome of a step at a member (DCF 0x4A); member to driver, for failures and for rows that went no
    /// further.
    pub struct RingOutcome {
        /// Epoch of the step.
        epoch: u32 = [uint32, tag = 1],
        /// Number of the step within its epoch.
        step: u64 = [uint64, tag = 2],
        /// Cause of the failure; empty on success.
        error: String = [string, tag = 3],
    }
}
