//! Puts Chunks together again, within bounds.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    time::{Duration, Instant},
};

use bytes::Bytes;
use md5::{Digest, Md5};

use super::{Chunk, ChunkError};

/// What a [`Reassembler`] may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Unfinished payloads at once.
    pub max_messages: usize,
    /// Bytes of one payload.
    pub max_payload: usize,
    /// Bytes held for all unfinished payloads together, bookkeeping included.
    pub max_bytes: usize,
    /// How long a payload may take from its first Chunk to its last.
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
/// Memory follows what has arrived, never what a Chunk announces. When a limit is reached, the payload that has gone
/// longest without a new Chunk makes room: what still moves is worth more than what has stalled.
///
/// A Chunk that comes after its payload was completed begins a new one, which then times out; whoever needs to tell
/// repeats apart does so by the key.
#[derive(Debug)]
pub struct Reassembler<K> {
    limits: Limits,
    pending: HashMap<K, Pending>,
    bytes: usize,
    evicted: u64,
}

impl<K: Hash + Eq + Clone> Reassembler<K> {
    /// An empty one.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            pending: HashMap::new(),
            bytes: 0,
            evicted: 0,
        }
    }

    /// Takes one Chunk; returns the whole payload if it was the last one missing.
    ///
    /// # Errors
    /// - [`ChunkError::Conflict`] if the Chunk belongs to another payload than the key's earlier ones, which stay;
    /// - [`ChunkError::TooLarge`] if the payload outgrows a limit: it is dropped;
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

        let payload_len = self
            .pending
            .get(&key)
            .map_or(0, |pending| pending.payload_len)
            + chunk.data.len();
        let cost = PIECE_OVERHEAD + chunk.data.len();
        let own_bytes = self.pending.get(&key).map_or(0, Pending::bytes) + cost;
        let limit = self.limits.max_payload.min(self.limits.max_bytes);
        if payload_len > self.limits.max_payload
            || own_bytes > self.limits.max_bytes
            || self.limits.max_messages == 0
        {
            self.forget(&key);
            return Err(ChunkError::TooLarge {
                len: payload_len,
                limit,
            });
        }
        self.make_room(&key, cost);

        let timeout = self.limits.timeout;
        let pending = self
            .pending
            .entry(key.clone())
            .or_insert_with(|| Pending::new(chunk, now, timeout));
        pending
            .pieces
            .insert(chunk.index, chunk.data.as_ref().into());
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
        self.bytes = self.pending.values().map(Pending::bytes).sum();
        before - self.pending.len()
    }

    /// Drops one payload, for instance because its sender is gone.
    pub fn remove(&mut self, key: &K) -> bool {
        self.forget(key).is_some()
    }

    /// When [`Reassembler::expire`] next has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.pending.values().map(|pending| pending.deadline).min()
    }

    /// Unfinished payloads.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pending.len()
    }

    /// Whether nothing is unfinished.
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

    fn make_room(&mut self, key: &K, cost: usize) {
        let is_new = !self.pending.contains_key(key);
        while self.bytes + cost > self.limits.max_bytes
            || (is_new && self.pending.len() >= self.limits.max_messages)
        {
            let stalest = self
                .pending
                .iter()
                .filter(|(other, _)| *other != key)
                .min_by_key(|(_, pending)| pending.touched);
            let Some(stalest) = stalest.map(|(other, _)| other.clone()) else {
                return;
            };
            self.forget(&stalest);
            self.evicted += 1;
        }
    }

    fn forget(&mut self, key: &K) -> Option<Pending> {
        let pending = self.pending.remove(key)?;
        self.bytes -= pending.bytes();
        Some(pending)
    }
}

/// The Chunks of one payload so far.
#[derive(Debug)]
struct Pending {
    total: u16,
    md5: [u8; 16],
    /// Copies: a view would keep the receiver's whole buffer alive, which no limit counts.
    pieces: BTreeMap<u16, Box<[u8]>>,
    payload_len: usize,
    touched: Instant,
    deadline: Instant,
}

impl Pending {
    fn new(first: &Chunk, now: Instant, timeout: Duration) -> Self {
        Self {
            total: first.total,
            md5: first.md5,
            pieces: BTreeMap::new(),
            payload_len: 0,
            touched: now,
            deadline: now + timeout,
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

/// What one piece costs beyond its data: its place in the map and the allocator's share, rounded up.
const PIECE_OVERHEAD: usize = 64;
