//! The trail as a state machine: records in, entries, tiles and checkpoints out. Nothing here reads a clock
//! or a file.

use std::sync::Arc;

use crate::chain::{ChainKey, Mac, first_link};
use crate::keys::TrailKeys;
use crate::merkle::{Edge, Hash, Tile, leaf_hash};
use crate::note::Checkpoint;
use crate::record::{self, Event};

/// The growing end of a trail.
#[derive(Debug)]
pub struct Trail {
    origin: String,
    keys: Arc<TrailKeys>,
    chain: ChainKey,
    last: Mac,
    edge: Edge,
    full: Vec<Tile>,
}

/// An entry that is made but not part of the trail yet.
#[derive(Debug)]
pub struct Prepared {
    /// The entry as it is stored and hashed.
    pub entry: Vec<u8>,
    mac: Mac,
    leaf: Hash,
}

impl Prepared {
    /// An entry that is stored already, with its code.
    pub(crate) fn stored(entry: Vec<u8>, mac: Mac) -> Self {
        Self {
            leaf: leaf_hash(&entry),
            entry,
            mac,
        }
    }
}

impl Trail {
    /// An empty trail.
    pub fn new(origin: &str, keys: Arc<TrailKeys>, chain: ChainKey) -> Self {
        Self::resume(origin, keys, chain, first_link(origin), Edge::default())
    }

    /// A trail that goes on behind the code `last`, with this edge.
    pub fn resume(
        origin: &str,
        keys: Arc<TrailKeys>,
        chain: ChainKey,
        last: Mac,
        edge: Edge,
    ) -> Self {
        Self {
            origin: origin.to_owned(),
            keys,
            chain,
            last,
            edge,
            full: Vec::new(),
        }
    }

    /// Name of the trail.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Number of records.
    pub fn size(&self) -> u64 {
        self.edge.size()
    }

    /// The present epoch.
    pub fn epoch(&self) -> u64 {
        self.chain.epoch()
    }

    /// Key of the present epoch.
    pub fn chain(&self) -> &ChainKey {
        &self.chain
    }

    /// Code of the last record.
    pub fn last(&self) -> &Mac {
        &self.last
    }

    /// The right edge of the tree.
    pub fn edge(&self) -> &Edge {
        &self.edge
    }

    /// Makes the entry of the next record, at this time in milliseconds since the Unix epoch. It is part of
    /// the trail once it is [committed](Self::commit); until then the trail has not changed.
    pub fn prepare(&self, event: &Event, at: u64) -> Prepared {
        let text = record::text(self.size(), at, self.epoch(), event);
        let mac = self.chain.mac(&self.last, &text);
        Prepared::stored(record::entry(text, &mac), mac)
    }

    /// Makes an entry part of the trail, and returns it.
    pub fn commit(&mut self, prepared: Prepared) -> Vec<u8> {
        self.edge.push(prepared.leaf, &mut self.full);
        self.last = prepared.mac;
        prepared.entry
    }

    /// The tiles that were completed since this trail was made, or since they were
    /// [forgotten](Self::forget_full_tiles).
    pub fn full_tiles(&self) -> &[Tile] {
        &self.full
    }

    /// Forgets the completed tiles: they are stored.
    pub fn forget_full_tiles(&mut self) {
        self.full.clear();
    }

    /// The head of the trail.
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            origin: self.origin.clone(),
            size: self.size(),
            root: self.edge.root(),
        }
    }

    /// The checkpoint of all records so far, signed at this time in seconds since the Unix epoch: one
    /// ML-DSA-44 signature over a root that contains every entry.
    pub fn signed_checkpoint(&self, seconds: u64) -> String {
        let checkpoint = self.checkpoint();
        let line = checkpoint.cosign(&self.origin, &self.keys, seconds);
        checkpoint.note(&[line])
    }

    /// The checkpoint at the end of an epoch, with the SLH-DSA signature, too.
    pub fn signed_epoch(&self, seconds: u64) -> String {
        let checkpoint = self.checkpoint();
        let lines = [
            checkpoint.cosign(&self.origin, &self.keys, seconds),
            checkpoint.sign_epoch(&self.origin, &self.keys),
        ];
        checkpoint.note(&lines)
    }

    /// Begins an epoch with this key, and forgets the key before.
    pub fn begin_epoch(&mut self, chain: ChainKey) {
        self.chain = chain;
    }
}
