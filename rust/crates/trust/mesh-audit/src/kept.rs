//! Roots of epochs as other nodes keep them: a head shows them to its mesh, and cannot show another past
//! later.
//!
//! A head publishes the latest roots of each trail ([`ShownEpochs`]) in signed records. Every node keeps
//! those that it was shown ([`Kept`]) and compares what comes later with them. [`Keeper`] holds them in a
//! file.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use mesh_base::files;
use serde::{Deserialize, Serialize};

use crate::merkle::Hash;
use crate::note::Checkpoint;
use crate::tier::Tier;
use crate::tiles::{named, read};

/// The end of an epoch of a trail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochRoot {
    /// Number of the epoch.
    pub epoch: u64,
    /// Records until its end.
    pub size: u64,
    /// Root over them.
    #[serde(with = "base64")]
    pub root: Hash,
    /// SHA-256 of the checkpoint with both signatures, as the trail's folder has it in `epoch`.
    #[serde(with = "base64")]
    pub note: Hash,
}

/// The latest epochs of a trail, as its head shows them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownEpochs {
    /// The tier.
    pub tier: Tier,
    /// Name of the trail.
    pub trail: String,
    /// Epochs with rising numbers and sizes.
    pub epochs: Vec<EpochRoot>,
}

impl ShownEpochs {
    /// Name of the record that a head publishes.
    pub fn record_name(&self) -> String {
        record_name(self.tier)
    }

    /// Value of that record: JSON of less than 1,024 bytes.
    pub fn to_value(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("texts and numbers are JSON")
    }

    /// Reads a record of a head; `None` if it is about something else, or malformed.
    pub fn read(name: &[u8], value: &[u8]) -> Option<Self> {
        let shown: Self = serde_json::from_slice(value).ok()?;
        let mut pairs = shown.epochs.windows(2);
        let rises = pairs.all(|pair| pair[0].epoch < pair[1].epoch && pair[0].size < pair[1].size);
        let fits = shown.trail.len() <= LONGEST_NAME && shown.epochs.len() <= MOST_SHOWN;
        (rises && fits && shown.record_name().as_bytes() == name).then_some(shown)
    }
}

fn record_name(tier: Tier) -> String {
    format!("audit-epochs/{tier}")
}

/// A head shows something that contradicts what it showed before.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Contradiction {
    /// Another root, size or signature of an epoch.
    Rewritten {
        /// The tier.
        tier: Tier,
        /// The epoch.
        epoch: u64,
    },
    /// Its last epoch is before one that was shown.
    CutOff {
        /// The tier.
        tier: Tier,
        /// The last epoch that it shows.
        shown: u64,
        /// The last one that was kept.
        kept: u64,
    },
    /// A trail of another name.
    Replaced {
        /// The tier.
        tier: Tier,
        /// Name of the trail that was kept.
        kept: String,
    },
}

impl Contradiction {
    /// Kind of the sighting that reports it.
    pub const KIND: &'static str = "audit-rewritten";
}

impl fmt::Display for Contradiction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rewritten { tier, epoch } => {
                write!(
                    f,
                    "audit trail {tier}: epoch {epoch} is not the one that was shown before"
                )
            }
            Self::CutOff { tier, shown, kept } => {
                write!(
                    f,
                    "audit trail {tier}: it ends with epoch {shown}, and epoch {kept} was shown before"
                )
            }
            Self::Replaced { tier, kept } => {
                write!(
                    f,
                    "audit trail {tier}: it was begun anew; before it was {kept}"
                )
            }
        }
    }
}

/// The epochs that a node was shown.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    heads: Vec<KeptTier>,
}

/// The trails of a tier that a head has shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KeptTier {
    /// Id of the head.
    head: String,
    tier: Tier,
    /// Version of the latest record.
    version: u64,
    trails: Vec<KeptTrail>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KeptTrail {
    name: String,
    epochs: BTreeMap<u64, EpochRoot>,
}

impl Kept {
    /// Takes in epochs that a head shows in a record of this version. Returns what contradicts those that are
    /// kept, which stay as they are.
    pub fn take(&mut self, head: &str, version: u64, shown: &ShownEpochs) -> Vec<Contradiction> {
        let tier = shown.tier;
        let kept = self.of(head, tier);
        let is_newer = version > kept.version;
        kept.version = kept.version.max(version);
        let mut found = Vec::new();
        let known = kept.trails.iter().any(|trail| trail.name == shown.trail);
        if !known {
            // An old record may come late.
            if !is_newer {
                return found;
            }
            if let Some(before) = kept.trails.last() {
                let kept = before.name.clone();
                found.push(Contradiction::Replaced { tier, kept });
            }
            if kept.trails.len() >= MOST_TRAILS {
                // The first one stays, and the latest ones.
                kept.trails.remove(1);
            }
            kept.trails.push(KeptTrail {
                name: shown.trail.clone(),
                epochs: BTreeMap::new(),
            });
        }
        let mut trails = kept.trails.iter_mut();
        let trail = trails.find(|trail| trail.name == shown.trail);
        let trail = trail.expect("it is there, or was added above");
        let last_kept = trail.epochs.keys().next_back().copied();
        for epoch in &shown.epochs {
            if !trail.take(epoch) {
                let epoch = epoch.epoch;
                found.push(Contradiction::Rewritten { tier, epoch });
            }
        }
        let last_shown = shown.epochs.last().map(|last| last.epoch);
        if let (Some(shown), Some(kept), true) = (last_shown, last_kept, is_newer)
            && shown < kept
        {
            found.push(Contradiction::CutOff { tier, shown, kept });
        }
        found
    }

    fn of(&mut self, head: &str, tier: Tier) -> &mut KeptTier {
        let is_it = |kept: &KeptTier| kept.head == head && kept.tier == tier;
        let index = self.heads.iter().position(is_it).unwrap_or_else(|| {
            if self.heads.len() >= MOST_HEADS {
                let oldest = (0..self.heads.len()).min_by_key(|&index| self.heads[index].version);
                self.heads.remove(oldest.expect("there are some"));
            }
            self.heads.push(KeptTier {
                head: head.to_owned(),
                tier,
                version: 0,
                trails: Vec::new(),
            });
            self.heads.len() - 1
        });
        &mut self.heads[index]
    }

    /// The epochs that are kept of a trail.
    pub fn epochs_of(&self, trail: &str) -> Vec<EpochRoot> {
        let trails = self.heads.iter().flat_map(|kept| &kept.trails);
        let trails = trails.filter(|kept| kept.name == trail);
        trails
            .flat_map(|kept| kept.epochs.values().cloned())
            .collect()
    }

    /// Names of the trails of a tier, with the ids of their heads.
    pub fn trails_of(&self, tier: &str) -> Vec<(&str, &str)> {
        let heads = self.heads.iter().filter(|kept| kept.tier.as_str() == tier);
        let trails = heads.flat_map(|kept| {
            let trails = kept.trails.iter();
            trails.map(|trail| (trail.name.as_str(), kept.head.as_str()))
        });
        trails.collect()
    }

    /// Reads a file of a [`Keeper`], or the one in a node's state directory. An empty one if the directory
    /// has none.
    ///
    /// # Errors
    /// If it cannot be read, or does not hold epochs.
    pub fn read(path: &Path) -> io::Result<Self> {
        let file = match path.is_dir() {
            true => path.join(FILE),
            false => path.to_owned(),
        };
        let Some(text) = read(&file, LONGEST_FILE)? else {
            if path.is_dir() {
                return Ok(Self::default());
            }
            return Err(named(&file, "read", &io::ErrorKind::NotFound.into()));
        };
        let kept = serde_json::from_slice(&text);
        kept.map_err(|error| named(&file, "read", &error.into()))
    }
}

impl KeptTrail {
    /// Keeps an epoch; false if it contradicts one that is kept.
    fn take(&mut self, epoch: &EpochRoot) -> bool {
        if let Some(kept) = self.epochs.get(&epoch.epoch) {
            return kept == epoch;
        }
        let before = self.epochs.range(..epoch.epoch).next_back();
        let after = self.epochs.range(epoch.epoch..).next();
        if before.is_some_and(|(_, kept)| kept.size >= epoch.size)
            || after.is_some_and(|(_, kept)| kept.size <= epoch.size)
        {
            return false;
        }
        self.epochs.insert(epoch.epoch, epoch.clone());
        if self.epochs.len() > MOST_EPOCHS {
            // Every second one of the older half goes. The first one stays: a root covers all that came
            // before.
            let older = self.epochs.keys().copied().take(MOST_EPOCHS / 2);
            let doomed: Vec<u64> = older.skip(1).step_by(2).collect();
            doomed.iter().for_each(|epoch| {
                self.epochs.remove(epoch);
            });
        }
        true
    }
}

impl EpochRoot {
    /// The checkpoint of this epoch of a trail.
    pub fn checkpoint(&self, trail: &str) -> Checkpoint {
        Checkpoint {
            origin: trail.to_owned(),
            size: self.size,
            root: self.root,
        }
    }
}

/// The epochs that this node keeps, in its state directory.
#[derive(Debug)]
pub struct Keeper {
    kept: Kept,
    path: PathBuf,
    is_saved: bool,
}

impl Keeper {
    /// Reads what was kept before. A file that cannot be read is put aside.
    pub fn open(state_dir: &Path) -> Self {
        let path = state_dir.join(FILE);
        let kept = Kept::read(state_dir).unwrap_or_else(|error| {
            let aside = path.with_extension("damaged");
            tracing::error!(%error, aside = %aside.display(), "the kept epochs of heads' audit trails are put aside");
            if let Err(error) = fs::rename(&path, &aside) {
                tracing::error!(%error, path = %path.display(), "it cannot be renamed");
            }
            Kept::default()
        });
        Self {
            kept,
            path,
            is_saved: true,
        }
    }

    /// Takes in a record of a head, if it is about epochs.
    pub fn take(
        &mut self,
        head: &str,
        version: u64,
        (name, value): (&[u8], &[u8]),
    ) -> Vec<Contradiction> {
        let Some(shown) = ShownEpochs::read(name, value) else {
            return Vec::new();
        };
        let before = self.kept.clone();
        let found = self.kept.take(head, version, &shown);
        self.is_saved &= self.kept == before;
        found
    }

    /// What is to be written, if something is new since the last call.
    pub fn unsaved(&mut self) -> Option<Unsaved> {
        (!std::mem::replace(&mut self.is_saved, true)).then(|| Unsaved {
            path: self.path.clone(),
            text: serde_json::to_vec(&self.kept).expect("texts and numbers are JSON"),
        })
    }
}

/// Epochs to be written, where waiting for the disk disturbs nobody.
#[derive(Debug)]
pub struct Unsaved {
    path: PathBuf,
    text: Vec<u8>,
}

impl Unsaved {
    /// Writes them; a failure is logged. They are shown again, or come again after a restart.
    pub fn write(self) {
        if let Err(error) = files::replace(&self.path, &self.text, files::PUBLIC) {
            let path = self.path.display();
            tracing::warn!(%error, %path, "epochs of heads' audit trails are not kept");
        }
    }
}

/// A hash as text.
mod base64 {
    use data_encoding::BASE64;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    use crate::merkle::Hash;

    pub(super) fn serialize<S: Serializer>(hash: &Hash, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(hash))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Hash, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = BASE64.decode(text.as_bytes()).map_err(Error::custom)?;
        Hash::try_from(bytes).map_err(|_| Error::custom("a hash has 32 bytes"))
    }
}

/// Name of the file in a node's state directory.
pub const FILE: &str = "audit-epochs.json";
/// Epochs that a head shows of a trail.
pub const SHOWN: usize = 4;
/// Epochs that are taken from one record.
const MOST_SHOWN: usize = 16;
/// Epochs that are kept of a trail, trails of a tier, and pairs of head and tier.
const MOST_EPOCHS: usize = 128;
const MOST_TRAILS: usize = 4;
const MOST_HEADS: usize = 24;
const LONGEST_NAME: usize = 255;
const LONGEST_FILE: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(trail: &str, epochs: impl IntoIterator<Item = (u64, u64, u8)>) -> ShownEpochs {
        let epochs = epochs.into_iter().map(|(epoch, size, root)| EpochRoot {
            epoch,
            size,
            root: [root; 32],
            note: [root; 32],
        });
        ShownEpochs {
            tier: Tier::Master,
            trail: trail.to_owned(),
            epochs: epochs.collect(),
        }
    }

    const TIER: Tier = Tier::Master;

    #[test]
    fn another_past_of_a_trail_is_noticed_and_an_old_record_is_not() {
        let mut kept = Kept::default();
        assert_eq!(kept.take("a", 10, &shown("t", [(0, 5, 1), (1, 9, 2)])), []);
        assert_eq!(kept.take("a", 11, &shown("t", [(1, 9, 2), (2, 12, 3)])), []);
        let rewritten = |epoch| [Contradiction::Rewritten { tier: TIER, epoch }];
        assert_eq!(kept.take("a", 12, &shown("t", [(2, 12, 9)])), rewritten(2));
        assert_eq!(kept.take("a", 13, &shown("t", [(2, 11, 3)])), rewritten(2));
        assert_eq!(kept.take("a", 14, &shown("t", [(3, 12, 4)])), rewritten(3));
        assert_eq!(kept.epochs_of("t").len(), 3, "those that were kept stay");
        let cut = Contradiction::CutOff {
            tier: TIER,
            shown: 1,
            kept: 2,
        };
        assert_eq!(kept.take("a", 15, &shown("t", [(1, 9, 2)])), [cut]);
        // The same in a record that is older than the last one tells nothing.
        assert_eq!(kept.take("a", 10, &shown("t", [(1, 9, 2)])), []);
        assert_eq!(kept.take("a", 9, &shown("former", [(7, 99, 2)])), []);
        let replaced = Contradiction::Replaced {
            tier: TIER,
            kept: "t".to_owned(),
        };
        assert_eq!(kept.take("a", 16, &shown("new", [(0, 3, 1)])), [replaced]);
        assert_eq!(kept.take("a", 17, &shown("new", [(0, 3, 1)])), []);
        assert_eq!(kept.trails_of("master"), [("t", "a"), ("new", "a")]);
        assert_eq!(kept.take("b", 1, &shown("other", [(0, 3, 1)])), []);
    }

    #[test]
    fn what_is_kept_is_bounded_and_still_covers_the_whole_past() {
        let mut kept = Kept::default();
        for epoch in 0..5000 {
            let next = shown("t", [(epoch, epoch + 1, 1)]);
            assert_eq!(kept.take("a", epoch + 1, &next), []);
        }
        let epochs = kept.epochs_of("t");
        assert!(epochs.len() <= MOST_EPOCHS, "{}", epochs.len());
        assert_eq!((epochs[0].epoch, epochs.last().unwrap().epoch), (0, 4999));
        let old = epochs[2].epoch;
        let changed = kept.take("a", 6000, &shown("t", [(old, old + 1, 2)]));
        assert!(changed.contains(&Contradiction::Rewritten {
            tier: TIER,
            epoch: old
        }));
        for number in 0..100 {
            kept.take("a", 7000 + number, &shown(&format!("t{number}"), []));
            kept.take(&format!("head {number}"), 1, &shown("t", []));
        }
        assert_eq!(kept.heads.len(), MOST_HEADS);
        let trails = kept.trails_of("master");
        assert!(trails.contains(&("t", "a")) && trails.contains(&("t99", "a")));
    }

    #[test]
    fn epochs_survive_a_restart_and_a_damaged_file_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let mut keeper = Keeper::open(dir.path());
        let epochs = shown("t", (0..4).map(|epoch| (epoch, 10 * epoch + 3, 1)));
        let (name, value) = (epochs.record_name(), epochs.to_value());
        assert!(value.len() < 1024, "{}", value.len());
        let record = (name.as_bytes(), &value[..]);
        assert_eq!(keeper.take("a", 1, record), []);
        keeper.unsaved().unwrap().write();
        assert!(keeper.unsaved().is_none());
        let mut again = Keeper::open(dir.path());
        assert_eq!(again.kept, keeper.kept);
        assert_eq!(again.take("a", 1, record), []);
        assert!(again.unsaved().is_none(), "nothing is new");
        assert_eq!(Kept::read(&dir.path().join(FILE)).unwrap(), keeper.kept);
        for junk in [&b"audit-epochs/master"[..], b"other"] {
            assert_eq!(keeper.take("a", 2, (junk, b"[]")), []);
        }
        fs::write(dir.path().join(FILE), "junk").unwrap();
        assert!(Kept::read(dir.path()).is_err());
        assert_eq!(Keeper::open(dir.path()).kept, Kept::default());
        assert!(dir.path().join("audit-epochs.damaged").exists());
        assert!(Kept::read(&dir.path().join("nowhere")).is_err());
    }
}
