//! Messages about the models of a mesh: the reports of workers to the head, and the exchange of pieces
//! between workers. See docs/reference/protocol.md, "Models"; field numbers are never reused.
//!
//! A model is identified by its *fingerprint*, the SHA-256 of its manifest. Its *pieces* are those of all its
//! files in the manifest's order, numbered from 0.

use bytes::Bytes;
use prost::Message;

use crate::{ModelCard, NodeAddr};

/// The models that a worker holds and seeks (DCF 0x50); worker to head, after the Welcome and whenever they
/// change. Each message replaces the one before.
#[derive(Clone, PartialEq, Message)]
pub struct Models {
    /// UDP port where other workers reach it.
    #[prost(uint32, tag = "1")]
    pub port: u32,
    /// Models of which it has pieces and lets others have them.
    #[prost(message, repeated, tag = "2")]
    pub held: Vec<HeldModel>,
    /// Models of which it lacks pieces that it needs.
    #[prost(message, repeated, tag = "3")]
    pub sought: Vec<SoughtModel>,
    /// Workers that sent data which does not match the manifest.
    #[prost(message, repeated, tag = "4")]
    pub bad: Vec<BadSource>,
}

/// Some pieces of a model with that many: one bit for each, the lowest bit of the first byte for piece 0; zeros at the end may
/// be left out.
#[derive(Clone, PartialEq, Message)]
pub struct Pieces {
    /// Pieces of the model.
    #[prost(uint32, tag = "1")]
    pub of: u32,
    /// All of them; the bits are then left out.
    #[prost(bool, tag = "2")]
    pub all: bool,
    /// Bit set, as described above; empty with `all`.
    #[prost(bytes = "bytes", tag = "3")]
    pub bits: Bytes,
}

/// A model of which a worker has pieces.
#[derive(Clone, PartialEq, Message)]
pub struct HeldModel {
    /// SHA-256 of the manifest, lower-case hex.
    #[prost(string, tag = "1")]
    pub fingerprint: String,
    /// Names of the model at this worker: the manifest's name, and names and hub ids that were resolved to
    /// it.
    #[prost(string, repeated, tag = "2")]
    pub names: Vec<String>,
    /// Bytes of all its files.
    #[prost(uint64, tag = "3")]
    pub bytes: u64,
    /// Set of pieces that this worker has.
    #[prost(message, optional, tag = "4")]
    pub pieces: Option<Pieces>,
    /// True if a key that this worker trusts signed the manifest.
    #[prost(bool, tag = "5")]
    pub signed: bool,
}

/// A model that a worker seeks.
#[derive(Clone, PartialEq, Message)]
pub struct SoughtModel {
    /// Name that the model was requested by.
    #[prost(string, tag = "1")]
    pub name: String,
    /// SHA-256 of its manifest, if that is known already.
    #[prost(string, tag = "2")]
    pub fingerprint: String,
    /// The pieces that it needs and lacks; absent while the manifest is unknown.
    #[prost(message, optional, tag = "3")]
    pub missing: Option<Pieces>,
    /// True if the worker can get the model from outside the mesh.
    #[prost(bool, tag = "4")]
    pub origin: bool,
    /// Bytes received so far from outside the mesh; 0 if the worker does not download.
    #[prost(uint64, tag = "5")]
    pub origin_bytes: u64,
    /// Error of the download from outside the mesh; the head then assigns another worker.
    #[prost(string, tag = "6")]
    pub origin_error: String,
    /// The worker accepts only manifests signed by a key that it trusts.
    #[prost(bool, tag = "7")]
    pub signed_only: bool,
    /// Bytes of the needed pieces that are already here.
    #[prost(uint64, tag = "8")]
    pub bytes: u64,
    /// Bytes of the needed pieces; 0 while unknown.
    #[prost(uint64, tag = "9")]
    pub bytes_total: u64,
    /// Fingerprints of manifests of that name that the worker rejects, because the hub has others under it.
    #[prost(string, repeated, tag = "10")]
    pub refused: Vec<String>,
    /// Fingerprints of manifests of that name that the worker cannot use itself; other workers may.
    #[prost(string, repeated, tag = "11")]
    pub unusable: Vec<String>,
}

/// A worker whose data did not match the manifest.
#[derive(Clone, PartialEq, Message)]
pub struct BadSource {
    /// Node id of the worker.
    #[prost(string, tag = "1")]
    pub node_id: String,
    /// Fingerprint of the model.
    #[prost(string, tag = "2")]
    pub fingerprint: String,
    /// Description of the fault, for people.
    #[prost(string, tag = "3")]
    pub reason: String,
}

/// Sources for the models that a worker seeks (DCF 0x51); head to worker, in answer to [`Models`] and
/// whenever they change. Each message replaces the one before.
#[derive(Clone, PartialEq, Message)]
pub struct Sources {
    /// One entry for each model sought.
    #[prost(message, repeated, tag = "1")]
    pub models: Vec<ModelSources>,
}

/// Sources for one model.
#[derive(Clone, PartialEq, Message)]
pub struct ModelSources {
    /// Name that the worker seeks the model by.
    #[prost(string, tag = "1")]
    pub name: String,
    /// SHA-256 of the manifest of that name in this mesh; empty if the mesh has no such manifest.
    #[prost(string, tag = "2")]
    pub fingerprint: String,
    /// Workers with pieces of it.
    #[prost(message, repeated, tag = "3")]
    pub holders: Vec<NodeAddr>,
    /// This worker is the one that downloads the model from outside the mesh.
    #[prost(bool, tag = "4")]
    pub origin: bool,
    /// Name of the worker that downloads it from outside the mesh, for the log.
    #[prost(string, tag = "5")]
    pub origin_worker: String,
    /// With `origin`: pieces that others seek and no worker has; this worker fetches them, too.
    #[prost(message, optional, tag = "6")]
    pub for_others: Option<Pieces>,
    /// SHA-256 of the manifest that the head pinned to that name; empty without a pin.
    #[prost(string, tag = "7")]
    pub pin: String,
    /// Several manifests have that name, and no operator has decided between them.
    #[prost(bool, tag = "8")]
    pub disputed: bool,
    /// True if an operator set `pin`.
    #[prost(bool, tag = "9")]
    pub pinned_by_operator: bool,
}

/// Asks another worker for a model's manifest (DCF 0x52), first message of its stream; answered by [`ManifestReply`] or Error.
#[derive(Clone, PartialEq, Message)]
pub struct ManifestRequest {
    /// SHA-256 of the manifest, lower-case hex.
    #[prost(string, tag = "1")]
    pub fingerprint: String,
}

/// A manifest (DCF 0x53).
#[derive(Clone, PartialEq, Message)]
pub struct ManifestReply {
    /// The manifest in its canonical form, which has that fingerprint.
    #[prost(bytes = "bytes", tag = "1")]
    pub manifest: Bytes,
    /// Its signatures, as mesh-store keeps them; empty if it has none.
    #[prost(bytes = "bytes", tag = "2")]
    pub signatures: Bytes,
}

/// First message of a stream for pieces of one model (DCF 0x54); answered by [`PiecesHere`] or Error.
#[derive(Clone, PartialEq, Message)]
pub struct PiecesHello {
    /// SHA-256 of the manifest, lower-case hex.
    #[prost(string, tag = "1")]
    pub fingerprint: String,
}

/// The pieces that the sender has (DCF 0x55): at the start of the stream, and again when it has more.
#[derive(Clone, PartialEq, Message)]
pub struct PiecesHere {
    /// Set of pieces of the stream's model.
    #[prost(message, optional, tag = "1")]
    pub pieces: Option<Pieces>,
}

/// Request for a piece (DCF 0x56), or its withdrawal. Pieces arrive in the order of their requests.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct PieceRequest {
    /// Number of the piece.
    #[prost(uint32, tag = "1")]
    pub piece: u32,
    /// Withdraws the request. Data that is already on its way still arrives.
    #[prost(bool, tag = "2")]
    pub withdraw: bool,
}

/// A part of a piece (DCF 0x57). The parts of a piece arrive in order, without others in between.
#[derive(Clone, PartialEq, Message)]
pub struct PieceData {
    /// Number of the piece.
    #[prost(uint32, tag = "1")]
    pub piece: u32,
    /// Offset of these bytes in the piece.
    #[prost(uint32, tag = "2")]
    pub offset: u32,
    /// The bytes; at most [`BLOCK`].
    #[prost(bytes = "bytes", tag = "3")]
    pub data: Bytes,
    /// The sender does not have the piece (any more); `data` is empty.
    #[prost(bool, tag = "4")]
    pub refused: bool,
}

/// The models that a worker serves whole (DCF 0x58); worker to head, when they differ from those in its
/// Hello.
#[derive(Clone, PartialEq, Message)]
pub struct Served {
    /// Complete list of those models.
    #[prost(message, repeated, tag = "1")]
    pub models: Vec<ModelCard>,
}

/// Bytes of a piece in one [`PieceData`] at most: short enough that the other streams of a link are not held up.
pub const BLOCK: usize = 256 << 10;
