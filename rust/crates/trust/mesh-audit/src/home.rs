//! The folder of a node's trails: its keys, and one trail for each tier.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data_encoding::HEXLOWER;
use mesh_base::{files, random};
use zeroize::Zeroizing;

use crate::keys::{Identity, TrailKeys, is_key_name};
use crate::record::Event;
use crate::recover::Recovered;
use crate::store::{Limits, Store, StoreError};
use crate::tiles::{named, read};

pub use crate::tier::Tier;

/// The folder of the trails, held by the one process that writes them.
#[derive(Debug)]
pub struct Lock {
    dir: PathBuf,
    keys: Arc<TrailKeys>,
    _file: File,
}

/// A trail that was opened.
#[derive(Debug)]
pub struct Opened {
    /// The trail.
    pub store: Store,
    /// Report of the opening.
    pub recovered: Recovered,
    /// Where a damaged trail was put, and its damage.
    pub set_aside: Option<(PathBuf, String)>,
}

impl Lock {
    /// Takes the folder; creates it and its keys if they are not there.
    ///
    /// # Errors
    /// If another process has it; if the keys cannot be read or written.
    pub fn take(dir: &Path) -> io::Result<Self> {
        files::create_private_dir(dir).map_err(|error| named(dir, "create", &error))?;
        files::remove_leftovers(dir)?;
        let path = dir.join(LOCK);
        let opened = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let file = opened.map_err(|error| named(&path, "open", &error))?;
        if file.try_lock().is_err() {
            return Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                format!(
                    "another process writes the audit trail in {}: stop it first",
                    dir.display()
                ),
            ));
        }
        Ok(Self {
            keys: Arc::new(open_keys(dir)?),
            dir: dir.to_owned(),
            _file: file,
        })
    }

    /// True if a process writes the trails in this folder.
    pub fn is_taken(dir: &Path) -> bool {
        let file = File::open(dir.join(LOCK));
        file.is_ok_and(|file| file.try_lock_shared().is_err())
    }

    /// The keys of all trails.
    pub fn keys(&self) -> &Arc<TrailKeys> {
        &self.keys
    }

    /// Folder of the trail of a tier.
    pub fn dir_of(&self, tier: Tier) -> PathBuf {
        self.dir.join(tier.as_str())
    }

    /// Opens the trail of a tier. One that is damaged is set aside, and the first record of the new one says
    /// so.
    ///
    /// # Errors
    /// If files cannot be read or written.
    pub fn open(
        &self,
        tier: Tier,
        mesh: &str,
        identity: Option<&dyn Identity>,
        limits: Limits,
        now: u64,
    ) -> Result<Opened, StoreError> {
        let dir = self.dir_of(tier);
        let origin = origin(mesh, tier, now);
        let open =
            |origin: &str| Store::open(&dir, origin, self.keys.clone(), identity, limits, now);
        let (store, recovered) = match open(&origin) {
            Err(StoreError::Damaged { reason, .. }) => {
                let aside = self.dir.join(format!("{tier}.damaged-{}", now / 1000));
                fs::rename(&dir, &aside).map_err(|error| named(&dir, "rename", &error))?;
                let (mut store, recovered) = open(&origin)?;
                let before = aside.display().to_string();
                let event = Event::SetAside {
                    origin: before.into(),
                    reason: (&reason).into(),
                };
                store.append(&event, now)?;
                store.sync(now)?;
                return Ok(Opened {
                    store,
                    recovered,
                    set_aside: Some((aside, reason)),
                });
            }
            opened => opened?,
        };
        Ok(Opened {
            store,
            recovered,
            set_aside: None,
        })
    }
}

/// Folders of the trails below this one, with their names, that of a tier first.
pub fn trails(dir: &Path) -> Vec<(String, PathBuf)> {
    let known = Tier::ALL.map(|tier| tier.as_str().to_owned());
    let found = known.into_iter().map(|name| (name.clone(), dir.join(name)));
    found
        .filter(|(_, dir)| {
            dir.join(crate::folder::JOURNAL).exists()
                || dir.join(crate::folder::CHECKPOINT).exists()
        })
        .collect()
}

/// Name of a new trail: mesh, tier, and a random part, for a tree that begins anew is another one.
fn origin(mesh: &str, tier: Tier, now: u64) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '-'
        }
    };
    let mesh: String = mesh.chars().take(64).map(plain).collect();
    let mesh = if mesh.is_empty() {
        "hydramesh".to_owned()
    } else {
        mesh
    };
    let unique = HEXLOWER.encode(&random::bytes::<4>());
    let origin = format!("{mesh}/audit/{tier}/{}-{unique}", now / 1000);
    debug_assert!(is_key_name(&origin));
    origin
}

/// The secret keys in a folder, which are made at the first use.
///
/// # Errors
/// If they cannot be read or written.
pub fn open_keys(dir: &Path) -> io::Result<TrailKeys> {
    files::create_private_dir(dir).map_err(|error| named(dir, "create", &error))?;
    let path = dir.join(SIGNING_KEY);
    if let Some(text) = read(&path, 4096)? {
        let text = Zeroizing::new(text);
        let keys = TrailKeys::from_text(&String::from_utf8_lossy(&text));
        return keys.map_err(|error| io::Error::other(format!("{}: {error}", path.display())));
    }
    let keys = TrailKeys::generate();
    files::replace(&path, keys.to_text().as_bytes(), files::PRIVATE)?;
    Ok(keys)
}

/// The secret keys, in the folder of the trails.
pub const SIGNING_KEY: &str = "signing.key";
const LOCK: &str = "lock";
