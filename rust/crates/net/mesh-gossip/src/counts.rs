//! Reasons of refusal, and how often each occurred.

/// Reasons for not taking a frame, a document or a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It is too short or too long.
    #[error("its length is not that of a frame")]
    Length,
    /// A version of the envelope that this node does not know.
    #[error("it has another version; update the older node")]
    Version,
    /// It belongs to another mesh.
    #[error("it belongs to another mesh")]
    Mesh,
    /// Its sender is this node.
    #[error("its sender is this node itself")]
    Own,
    /// No valid identity document of its sender is known.
    #[error("no identity document of its sender is known")]
    Stranger,
    /// The sender's identity document is not valid now.
    #[error("the identity document is not valid at this time")]
    Expired,
    /// Its counter was used before, or is too old.
    #[error("its epoch or counter was used before")]
    Replay,
    /// The sender has used up its budget.
    #[error("its sender has used up its budget")]
    Rate,
    /// The signature is not the sender's.
    #[error("its signature is not that of its sender")]
    Signature,
    /// A member signed content that cannot be read.
    #[error("its content is malformed")]
    Malformed,
    /// A document that the mesh root did not sign.
    #[error("the mesh root has not signed this identity document")]
    Document,
    /// The directory or the store is full.
    #[error("it has no room: the bound of this node or of its origin is reached")]
    Full,
    /// A record whose signature is not its origin's.
    #[error("the record is not signed by its origin")]
    Record,
}

/// All reasons, in the order of [`Counts::refused`], with their names in metrics.
pub const REFUSALS: [(Refusal, &str); 13] = [
    (Refusal::Length, "length"),
    (Refusal::Version, "version"),
    (Refusal::Mesh, "mesh"),
    (Refusal::Own, "own"),
    (Refusal::Stranger, "stranger"),
    (Refusal::Expired, "expired"),
    (Refusal::Replay, "replay"),
    (Refusal::Rate, "rate"),
    (Refusal::Signature, "signature"),
    (Refusal::Malformed, "malformed"),
    (Refusal::Document, "document"),
    (Refusal::Full, "full"),
    (Refusal::Record, "record"),
];

/// Counters of a node since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames whose envelope was verified.
    pub accepted: u64,
    /// Frames that were signed.
    pub sent: u64,
    /// Records whose signature was verified.
    pub records: u64,
    /// Frames, documents and records that were refused, as [`REFUSALS`] orders them.
    pub refused: [u64; REFUSALS.len()],
}

impl Counts {
    pub(crate) fn refuse(&mut self, refusal: Refusal) {
        if let Some(count) = REFUSALS.iter().position(|(listed, _)| *listed == refusal) {
            self.refused[count] += 1;
        }
    }

    /// Number of refusals for this reason.
    pub fn refused_for(&self, refusal: Refusal) -> u64 {
        let index = REFUSALS.iter().position(|(listed, _)| *listed == refusal);
        index.map_or(0, |index| self.refused[index])
    }

    /// Number of refusals for all reasons.
    pub fn all_refused(&self) -> u64 {
        self.refused.iter().sum()
    }
}
