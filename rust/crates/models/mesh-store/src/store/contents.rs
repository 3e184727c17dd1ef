//! The contents of a store: intact and damaged models.

use std::time::SystemTime;

use super::named::Named;
use super::root::Store;
use crate::digest::Digest;
use crate::error::StoreError;
use crate::files;
use crate::local::LocalIndex;
use crate::manifest::MAX_MANIFEST;
use crate::signature::SignedManifest;

/// The contents of a store.
#[derive(Debug, Default)]
pub struct Contents {
    /// Intact models, by name.
    pub models: Vec<StoredModel>,
    /// Models that are damaged, by fingerprint.
    pub damaged: Vec<DamagedModel>,
}

/// A model in the store.
#[derive(Debug, Clone)]
pub struct StoredModel {
    /// Fingerprint of the model.
    pub fingerprint: Digest,
    /// Manifest and signatures of the model.
    pub signed: SignedManifest,
    /// Names that resolve to it, besides the manifest's own.
    pub names: Vec<Named>,
    /// Bytes of its files that are present.
    pub present: u64,
    /// True if a process has the model loaded.
    pub pinned: bool,
    /// Time of its last use.
    pub last_used: SystemTime,
}

/// A model whose manifest or signatures were altered or cannot be read.
#[derive(Debug)]
pub struct DamagedModel {
    /// Fingerprint of the model.
    pub fingerprint: Digest,
    /// Names that the model may have had. The manifest's own is among them, only to help to find it.
    pub names: Vec<String>,
    /// Error of the damaged file.
    pub error: StoreError,
}

impl DamagedModel {
    /// The first name; the short fingerprint if there are no names.
    pub fn name(&self) -> String {
        let name = self.names.first().cloned();
        name.unwrap_or_else(|| self.fingerprint.short())
    }
}

impl Store {
    /// All models, by name. One whose manifest is damaged is left out, with a warning.
    ///
    /// # Errors
    /// If the store cannot be listed.
    pub fn models(&self) -> Result<Vec<StoredModel>, StoreError> {
        let contents = self.contents()?;
        for DamagedModel {
            fingerprint, error, ..
        } in &contents.damaged
        {
            tracing::warn!(%fingerprint, %error, "a model of the store is left out");
        }
        Ok(contents.models)
    }

    /// All models, and those that are damaged.
    ///
    /// # Errors
    /// If the store cannot be listed.
    pub fn contents(&self) -> Result<Contents, StoreError> {
        let names = self.names()?;
        let mut contents = Contents::default();
        let _lock = self.lock()?;
        for fingerprint in self.fingerprints()? {
            let names = names.iter();
            let names = names.filter(|named| named.fingerprint == fingerprint);
            let signed = match self.manifest(&fingerprint) {
                Ok(Some(signed)) => signed,
                Ok(None) => continue,
                Err(error) => {
                    let names = names.map(|named| named.name.clone()).collect();
                    contents.damaged.push(DamagedModel {
                        names: self.with_other_names(names, &fingerprint),
                        fingerprint,
                        error,
                    });
                    continue;
                }
            };
            let presences = signed.manifest.files.iter();
            let present = presences.map(|file| self.presence(&fingerprint, file).have.bytes());
            contents.models.push(StoredModel {
                present: present.sum(),
                names: names.cloned().collect(),
                pinned: self.is_pinned(&fingerprint)?,
                last_used: self.last_used(&fingerprint),
                fingerprint,
                signed,
            });
        }
        let Contents { models, damaged } = &mut contents;
        models.sort_by(|a, b| a.signed.manifest.name.cmp(&b.signed.manifest.name));
        damaged.sort_by_key(|model| model.fingerprint);
        Ok(contents)
    }

    /// Adds names from the index of models outside the store and from the damaged manifest itself.
    fn with_other_names(&self, mut names: Vec<String>, fingerprint: &Digest) -> Vec<String> {
        let said: Option<DamagedManifest> =
            files::read_json(&self.manifest_path(fingerprint), MAX_MANIFEST as u64);
        let said = said.map(|said| said.name).filter(|name| {
            !name.is_empty() && name.len() <= MAX_NAME && !name.chars().any(char::is_control)
        });
        let index = LocalIndex::read(self);
        for name in index.names(fingerprint).map(str::to_owned).chain(said) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

/// The name in a damaged manifest, if it can be read.
#[derive(serde::Deserialize)]
struct DamagedManifest {
    name: String,
}

/// Longest name of a damaged manifest that is shown.
const MAX_NAME: usize = 256;
