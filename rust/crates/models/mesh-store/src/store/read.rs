//! Reading a model's files, wherever they are.

use std::io;
use std::path::{Path, PathBuf};

use super::root::Store;
use crate::digest::Digest;
use crate::error::StoreError;
use crate::files;
use crate::local::LocalIndex;
use crate::manifest::ManifestFile;
use crate::partial::{HaveMap, PartialKey, have_path};
use crate::ranges::RangeSet;

/// Location of a file and the ranges of it that are present.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    /// The file: a blob, a partial file, or one outside the store. `None` if nothing of it is present.
    pub path: Option<PathBuf>,
    /// Ranges of the file that are present.
    pub have: RangeSet,
}

impl Store {
    /// The ranges of a model's file that are present: in the store or, for a model outside it
    /// ([`Store::adopt`]), there.
    pub fn presence(&self, fingerprint: &Digest, file: &ManifestFile) -> Presence {
        let is_whole = |path: &Path| {
            std::fs::metadata(path).is_ok_and(|found| found.is_file() && found.len() == file.bytes)
        };
        let is_own = |path: &Path| files::is_own(path, self.owners()) && is_whole(path);
        let whole = |path| Presence {
            path: Some(path),
            have: RangeSet::whole(file.bytes),
        };
        let blob = self.blob_path(&file.sha256);
        if is_own(&blob) {
            return whole(blob);
        }
        if let Some(path) = LocalIndex::read(self).find(fingerprint, &file.path) {
            return whole(path);
        }
        let partial = self.partial_path(&PartialKey::Blob(file.sha256));
        let map = HaveMap::read(&have_path(&partial)).filter(|map| map.bytes == file.bytes);
        let map = map.filter(|_| is_own(&partial));
        Presence {
            have: map.as_ref().map_or_else(RangeSet::default, HaveMap::ranges),
            path: map.map(|_| partial),
        }
    }

    /// The model's folder, to load it from, with links to the files that are present. A partial file has its
    /// full length, with holes.
    ///
    /// # Errors
    /// If the store does not have the model, or the disk fails.
    pub fn folder(&self, fingerprint: &Digest) -> Result<PathBuf, StoreError> {
        let signed = self.manifest(fingerprint)?;
        let signed = signed.ok_or(StoreError::NoModel {
            fingerprint: *fingerprint,
        })?;
        let _lock = self.lock()?;
        let models = self.root().join("models");
        let name = PathBuf::from(fingerprint.to_string());
        let folder = files::create_within(&models, &name, self.owners())
            .map_err(StoreError::io("create", &models.join(&name)))?;
        for file in &signed.manifest.files {
            let relative = file.relative_path();
            let link = folder.join(&relative);
            let parent = relative.parent().unwrap_or(Path::new(""));
            let made = files::create_within(&folder, parent, self.owners());
            made.map_err(StoreError::io("create", &link))?;
            let target = self.presence(fingerprint, file).path;
            let linked = self.link(target.as_deref(), &link);
            linked.map_err(StoreError::io("link", &link))?;
        }
        Ok(folder)
    }

    fn link(&self, target: Option<&Path>, link: &Path) -> io::Result<()> {
        let Some(target) = target else {
            return files::remove(link);
        };
        let target = std::path::absolute(target)?;
        if std::fs::read_link(link).is_ok_and(|known| known == target) {
            return Ok(());
        }
        let new = tempfile::TempDir::new_in(self.tmp())?;
        let new = new.path().join("link");
        std::os::unix::fs::symlink(target, &new)?;
        std::fs::rename(&new, link)
    }
}
