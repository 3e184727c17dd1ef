//! Names of models in a store.

use serde::{Deserialize, Serialize};

use super::root::Store;
use crate::digest::Digest;
use crate::error::StoreError;
use crate::files;

/// A name of a model in the store, with its origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// Name that resolves to the model.
    pub name: String,
    /// Fingerprint of the model.
    pub fingerprint: Digest,
    /// Origin, for people: a hub's repository and commit, or a path.
    pub source: Option<String>,
    /// Confirmation of a name that another worker gave: the hub, a signature or a pin. Absent if it was not
    /// confirmed, or recorded before confirmations existed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vouched: Option<String>,
}

impl Named {
    /// True if the name comes from another worker and is not confirmed.
    pub fn is_hearsay(&self) -> bool {
        self.vouched.is_none() && self.is_from_worker()
    }

    /// True if the name comes from another worker, confirmed or not.
    pub fn is_from_worker(&self) -> bool {
        let source = self.source.as_deref().unwrap_or_default();
        source.starts_with(FROM_WORKER)
    }
}

impl Store {
    /// Makes `name` refer to the model `fingerprint`, and replaces its earlier meaning.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn name(
        &self,
        name: &str,
        fingerprint: &Digest,
        source: Option<&str>,
    ) -> Result<(), StoreError> {
        self.set_name(Named {
            name: name.to_owned(),
            fingerprint: *fingerprint,
            source: source.map(str::to_owned),
            vouched: None,
        })
    }

    /// Makes `name` refer to a model that came from the worker `worker`; `vouched` is the confirmation of the
    /// name.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn name_from_worker(
        &self,
        name: &str,
        fingerprint: &Digest,
        worker: &str,
        vouched: &str,
    ) -> Result<(), StoreError> {
        self.set_name(Named {
            name: name.to_owned(),
            fingerprint: *fingerprint,
            source: Some(format!("{FROM_WORKER}{worker}")),
            vouched: Some(vouched.to_owned()),
        })
    }

    fn set_name(&self, named: Named) -> Result<(), StoreError> {
        let name = named.name.as_str();
        let path = self.name_path(name);
        let json = serde_json::to_vec(&named).expect("texts are JSON");
        let _lock = self.lock()?;
        files::replace(&path, &self.tmp(), &json).map_err(StoreError::io("write", &path))
    }

    /// All names, in their order. One that cannot be read is left out.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn names(&self) -> Result<Vec<Named>, StoreError> {
        let mut names: Vec<Named> = Vec::new();
        for path in self.list("names")? {
            let named = files::read_json(&path, MAX_NAME_FILE);
            if named.is_none() {
                tracing::warn!(path = %path.display(), "the store's name is unreadable and left out");
            }
            names.extend(named);
        }
        names.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(names)
    }
}

/// Prefix of the source of names that came from another worker.
const FROM_WORKER: &str = "worker ";

/// Longest file of a name that is read.
const MAX_NAME_FILE: u64 = 64 << 10;
