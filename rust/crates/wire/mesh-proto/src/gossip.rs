//! Gossip between the nodes of a mesh: the bodies of signed frames and records (`mesh-gossip`), and how links carry them.

use prost::Message;

messages! {
    /// A signed frame of a node on its way over a link (DCF 0x60).
    pub struct GossipFrame {
        /// Ids of the nodes that the frame is for, 32 bytes each; empty where the receiver of this message is the only one.
        to: Vec<Vec<u8>> = [bytes = "vec", repeated, tag = 1],
        /// The frame. Its first bytes are the envelope that docs/reference/protocol.md describes.
        frame: Vec<u8> = [bytes = "vec", tag = 2],
    }

    /// Identity documents of nodes (DCF 0x61): the first one from the head invites the worker to gossip, and the worker answers
    /// with its own.
    pub struct GossipIdentities {
        /// Encoded `SignedIdentity` messages.
        documents: Vec<Vec<u8>> = [bytes = "vec", repeated, tag = 1],
    }

    /// The content of a frame, behind the envelope.
    pub struct GossipBody {
        /// Generation of the sender as a member: it grows with every start, and whenever others took the sender for down.
        generation: u64 = [uint64, tag = 1],
        /// Messages of the membership protocol.
        swim: Vec<GossipSwim> = [message, repeated, tag = 2],
        /// Condition of the sender.
        pulse: Option<GossipPulse> = [message, optional, tag = 3],
        /// Records for every receiver of the frame.
        records: Vec<GossipRecord> = [message, repeated, tag = 4],
        /// Digests of the sender's records: 8 bytes for each of 32 buckets, or empty.
        digests: Vec<u8> = [bytes = "vec", tag = 5],
        /// Reconciliation of buckets that differ.
        sync: Vec<GossipSync> = [message, repeated, tag = 6],
    }

    /// A message of the membership protocol.
    pub struct GossipSwim {
        /// Id of the receiver.
        to: Vec<u8> = [bytes = "vec", tag = 1],
        /// The message.
        packet: Vec<u8> = [bytes = "vec", tag = 2],
    }

    /// Condition of a machine. Absent values are those that the machine does not report.
    pub struct GossipPulse {
        /// Load average of one minute, in hundredths of all processors.
        load_percent: Option<u32> = [uint32, optional, tag = 1],
        /// Highest temperature of a processor, degrees Celsius.
        temperature_celsius: Option<i32> = [sint32, optional, tag = 2],
        /// Memory that programs can still get, bytes.
        memory_available: Option<u64> = [uint64, optional, tag = 3],
        /// Memory of the machine, bytes.
        memory_total: Option<u64> = [uint64, optional, tag = 4],
        /// Free space in the file system of the state directory, bytes.
        disk_available: Option<u64> = [uint64, optional, tag = 5],
        /// Size of that file system, bytes.
        disk_total: Option<u64> = [uint64, optional, tag = 6],
        /// Time since the machine was started, seconds.
        uptime_seconds: Option<u64> = [uint64, optional, tag = 7],
        /// Charge of the battery, percent; absent without one.
        battery_percent: Option<u32> = [uint32, optional, tag = 8],
        /// True while the machine runs on its battery.
        on_battery: Option<bool> = [bool, optional, tag = 9],
    }

    /// A record that its origin has signed.
    pub struct GossipRecord {
        /// Id of the node that signed it.
        origin: Vec<u8> = [bytes = "vec", tag = 1],
        /// An encoded [`GossipContent`].
        content: Vec<u8> = [bytes = "vec", tag = 2],
        /// Signature over the mesh, the origin and the content.
        signature: Vec<u8> = [bytes = "vec", tag = 3],
    }

    /// The content of a record.
    pub struct GossipContent {
        /// 1 threats, 2 memory.
        topic: u32 = [uint32, tag = 1],
        /// Name of the record; unique within topic and origin.
        name: Vec<u8> = [bytes = "vec", tag = 2],
        /// The greatest version of a name counts.
        version: u64 = [uint64, tag = 3],
        /// End of its life, seconds since the Unix epoch.
        expires: u64 = [uint64, tag = 4],
        /// Value; in `threats` an encoded [`GossipSighting`].
        value: Vec<u8> = [bytes = "vec", tag = 5],
    }

    /// Value of a record of the topic `threats`.
    pub struct GossipSighting {
        /// Kind: `expelled`, `forged-frames`, or one of a later version.
        kind: String = [string, tag = 1],
        /// The node or address that it is about.
        subject: String = [string, tag = 2],
        /// Text for people.
        detail: String = [string, tag = 3],
        /// Time of the sighting, seconds since the Unix epoch.
        seen: u64 = [uint64, tag = 4],
    }

    /// Reconciliation of one bucket with one receiver.
    pub struct GossipSync {
        /// Id of the receiver.
        to: Vec<u8> = [bytes = "vec", tag = 1],
        /// The bucket that `have` lists.
        bucket: u32 = [uint32, tag = 2],
        /// Key (16 bytes), version (8, big-endian) and digest (8) of each record of the sender in the bucket.
        have: Vec<u8> = [bytes = "vec", tag = 3],
        /// Keys (16 bytes each) of records that the sender asks for.
        want: Vec<u8> = [bytes = "vec", tag = 4],
        /// True if `have` is the sender's list, so that an empty one means an empty bucket.
        lists: bool = [bool, tag = 5],
    }
}
