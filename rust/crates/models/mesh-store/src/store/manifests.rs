//! Manifests in a store, with their signatures.

use std::path::PathBuf;

use super::root::Store;
use crate::digest::Digest;
use crate::error::StoreError;
use crate::files;
use crate::manifest::{MAX_MANIFEST, Manifest};
use crate::signature::{MAX_SIGNATURES, Signature, SignedManifest};

impl Store {
    /// Keeps a manifest with its signatures; signatures that it had before stay.
    ///
    /// # Errors
    /// If the manifest contradicts itself, or the disk fails.
    pub fn put_manifest(&self, signed: &SignedManifest) -> Result<Digest, StoreError> {
        signed.manifest.check()?;
        let bytes = signed.manifest.to_bytes();
        let fingerprint = Digest::of(&bytes);
        let _lock = self.lock()?;
        let mut merged = SignedManifest::unsigned(signed.manifest.clone());
        let known = match self.read_signatures(&fingerprint) {
            // Damaged signatures have no use.
            Err(error @ StoreError::Damaged { .. }) => {
                tracing::warn!(%error, "signatures are lost");
                let path = self.signatures_path(&fingerprint);
                files::remove(&path).map_err(StoreError::io("remove", &path))?;
                Vec::new()
            }
            read => read?,
        };
        for signature in known.iter().chain(&signed.signatures) {
            merged.add(signature.clone());
        }
        // The oldest go where there are too many.
        let excess = merged.signatures.len().saturating_sub(MAX_SIGNATURES);
        merged.signatures.drain(..excess);

        let write = |path: PathBuf, bytes: &[u8]| {
            files::replace(&path, &self.tmp(), bytes).map_err(StoreError::io("write", &path))
        };
        if !merged.signatures.is_empty() {
            let path = self.signatures_path(&fingerprint);
            write(path, &merged.signatures_to_bytes())?;
        }
        // The manifest, which makes it a model, is written last. This also repairs a damaged one.
        let path = self.manifest_path(&fingerprint);
        let is_there = files::read_limited(&path, MAX_MANIFEST as u64)
            .is_ok_and(|known| known.is_some_and(|known| known == bytes));
        if !is_there {
            write(path, &bytes)?;
        }
        Ok(fingerprint)
    }

    /// The manifest of a model, if the store has it.
    ///
    /// # Errors
    /// If it is damaged, or the disk fails.
    pub fn manifest(&self, fingerprint: &Digest) -> Result<Option<SignedManifest>, StoreError> {
        let path = self.manifest_path(fingerprint);
        let bytes = files::read_limited(&path, MAX_MANIFEST as u64)
            .map_err(StoreError::io("read", &path))?;
        let Some(bytes) = bytes else {
            return Ok(None);
        };
        let manifest = Manifest::parse_expected(&bytes, fingerprint);
        Ok(Some(SignedManifest {
            manifest: manifest.map_err(StoreError::damaged(&path))?,
            signatures: self.read_signatures(fingerprint)?,
        }))
    }

    /// Fingerprints of all manifests.
    pub(crate) fn fingerprints(&self) -> Result<Vec<Digest>, StoreError> {
        let manifests = self.list("manifests")?.into_iter();
        let names = manifests.filter_map(|path| {
            let name = path.file_name()?.to_str()?;
            name.strip_suffix(".json")?.parse().ok()
        });
        Ok(names.collect())
    }

    fn read_signatures(&self, fingerprint: &Digest) -> Result<Vec<Signature>, StoreError> {
        let path = self.signatures_path(fingerprint);
        let bytes = files::read_limited(&path, MAX_SIGNATURE_FILE)
            .map_err(StoreError::io("read", &path))?;
        let parsed = bytes.map_or(Ok(Vec::new()), |bytes| {
            SignedManifest::parse_signatures(&bytes)
        });
        parsed.map_err(StoreError::damaged(&path))
    }
}

/// Longest file of signatures that is read.
const MAX_SIGNATURE_FILE: u64 = 1 << 20;
