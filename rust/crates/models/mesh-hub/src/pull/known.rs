//! Models that the store knows already, and recording new ones.

use std::path::PathBuf;

use mesh_store::{BuildError, Manifest, Store, StoreError};

use super::pulled::Pulled;
use crate::blocking::blocking;
use crate::error::HubError;
use crate::watch::Watch;

/// The model that the store knows as `label`, if it is complete and, if `source` is given, comes from there.
pub(super) async fn find(
    store: &Store,
    label: String,
    source: Option<String>,
) -> Result<Option<Pulled>, HubError> {
    let store = store.clone();
    blocking(move || {
        let names = store.names()?;
        let is_it = |named: &mesh_store::store::Named| {
            // Without a hub to ask, a name that only a peer gave does not count.
            let known = source.is_none() && !named.is_hearsay();
            named.name == label && (known || source.is_some() && named.source == source)
        };
        let Some(named) = names.into_iter().find(is_it) else {
            return Ok(None);
        };
        let signed = match store.manifest(&named.fingerprint) {
            Ok(Some(signed)) => signed,
            // It is made anew.
            Ok(None) | Err(StoreError::Damaged { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let manifest = signed.manifest;
        let is_here = |file| store.presence(&named.fingerprint, file).have.bytes() == file.bytes;
        if !manifest.files.iter().all(is_here) {
            return Ok(None);
        }
        let folder = store.folder(&named.fingerprint)?;
        let source = named.source.unwrap_or_default();
        let (repo, commit) = source.rsplit_once("/tree/").unwrap_or_default();
        let parts: Vec<&str> = repo.rsplit('/').take(2).collect();
        Ok(Some(Pulled {
            repo: match parts[..] {
                [model, organisation] => format!("{organisation}/{model}"),
                _ => repo.to_owned(),
            },
            commit: commit.to_owned(),
            fingerprint: Some(named.fingerprint),
            path: Some(manifest.path_in(&folder)),
            bytes: manifest.bytes(),
            present: manifest.bytes(),
            fetched: 0,
            layers: manifest.layers(),
            name: manifest.name,
        }))
    })
    .await
}

/// The manifest of files that lie elsewhere than where they are called.
pub(super) fn manifest_of(
    name: &str,
    paths: &[(PathBuf, PathBuf)],
    watch: &dyn Watch,
) -> Result<Manifest, HubError> {
    let root = links(paths)?;
    let names: Vec<PathBuf> = paths.iter().map(|(path, _)| path.clone()).collect();
    let manifest = Manifest::of_files(name, root.path(), &names, &|bytes| watch.checked(bytes));
    manifest.map_err(|error: BuildError| StoreError::from(error).into())
}

/// A folder in which files lie under their names in the repository.
fn links(paths: &[(PathBuf, PathBuf)]) -> Result<tempfile::TempDir, HubError> {
    let link = || {
        let root = tempfile::tempdir()?;
        for (path, blob) in paths {
            let link = root.path().join(path);
            if let Some(parent) = link.parent() {
                std::fs::create_dir_all(parent)?;
            }
            std::os::unix::fs::symlink(std::path::absolute(blob)?, link)?;
        }
        Ok(root)
    };
    link().map_err(|source| HubError::Write {
        what: "temporary links".to_owned(),
        source,
    })
}
