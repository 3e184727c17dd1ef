//! Messages about the models of a mesh: the reports of workers to the head, and the exchange of pieces
//! between workers. See docs/reference/protocol.md, "Models"; field numbers are never reused.
//!
//! A model is identified by its *fingerprint*, the SHA-256 of its manifest. Its *pieces* are those of all its
//! files in the manifest's order, numbered from 0.

use bytes::Bytes;
use prost::Message;

use crate::{ModelCard, NodeAddr};

messages! {
    /// The models that a worker holds and seeks (DCF 0x50); worker to head, after the Welcome and whenever they
    /// change. Each message replaces the one before.
    pub struct Models {
        /// UDP port where other workers reach it.
        port: u32 = [uint32, tag = 1],
        /// Models of which it has pieces and lets others have them.
        held: Vec<HeldModel> = [message, repeated, tag = 2],
        /// Models of which it lacks pieces that it needs.
        sought: Vec<SoughtModel> = [message, repeated, tag = 3],
        /// Workers that sent data which does not match the manifest.
        bad: Vec<BadSource> = [message, repeated, tag = 4],
    }

    /// Some pieces of a model with that many: one bit for each, the lowest bit of the first byte for piece 0; zeros at the end may
    /// be left out.
    pub struct Pieces {
        /// Pieces of the model.
        of: u32 = [uint32, tag = 1],
        /// All of them; the bits are then left out.
        all: bool = [bool, tag = 2],
        /// Bit set, as described above; empty with `all`.
        bits: Bytes = [bytes = "bytes", tag = 3],
    }

    /// A model of which a worker has pieces.
    pub struct HeldModel {
        /// SHA-256 of the manifest, lower-case hex.
        fingerprint: String = [string, tag = 1],
        /// Names of the model at this worker: the manifest's name, and names and hub ids that were resolved to
        /// it.
        names: Vec<String> = [string, repeated, tag = 2],
        /// Bytes of all its files.
        bytes: u64 = [uint64, tag = 3],
        /// Set of pieces that this worker has.
        pieces: Option<Pieces> = [message, optional, tag = 4],
        /// True if a key that this worker trusts signed the manifest.
        signed: bool = [bool, tag = 5],
    }

    /// A model that a worker seeks.
    pub struct SoughtModel {
        /// Name that the model was requested by.
        name: String = [string, tag = 1],
        /// SHA-256 of its manifest, if that is known already.
        fingerprint: String = [string, tag = 2],
        /// The pieces that it needs and lacks; absent while the manifest is unknown.
        missing: Option<Pieces> = [message, optional, tag = 3],
        /// True if the worker can get the model from outside the mesh.
        origin: bool = [bool, tag = 4],
        /// Bytes received so far from outside the mesh; 0 if the worker does not download.
        origin_bytes: u64 = [uint64, tag = 5],
        /// Error of the download from outside the mesh; the head then assigns another worker.
        origin_error: String = [string, tag = 6],
        /// The worker accepts only manifests signed by a key that it trusts.
        signed_only: bool = [bool, tag = 7],
        /// Bytes of the needed pieces that are already here.
        bytes: u64 = [uint64, tag = 8],
        /// Bytes of the needed pieces; 0 while unknown.
        bytes_total: u64 = [uint64, tag = 9],
        /// Fingerprints of manifests of that name that the worker rejects, because the hub has others under it.
        refused: Vec<String> = [string, repeated, tag = 10],
        /// Fingerprints of manifests of that name that the worker cannot use itself; other workers may.
        unusable: Vec<String> = [string, repeated, tag = 11],
    }

    /// A worker whose data did not match the manifest.
    pub struct BadSource {
        /// Node id of the worker.
        node_id: String = [string, tag = 1],
        /// Fingerprint of the model.
        fingerprint: String = [string, tag = 2],
        /// Description of the fault, for people.
        reason: String = [string, tag = 3],
    }

    /// Sources for the models that a worker seeks (DCF 0x51); head to worker, in answer to [`Models`] and
    /// whenever they change. Each message replaces the one before.
    pub struct Sources {
        /// One entry for each model sought.
        models: Vec<ModelSources> = [message, repeated, tag = 1],
    }

    /// Sources for one model.
    pub struct ModelSources {
        /// Name that the worker seeks the model by.
        name: String = [string, tag = 1],
        /// SHA-256 of the manifest of that name in this mesh; empty if the mesh has no such manifest.
        fingerprint: String = [string, tag = 2],
        /// Workers with pieces of it.
        holders: Vec<NodeAddr> = [message, repeated, tag = 3],
        /// This worker is the one that downloads the model from outside the mesh.
        origin: bool = [bool, tag = 4],
        /// Name of the worker that downloads it from outside the mesh, for the log.
        origin_worker: String = [string, tag = 5],
        /// With `origin`: pieces that others seek and no worker has; this worker fetches them, too.
        for_others: Option<Pieces> = [message, optional, tag = 6],
        /// SHA-256 of the manifest that the head pinned to that name; empty without a pin.
        pin: String = [string, tag = 7],
        /// Several manifests have that name, and no operator has decided between them.
        disputed: bool = [bool, tag = 8],
        /// True if an operator set `pin`.
        pinned_by_operator: bool = [bool, tag = 9],
    }

    /// Asks another worker for a model's manifest (DCF 0x52), first message of its stream; answered by [`ManifestReply`] or Error.
    pub struct ManifestRequest {
        /// SHA-256 of the manifest, lower-case hex.
        fingerprint: String = [string, tag = 1],
    }

    /// A manifest (DCF 0x53).
    pub struct ManifestReply {
        /// The manifest in its canonical form, which has that fingerprint.
        manifest: Bytes = [bytes = "bytes", tag = 1],
        /// Its signatures, as mesh-store keeps them; empty if it has none.
        signatures: Bytes = [bytes = "bytes", tag = 2],
    }

    /// First message of a stream for pieces of one model (DCF 0x54); answered by [`PiecesHere`] or Error.
    pub struct PiecesHello {
        /// SHA-256 of the manifest, lower-case hex.
        fingerprint: String = [string, tag = 1],
    }

    /// The pieces that the sender has (DCF 0x55): at the start of the stream, and again when it has more.
    pub struct PiecesHere {
        /// Set of pieces of the stream's model.
        pieces: Option<Pieces> = [message, optional, tag = 1],
    }
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

messages! {
    /// A part of a piece (DCF 0x57). The parts of a piece arrive in order, without others in between.
    pub struct PieceData {
        /// Number of the piece.
        piece: u32 = [uint32, tag = 1],
        /// Offset of these bytes in the piece.
        offset: u32 = [uint32, tag = 2],
        /// The bytes; at most [`BLOCK`].
        data: Bytes = [bytes = "bytes", tag = 3],
        /// The sender does not have the piece (any more); `data` is empty.
        refused: bool = [bool, tag = 4],
    }

    /// The models that a worker serves whole (DCF 0x58); worker to head, when they differ from those in its
    /// Hello.
    pub struct Served {
        /// Complete list of those models.
        models: Vec<ModelCard> = [message, repeated, tag = 1],
        /// Those of them that make images: see [`crate::Hello::all_models`].
        image_models: Vec<ModelCard> = [message, repeated, tag = 2],
    }
}

/// Bytes of a piece in one [`PieceData`] at most: short enough that the other streams of a link are not held up.
pub const BLOCK: usize = 256 << 10;
