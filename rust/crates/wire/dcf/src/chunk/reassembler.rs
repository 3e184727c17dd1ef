//! Reassembly of Chunks within memory and time limits.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use bytes::Bytes;
use md5::{Digest, Md5};

use super::{Chunk, ChunkError};

/// Memory and time limits of a [`Reassembler`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of unfinished payloads.
    pub max_messages: usize,
    /// Maximum length of one payload, in bytes.
    pub max_payload: usize,
    /// Maximum memory for all unfinished payloads together, in bytes, bookkeeping included.
    pub max_bytes: usize,
    /// Maximum time from the first Chunk of a payload to its last.
    pub timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_messages: 256,
            max_payload: 16 << 20,
            max_bytes: 64 << 20,
            timeout: Duration::from_secs(10),
        }
    }
}

/// Collects Chunks of many messages at once, each named by a key (usually source address and sequence).
///
/// Memory follows the data that has arrived, never what a Chunk announces. When a limit is reached, the
/// payload that has gone longest without a new Chunk is evicted. With [`Reassembler::by_source`] the victim
/// is a payload of the source that holds the most bytes, and no source holds more than its share, so that a
/// sender of endless Chunks disturbs only itself.
///
/// A Chunk that arrives after its payload was completed begins a new payload, which then times out. Callers
/// that need to detect repeats do so by the key.
#[derive(Debug)]
pub struct Reassembler<K> {
    limits: Limits,
    /// Bytes that may be held now; [`Limits::max_bytes`] or less.
    room: usize,
    share: Share,
    /// The source of each payload.
    of: fn(&K) -> IpAddr,
    pending: HashMap<K, PartialMessage>,
    bytes: usize,
    evicted: u64,
}

/// Bounds on the unfinished payloads of one source in a [`Reassembler`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Maximum number of unfinished payloads.
    pub messages: usize,
    /// Maximum memory in bytes, bookkeeping included.
    pub bytes: usize,
}

impl Limits {
    /// Half of everything: one source cannot keep all others out.
    #[must_use]
    pub const fn half(&self) -> Share {
        Share {
            messages: self.max_messages.div_ceil(2),
            bytes: self.max_bytes / 2,
        }
    }
}

impl<K: Hash + Eq + Clone> Reassembler<K> {
    /// An empty one that takes all payloads as those of one source.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        let all = Share {
            messages: limits.max_messages,
            bytes: limits.max_bytes,
        };
        Self::by_source(limits, all, |_| Ipv6Addr::UNSPECIFIED.into())
    }

    /// An empty reassembler in which each source has at most `share`; `of` returns the source of a key's
    /// payload. Addresses of one IPv6 /64 are one source.
    #[must_use]
    pub fn by_source(limits: Limits, share: Share, of: fn(&K) -> IpAddr) -> Self {
        Self {
            limits,
            room: limits.max_bytes,
            share,
            of,
            pending: HashMap::new(),
            bytes: 0,
            evicted: 0,
        }
    }

    /// Holds at most `bytes` from now on, where something else wants the memory: [`Limits::max_bytes`] or less. What is over it is
    /// dropped as when a limit is reached.
    pub fn set_room(&mut self, bytes: usize) {
        self.room = bytes.min(self.limits.max_bytes);
        while self.bytes > self.room && self.evict(None, self.largest_source(None)) {}
    }

    /// Takes one Chunk; returns the whole payload if it was the last one missing.
    ///
    /// # Errors
    /// - [`ChunkError::Conflict`] if the Chunk belongs to another payload than the key's earlier ones, which stay;
    /// - [`ChunkError::TooLarge`] if the payload outgrows a limit: it is dropped;
    /// - [`ChunkError::NoRoom`] if it outgrows the [room](Self::set_room) that there is now, or its source holds more than any other
    ///   and this is all that it has: it is dropped;
    /// - [`ChunkError::Corrupt`] if the last Chunk came and the MD5 does not agree: it is dropped.
    pub fn push(
        &mut self,
        key: K,
        chunk: &Chunk,
        now: Instant,
    ) -> Result<Option<Bytes>, ChunkError> {
        self.expire(now);
        if let Some(pending) = self.pending.get(&key) {
            if (pending.total, pending.md5) != (chunk.total, chunk.md5) {
                return Err(ChunkError::Conflict);
            }
            if pending.pieces.contains_key(&chunk.index) {
                return Ok(None);
            }
        }

        let pending = self.pending.get(&key);
        let len = pending.map_or(0, |pending| pending.payload_len) + chunk.data.len();
        let cost = PIECE_OVERHEAD + chunk.data.len();
        let own_bytes = pending.map_or(0, PartialMessage::bytes) + cost;
        let max_bytes = self.share.bytes.min(self.limits.max_bytes);
        if len > self.limits.max_payload
            || own_bytes > max_bytes
            || self.limits.max_messages.min(self.share.messages) == 0
        {
            self.forget(&key);
            let limit = self.limits.max_payload.min(max_bytes);
            return Err(ChunkError::TooLarge { len, limit });
        }
        if own_bytes > self.room || !self.make_room(&key, cost) {
            self.forget(&key);
            return Err(ChunkError::NoRoom);
        }

        let deadline = now + self.limits.timeout;
        let pending = self.pending.entry(key.clone());
        let pending = pending.or_insert_with(|| PartialMessage::new(chunk, now, deadline));
        let data = chunk.data.as_ref().into();
        pending.pieces.insert(chunk.index, data);
        pending.payload_len += chunk.data.len();
        pending.touched = now;
        self.bytes += cost;
        if pending.pieces.len() < usize::from(pending.total) {
            return Ok(None);
        }
        let pending = self.forget(&key).expect("the entry was just filled");
        pending.join().map(Some)
    }

    /// Drops payloads whose time is over and returns how many there were.
    pub fn expire(&mut self, now: Instant) -> usize {
        if self.pending.values().all(|pending| now < pending.deadline) {
            return 0;
        }
        let before = self.pending.len();
        self.pending.retain(|_, pending| now < pending.deadline);
        self.bytes = self.pending.values().map(PartialMessage::bytes).sum();
        before - self.pending.len()
    }

    /// Drops one payload, for instance because its sender is gone.
    pub fn remove(&mut self, key: &K) -> bool {
        self.forget(key).is_some()
    }

    /// Time of the next expiry for [`Reassembler::expire`]; `None` without unfinished payloads.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.pending.values().map(|pending| pending.deadline).min()
    }

    /// Number of unfinished payloads.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pending.len()
    }

    /// True if there are no unfinished payloads.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Bytes held, bookkeeping included; never more than [`Limits::max_bytes`].
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Unfinished payloads that had to make room for others since the start.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// False if others would have to give way that hold less.
    fn make_room(&mut self, key: &K, cost: usize) -> bool {
        let is_new = !self.pending.contains_key(key);
        let source = self.source_of(key);
        let is_over_share = |this: &Self| {
            let (messages, bytes) = this.held_by(source);
            bytes + cost > this.share.bytes || (is_new && messages >= this.share.messages)
        };
        while is_over_share(self) && self.evict(Some(key), Some(source)) {}
        while self.bytes + cost > self.room
            || (is_new && self.pending.len() >= self.limits.max_messages)
        {
            if !self.evict(Some(key), self.largest_source(Some((key, cost)))) {
                return false;
            }
        }
        true
    }

    /// Drops the stalest payload of a source but that of `key`; false if no payload is left.
    fn evict(&mut self, key: Option<&K>, source: Option<IpAddr>) -> bool {
        let others = self.pending.iter();
        let others = others
            .filter(|(other, _)| Some(*other) != key && Some(self.source_of(other)) == source);
        let stalest = others.min_by_key(|(_, pending)| pending.touched);
        let Some(stalest) = stalest.map(|(other, _)| other.clone()) else {
            return false;
        };
        self.forget(&stalest);
        self.evicted += 1;
        true
    }

    fn source_of(&self, key: &K) -> IpAddr {
        network_of((self.of)(key))
    }

    /// The source that holds the most bytes; that of `growing`, a payload with the bytes that it grows by, only if it holds more than
    /// any other.
    fn largest_source(&self, growing: Option<(&K, usize)>) -> Option<IpAddr> {
        let mut held: HashMap<IpAddr, usize> = HashMap::new();
        for (key, pending) in &self.pending {
            *held.entry(self.source_of(key)).or_default() += pending.bytes();
        }
        let own = growing.map(|(key, cost)| (self.source_of(key), cost));
        if let Some((own, cost)) = own {
            *held.entry(own).or_default() += cost;
        }
        let is_other = |source| own.is_none_or(|(own, _)| own != source);
        let largest = held
            .into_iter()
            .max_by_key(|&(source, bytes)| (bytes, is_other(source)));
        largest.map(|(source, _)| source)
    }

    /// Number and bytes of a source's payloads.
    fn held_by(&self, source: IpAddr) -> (usize, usize) {
        let all = self.pending.iter();
        let held = all.filter(|(key, _)| self.source_of(key) == source);
        held.fold((0, 0), |(messages, bytes), (_, pending)| {
            (messages + 1, bytes + pending.bytes())
        })
    }

    fn forget(&mut self, key: &K) -> Option<PartialMessage> {
        let pending = self.pending.remove(key)?;
        self.bytes -= pending.bytes();
        Some(pending)
    }
}

/// The Chunks of one payload so far.
#[derive(Debug)]
struct PartialMessage {
    total: u16,
    md5: [u8; 16],
    /// Copies: a view would keep the receiver's whole buffer alive, which no limit counts.
    pieces: BTreeMap<u16, Box<[u8]>>,
    payload_len: usize,
    touched: Instant,
    deadline: Instant,
}

impl PartialMessage {
    fn new(first: &Chunk, now: Instant, deadline: Instant) -> Self {
        Self {
            total: first.total,
            md5: first.md5,
            pieces: BTreeMap::new(),
            payload_len: 0,
            touched: now,
            deadline,
        }
    }

    fn bytes(&self) -> usize {
        self.payload_len + self.pieces.len() * PIECE_OVERHEAD
    }

    fn join(self) -> Result<Bytes, ChunkError> {
        let mut payload = Vec::with_capacity(self.payload_len);
        for piece in self.pieces.into_values() {
            payload.extend_from_slice(&piece);
        }
        if Md5::digest(&payload)[..] != self.md5 {
            return Err(ChunkError::Corrupt { total: self.total });
        }
        Ok(payload.into())
    }
}

/// The network whose addresses count as one source: an IPv6 host usually has a whole /64 to itself.
fn network_of(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Memory of a piece beyond its data: map entry and allocator overhead, rounded up.
const PIECE_OVERHEAD: usize = 64;
