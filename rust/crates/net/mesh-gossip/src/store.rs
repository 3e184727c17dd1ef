//! Signed records that every node keeps: the greatest version of a name counts, all have an end, and all numbers are
//! bounded. Fresh records spread as rumours; digests of buckets find what a node missed.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use mesh_identity::{ExpandedKey, IdentityKey, NodeId};
use mesh_proto::{GossipContent, GossipRecord};
use prost::Message as _;
use sha2::{Digest, Sha256};

use crate::counts::Refusal;

/// Maximum bytes of a record's name.
pub const LONGEST_NAME: usize = 64;
/// Maximum bytes of a record's value.
pub const LONGEST_VALUE: usize = 1024;

/// Buckets that the keys of records are divided among.
pub(crate) const BUCKETS: usize = 32;
/// Bytes of an entry of a bucket's list.
pub(crate) const ENTRY_BYTES: usize = 32;
/// Entries of a bucket's list.
pub(crate) const MOST_LISTED: usize = 128;
/// Records of one topic that one origin may have.
const MOST_OF_ORIGIN: usize = 16;
/// Records of one topic.
const MOST_OF_TOPIC: usize = 512;
/// Longest life that a record may have ahead, seconds: 30 days and a day for wrong clocks.
const LONGEST_LIFE: u64 = 31 * 24 * 3600;
const LONGEST_CONTENT: usize = LONGEST_NAME + LONGEST_VALUE + 64;
const CONTEXT: &[u8] = b"hydramesh-gossip-record-v1";

/// Reasons for not publishing a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A name that is empty or too long.
    #[error("a name has 1 to {LONGEST_NAME} bytes, and this one {0}")]
    Name(usize),
    /// A value that is too long.
    #[error("a value has at most {LONGEST_VALUE} bytes, and this one {0}: publish a digest of it")]
    Value(usize),
    /// Too many records.
    #[error("a node publishes at most {MOST_OF_ORIGIN} records of a topic: let some expire")]
    Full,
}

/// The topic of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Topic {
    Threats,
    Memory,
}

impl Topic {
    fn number(self) -> u32 {
        match self {
            Self::Threats => 1,
            Self::Memory => 2,
        }
    }

    fn of(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Threats),
            2 => Some(Self::Memory),
            _ => None,
        }
    }
}

/// Names a record: a digest of topic, origin and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key(pub(crate) [u8; 16]);

impl Key {
    pub(crate) fn new(topic: Topic, origin: NodeId, name: &[u8]) -> Self {
        let mut hash = Sha256::new();
        hash.update(topic.number().to_be_bytes());
        hash.update(origin.as_bytes());
        hash.update(name);
        Self(first(&hash.finalize()))
    }

    fn bucket(self) -> usize {
        usize::from(self.0[0]) * BUCKETS / 256
    }
}

/// A record that was verified.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) topic: Topic,
    pub(crate) origin: NodeId,
    pub(crate) name: Vec<u8>,
    pub(crate) version: u64,
    pub(crate) expires: u64,
    pub(crate) value: Vec<u8>,
    record: GossipRecord,
    digest: [u8; 16],
    /// Frames that it still goes into as a rumour.
    pushes: u8,
}

impl Entry {
    /// Orders versions of a record; the digest decides among equal ones, the same way everywhere.
    fn rank(&self) -> (u64, [u8; 8]) {
        (self.version, first(&self.digest))
    }
}

/// Outcome of [`Store::insert`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inserted {
    /// It was known, or a newer version is.
    Known,
    /// The first version of its name.
    New(Key),
    /// A newer version.
    Newer(Key),
}

/// The records of a node.
#[derive(Debug, Default)]
pub(crate) struct Store {
    entries: BTreeMap<Key, Entry>,
    /// Digests of the records in `entries`, for a look before any signature is verified.
    known: HashMap<[u8; 16], Key>,
    buckets: [u64; BUCKETS],
}

impl Store {
    /// True if this very record is here. Costs one hash. A rumour that others tell as well is told once less
    /// from here.
    pub(crate) fn hears_again(&mut self, record: &GossipRecord) -> bool {
        let Some(key) = self.known.get(&digest(record)) else {
            return false;
        };
        if let Some(entry) = self.entries.get_mut(key) {
            entry.pushes = entry.pushes.saturating_sub(1);
        }
        true
    }

    /// Takes in a record. The signature is verified before the content is parsed.
    pub(crate) fn insert(
        &mut self,
        mesh: &[u8; 32],
        (node, origin): (NodeId, &ExpandedKey),
        record: GossipRecord,
        pushes: u8,
        unix: u64,
    ) -> Result<Inserted, Refusal> {
        if record.content.len() > LONGEST_CONTENT {
            return Err(Refusal::Length);
        }
        let message = signed_text(mesh, &record);
        if !origin.verifies(CONTEXT, &message, &record.signature) {
            return Err(Refusal::Record);
        }
        let content = GossipContent::decode(&record.content[..]).map_err(|_| Refusal::Malformed)?;
        // A topic of a later version is not kept.
        let topic = Topic::of(content.topic).ok_or(Refusal::Malformed)?;
        if !(1..=LONGEST_NAME).contains(&content.name.len()) || content.value.len() > LONGEST_VALUE
        {
            return Err(Refusal::Malformed);
        }
        if content.expires <= unix || content.expires > unix + LONGEST_LIFE {
            return Err(Refusal::Expired);
        }
        let key = Key::new(topic, node, &content.name);
        let entry = Entry {
            topic,
            origin: node,
            name: content.name,
            version: content.version,
            expires: content.expires,
            value: content.value,
            digest: digest(&record),
            record,
            pushes,
        };
        let old = self.entries.get(&key);
        if old.is_some_and(|old| old.rank() >= entry.rank()) {
            return Ok(Inserted::Known);
        }
        let is_new = old.is_none();
        if is_new && self.is_full(topic, entry.origin) {
            return Err(Refusal::Full);
        }
        self.remove(key);
        self.known.insert(entry.digest, key);
        self.toggle(key, &entry.digest);
        self.entries.insert(key, entry);
        Ok(match is_new {
            true => Inserted::New(key),
            false => Inserted::Newer(key),
        })
    }

    /// A record of this node.
    pub(crate) fn publish(
        &mut self,
        mesh: &[u8; 32],
        key: &IdentityKey,
        (topic, name, value): (Topic, &[u8], Vec<u8>),
        (expires, pushes, unix): (u64, u8, u64),
    ) -> Result<(), StoreError> {
        if !(1..=LONGEST_NAME).contains(&name.len()) {
            return Err(StoreError::Name(name.len()));
        }
        if value.len() > LONGEST_VALUE {
            return Err(StoreError::Value(value.len()));
        }
        let own = key.node_id();
        let old = self.entries.get(&Key::new(topic, own, name));
        // Above what an earlier process published, even if this one has not heard of it yet.
        let version = old.map_or(unix, |old| (old.version + 1).max(unix));
        let content = GossipContent {
            topic: topic.number(),
            name: name.to_vec(),
            version,
            expires: expires.min(unix + LONGEST_LIFE - 24 * 3600),
            value,
        };
        let mut record = GossipRecord {
            origin: own.as_bytes().to_vec(),
            content: content.encode_to_vec(),
            signature: Vec::new(),
        };
        record.signature = key.sign(CONTEXT, &signed_text(mesh, &record));
        let public = key.public().expand();
        let inserted = self.insert(mesh, (own, &public), record, pushes, unix);
        inserted.map(|_| ()).map_err(|_| StoreError::Full)
    }

    fn is_full(&self, topic: Topic, origin: NodeId) -> bool {
        let same = || self.entries.values().filter(|entry| entry.topic == topic);
        same().count() >= MOST_OF_TOPIC
            || same().filter(|entry| entry.origin == origin).count() >= MOST_OF_ORIGIN
    }

    pub(crate) fn get(&self, key: Key) -> Option<&Entry> {
        self.entries.get(&key)
    }

    pub(crate) fn of_topic(&self, topic: Topic) -> impl Iterator<Item = &Entry> {
        self.entries
            .values()
            .filter(move |entry| entry.topic == topic)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Removes the records that expired.
    pub(crate) fn expire(&mut self, unix: u64) {
        self.remove_where(|entry| entry.expires <= unix);
    }

    /// Removes the records of a node.
    pub(crate) fn forget(&mut self, origin: NodeId) {
        self.remove_where(|entry| entry.origin == origin);
    }

    fn remove_where(&mut self, unwanted: impl Fn(&Entry) -> bool) {
        let all = self.entries.iter().filter(|(_, entry)| unwanted(entry));
        let keys: Vec<Key> = all.map(|(key, _)| *key).collect();
        for key in keys {
            self.remove(key);
        }
    }

    fn remove(&mut self, key: Key) {
        if let Some(old) = self.entries.remove(&key) {
            self.known.remove(&old.digest);
            self.toggle(key, &old.digest);
        }
    }

    fn toggle(&mut self, key: Key, digest: &[u8; 16]) {
        self.buckets[key.bucket()] ^= u64::from_be_bytes(first(digest));
    }

    /// True if a rumour is to be told.
    pub(crate) fn has_rumours(&self) -> bool {
        self.entries.values().any(|entry| entry.pushes > 0)
    }

    /// The next rumours to tell, each of which counts as told once more.
    pub(crate) fn take_rumours(&mut self, most: usize) -> Vec<Key> {
        let mut hot: Vec<(&Key, &mut Entry)> = self
            .entries
            .iter_mut()
            .filter(|(_, entry)| entry.pushes > 0)
            .collect();
        // The ones told least often first.
        hot.sort_by_key(|(_, entry)| std::cmp::Reverse(entry.pushes));
        let told = hot.into_iter().take(most).map(|(key, entry)| {
            entry.pushes -= 1;
            *key
        });
        told.collect()
    }

    pub(crate) fn record(&self, key: Key) -> Option<GossipRecord> {
        self.entries.get(&key).map(|entry| entry.record.clone())
    }

    /// The digests of all buckets, as they travel.
    pub(crate) fn digests(&self) -> Vec<u8> {
        self.buckets
            .iter()
            .flat_map(|sum| sum.to_be_bytes())
            .collect()
    }

    /// A digest of all records, to compare nodes with each other.
    pub(crate) fn digest(&self) -> u64 {
        u64::from_be_bytes(first(&Sha256::digest(self.digests())))
    }

    /// Buckets whose digests differ from those of a peer.
    pub(crate) fn differing(&self, digests: &[u8]) -> Vec<usize> {
        let (theirs, _) = digests.as_chunks::<8>();
        let pairs = self.buckets.iter().zip(theirs).enumerate();
        let differing = pairs.filter(|(_, (own, theirs))| own.to_be_bytes() != **theirs);
        differing.map(|(bucket, _)| bucket).collect()
    }

    /// The list of a bucket, as it travels.
    pub(crate) fn list(&self, bucket: usize) -> Vec<u8> {
        let mut list = Vec::new();
        for (key, entry) in self.in_bucket(bucket).take(MOST_LISTED) {
            let (version, digest) = entry.rank();
            list.extend_from_slice(&key.0);
            list.extend_from_slice(&version.to_be_bytes());
            list.extend_from_slice(&digest);
        }
        list
    }

    /// Compares a bucket with a peer's list of it: the records to send and those to ask for.
    pub(crate) fn compare(&self, bucket: usize, list: &[u8]) -> (Vec<Key>, Vec<Key>) {
        let (chunks, _) = list.as_chunks::<ENTRY_BYTES>();
        let mut listed = BTreeSet::new();
        let (mut send, mut ask) = (Vec::new(), Vec::new());
        for chunk in chunks.iter().take(MOST_LISTED) {
            let key = Key(first(chunk));
            let version = u64::from_be_bytes(first(&chunk[16..]));
            let theirs = (version, first::<8>(&chunk[24..]));
            listed.insert(key);
            match self.entries.get(&key).map(Entry::rank) {
                Some(own) if own > theirs => send.push(key),
                Some(own) if own == theirs => {}
                _ => ask.push(key),
            }
        }
        let unlisted = self.in_bucket(bucket).map(|(key, _)| *key);
        send.extend(unlisted.filter(|key| !listed.contains(key)));
        (send, ask)
    }

    fn in_bucket(&self, bucket: usize) -> impl Iterator<Item = (&Key, &Entry)> {
        self.entries
            .iter()
            .filter(move |(key, _)| key.bucket() == bucket)
    }
}

fn signed_text(mesh: &[u8; 32], record: &GossipRecord) -> Vec<u8> {
    // The origin has 32 bytes, or its key would not have been found.
    [&mesh[..], &record.origin, &record.content].concat()
}

fn digest(record: &GossipRecord) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update(&record.origin);
    hash.update(&record.content);
    first(&hash.finalize())
}

fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
    *bytes.first_chunk().expect("longer than the part")
}
