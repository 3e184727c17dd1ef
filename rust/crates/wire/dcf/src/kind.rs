//! The first byte of the header.

/// The type of a message.
///
/// A newtype rather than an enum, so that unknown types can still be held, counted and printed;
/// [`MsgType::is_assigned`] distinguishes the known ones.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct MsgType(pub u8);

named_numbers! { MsgType, "type":
    /// A worker is alive; worker to head, over UDP.
    HEARTBEAT = 0x01, "Heartbeat";
    /// A request; client to head, head to worker.
    TASK = 0x02, "Task";
    /// The answer to a Task.
    RESULT = 0x03, "Result";
    /// Confirms receipt.
    ACK = 0x04, "Ack";
    /// Rejects a message.
    NACK = 0x05, "Nack";
    /// A piece of a payload too large for one datagram; see [`crate::chunk`].
    CHUNK = 0x06, "Chunk";
    /// A Chunk was received.
    CHUNK_ACK = 0x07, "ChunkAck";
    /// Are you there? The answer has the same type and sequence.
    HEALTH = 0x08, "Health";
    /// The receiver is to stop; head to worker.
    SHUTDOWN = 0x09, "Shutdown";
    /// First message of a worker on its control stream.
    HELLO = 0x10, "Hello";
    /// The head's answer to Hello.
    WELCOME = 0x11, "Welcome";
    /// Load and speed of a worker.
    LOAD = 0x12, "Load";
    /// A heartbeat sealed with keys of the worker's QUIC session; over UDP.
    SEALED_HEARTBEAT = 0x13, "SealedHeartbeat";
    /// The receiver is to finish what runs and take nothing new.
    DRAIN = 0x14, "Drain";
    /// The nodes that an operator has expelled, all of them; head to worker.
    EXPELLED = 0x15, "Expelled";
    /// The mesh root has a successor; head to worker.
    ROOT_SUCCESSION = 0x17, "RootSuccession";
    /// A worker's statement about its system and hardware has changed; worker to head.
    EVIDENCE = 0x18, "Evidence";
    /// A message of a session between a client with a key or token and the head, sealed; over UDP.
    SEALED = 0x19, "Sealed";
    /// A request for text, first message of its stream; head to worker.
    GENERATE = 0x20, "Generate";
    /// New tokens of an answer.
    TOKENS = 0x21, "Tokens";
    /// The end of an answer.
    DONE = 0x22, "Done";
    /// A piece of an answer's text for a client that asked to be streamed to; see [`crate::PartialBody`].
    PARTIAL = 0x23, "Partial";
    /// Texts to embed, head to worker.
    EMBED = 0x24, "Embed";
    /// Their vectors, worker to head.
    EMBEDDINGS = 0x25, "Embeddings";
    /// A request is alive and waits or is computed; worker to head, only where the request asks for it.
    PROGRESS = 0x26, "Progress";
    /// Echo this cookie to show that datagrams reach you at the address you send from.
    CHALLENGE = 0x28, "Challenge";
    /// The cookie of a Challenge, echoed.
    CHALLENGE_REPLY = 0x29, "ChallengeReply";
    /// An image to make, head to worker.
    IMAGE_TASK = 0x2A, "ImageTask";
    /// A denoising step of an image is done, worker to head.
    IMAGE_STEP = 0x2B, "ImageStep";
    /// A part of a finished image, worker to head.
    IMAGE_DATA = 0x2C, "ImageData";
    /// A node asks to join with a token.
    JOIN_REQUEST = 0x30, "JoinRequest";
    /// Certificates for a node that joined or renewed.
    JOIN_RESPONSE = 0x31, "JoinResponse";
    /// A node asks for a fresh certificate.
    RENEW_REQUEST = 0x32, "RenewRequest";
    /// A client shows its API key or curtain token; client to head.
    CLIENT_HELLO = 0x34, "ClientHello";
    /// The session that the head opens for it.
    CLIENT_WELCOME = 0x35, "ClientWelcome";
    /// A worker's profile and the layers that it can hold; worker to head.
    OFFER = 0x40, "Offer";
    /// The members of a ring; head to worker.
    RING = 0x41, "Ring";
    /// State of a worker's parts in a ring; worker to head.
    RING_STATE = 0x42, "RingState";
    /// First message of a stream between members of a ring.
    RING_HELLO = 0x43, "RingHello";
    /// A step on its way around a ring.
    RING_STEP = 0x44, "RingStep";
    /// Contents of a member's KV cache at the start of an epoch.
    RING_HELD = 0x45, "RingHeld";
    /// KV rows for a standby.
    RING_MIRROR = 0x46, "RingMirror";
    /// Replication progress of a standby.
    RING_MIRRORED = 0x47, "RingMirrored";
    /// Are you there? Driver of a ring to member; the answer has the same type.
    RING_PING = 0x48, "RingPing";
    /// Send the outputs you kept again; driver to member.
    RING_RESEND = 0x49, "RingResend";
    /// Outcome of a step at a member; member to driver.
    RING_OUTCOME = 0x4A, "RingOutcome";
    /// Some of the bytes by which a path's bandwidth is measured; worker to head or to another worker.
    PROBE = 0x4B, "Probe";
    /// Arrival rate of the Probes of a stream, as their answer.
    PROBED = 0x4C, "Probed";
    /// Models that a worker holds and seeks; worker to head.
    MODELS = 0x50, "Models";
    /// Sources for the models that a worker seeks; head to worker.
    SOURCES = 0x51, "Sources";
    /// Asks another worker for a model's manifest.
    MANIFEST_REQUEST = 0x52, "ManifestRequest";
    /// A model's manifest.
    MANIFEST_REPLY = 0x53, "ManifestReply";
    /// First message of a stream that brings pieces of a model.
    PIECES_HELLO = 0x54, "PiecesHello";
    /// Set of pieces that the sender has.
    PIECES_HERE = 0x55, "PiecesHere";
    /// Asks for a piece, or withdraws a request.
    PIECE_REQUEST = 0x56, "PieceRequest";
    /// A part of a piece.
    PIECE_DATA = 0x57, "PieceData";
    /// The models that a worker serves whole; worker to head.
    SERVED = 0x58, "Served";
    /// A signed frame of gossip.
    GOSSIP = 0x60, "Gossip";
    /// Identity documents of nodes that gossip.
    GOSSIP_IDENTITIES = 0x61, "GossipIdentities";
    /// Something failed: a code, then text; see [`crate::ErrorBody`].
    ERROR = 0xFF, "Error";
}

impl MsgType {
    /// True if this version knows the type.
    #[inline]
    #[must_use]
    pub const fn is_assigned(self) -> bool {
        self.name().is_some()
    }

    /// True if the type travels in datagrams. The others are for streams only, so that 0x51 can be the first
    /// byte of a v5.1 datagram; see [`crate::Version`].
    #[inline]
    #[must_use]
    pub const fn is_datagram(self) -> bool {
        matches!(
            self,
            Self::HEARTBEAT
                | Self::TASK
                | Self::RESULT
                | Self::ACK
                | Self::NACK
                | Self::CHUNK
                | Self::CHUNK_ACK
                | Self::HEALTH
                | Self::SHUTDOWN
                | Self::SEALED_HEARTBEAT
                | Self::SEALED
                | Self::PARTIAL
                | Self::CHALLENGE
                | Self::CHALLENGE_REPLY
                | Self::ERROR
        )
    }

    /// True for 0x10–0x7F, the range of messages between nodes of the mesh.
    #[inline]
    #[must_use]
    pub const fn is_internal(self) -> bool {
        matches!(self.0, 0x10..=0x7F)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assigned_types_are_ascending_and_have_names() {
        assert!(MsgType::ASSIGNED.is_sorted_by(|a, b| a < b));
        assert!(MsgType::ASSIGNED.iter().all(|kind| kind.is_assigned()));
        let named = (0..=u8::MAX)
            .filter(|&value| MsgType(value).is_assigned())
            .count();
        assert_eq!(named, MsgType::ASSIGNED.len());
    }

    #[test]
    fn no_datagram_begins_with_the_version_byte() {
        assert!(!MsgType(crate::Version::BYTE).is_datagram());
        assert!(
            (0..=u8::MAX)
                .map(MsgType)
                .all(|kind| kind.is_assigned() || !kind.is_datagram())
        );
    }

    #[test]
    fn a_type_without_a_name_prints_its_number() {
        assert_eq!(MsgType(0x7E).to_string(), "type 0x7e");
        assert_eq!(MsgType::CHUNK_ACK.to_string(), "ChunkAck");
    }
}
