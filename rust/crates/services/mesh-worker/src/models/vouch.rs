//! Checks that a model is what its name says: the worker that offers a file is not believed about that.
//!
//! These count, in this order: an operator's pin at the head; the hub, which lists a model's files in a few
//! kilobytes, wherever their bytes come from; where it does not, a signature of a key that the operator
//! trusts; else the pin that the head keeps for the name. A model that none of them vouches for is not taken
//! under that name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mesh_hub::{Expected, HubName, Unchecked};
use mesh_proto::ModelSources;
use mesh_store::{Digest, Manifest, SignedManifest, Verdict};

use super::held::Held;
use super::{Models, lock, origin};

/// A model's name that is vouched for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Vouched {
    /// The party that vouches, for people.
    pub(super) by: String,
    /// Files whose content has yet to be compared with the hub's list.
    pub(super) unchecked: Vec<Unchecked>,
}

/// Reasons for which a model is not taken under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Doubt {
    /// The name stands for another model.
    Other(String),
    /// No party vouches for the name.
    Nobody(String),
}

/// Recent answers of the hub, by name.
#[derive(Debug, Default)]
pub(super) struct HubWords(pub(super) Mutex<BTreeMap<String, (Instant, HubWord)>>);

type HubWord = Result<Arc<Expected>, String>;

impl Models {
    /// Finds a party that vouches that the model with this manifest is called `name`. `told` is the head's
    /// answer about that name.
    pub(super) async fn vouch(
        &self,
        name: &str,
        signed: &SignedManifest,
        told: Option<&ModelSources>,
    ) -> Result<Vouched, Doubt> {
        let manifest = &signed.manifest;
        let fingerprint = manifest.fingerprint();
        let verdict = self.policy.check(signed);
        // Signatures may come later.
        let verdict = verdict.map_err(|error| Doubt::Nobody(error.to_string()))?;
        let vouched = |by: String| Vouched {
            by,
            unchecked: Vec::new(),
        };
        if let Ok(wanted) = name.parse::<Digest>() {
            return match wanted == fingerprint {
                true => Ok(vouched("it is asked for by its fingerprint".to_owned())),
                false => Err(Doubt::Other(format!("its fingerprint is {fingerprint}"))),
            };
        }
        if let Some(told) = told.filter(|told| told.pinned_by_operator) {
            return match told.pin == fingerprint.to_string() {
                true => Ok(vouched("the operator's pin at the head".to_owned())),
                false => Err(Doubt::Nobody(format!(
                    "an operator pinned {name} to another model, {:.12}: `hydramesh models pins release {name}` lets the hub or a signature \
                     decide again",
                    told.pin
                ))),
            };
        }
        let mut tried = Vec::new();
        let is_hubs = origin::is_name(name);
        if is_hubs && self.policy.requires_signature() {
            // The operator's word counts alone.
        } else if is_hubs && self.config.store.hub {
            match self.expected(name).await {
                Ok(expected) => {
                    let unchecked = expected.check(manifest).map_err(|reason| {
                        Doubt::Other(format!(
                            "the hub has another model under this name (commit {:.12}): {reason}",
                            expected.commit
                        ))
                    })?;
                    let by = format!("the hub, commit {}", expected.commit);
                    return Ok(Vouched { by, unchecked });
                }
                Err(reason) => tried.push(format!("the hub does not say ({reason})")),
            }
        } else if is_hubs {
            tried.push("`store.hub` forbids to ask the hub".to_owned());
        }
        match verdict {
            Verdict::Signed { key } if may_be_called(name, manifest) => {
                return Ok(vouched(format!("the signature of key {}", key.short())));
            }
            Verdict::Signed { .. } => tried.push(format!(
                "a trusted key signed it as {:?}, from which it cannot be seen that it is {name}",
                manifest.name
            )),
            Verdict::Stranger => tried.push("no trusted key signed it".to_owned()),
            Verdict::Unsigned => tried.push("it is not signed".to_owned()),
        }
        match told {
            Some(told) if told.pin == fingerprint.to_string() && !told.disputed => {
                return Ok(vouched("the pin at the head".to_owned()));
            }
            Some(told) if told.disputed => {
                tried.push("the head knows several models that claim this name".to_owned());
            }
            Some(told) if told.pin.is_empty() => {
                tried.push("the head keeps no pin for this name".to_owned());
            }
            Some(told) => tried.push(format!("the head's pin is another model, {:.12}", told.pin)),
            None => tried.push("the head has said nothing of it".to_owned()),
        }
        Err(Doubt::Nobody(format!(
            "nobody vouches that the model {} is {name}: {}. Let this worker reach the hub, sign the model (`hydramesh models sign`) with a key \
             of `store.trusted_keys`, or pin it (`hydramesh models pins set {name} {fingerprint}`)",
            fingerprint.short(),
            tried.join("; "),
        )))
    }

    /// Gets the files for which the hub gives no SHA-256, and compares them with the hub's data.
    pub(super) async fn check_contents(
        self: &Arc<Self>,
        held: &Arc<Held>,
        unchecked: Vec<Unchecked>,
    ) -> Result<(), Doubt> {
        if unchecked.is_empty() {
            return Ok(());
        }
        let files = unchecked.iter().map(|file| file.file);
        let pieces = held.files(files);
        self.fetch(held, pieces).await.map_err(Doubt::Nobody)?;
        let held = held.clone();
        let compared = tokio::task::spawn_blocking(move || {
            for file in unchecked {
                let content = held.content(file.file, LARGEST_SMALL);
                let content = content.map_err(|error| Doubt::Nobody(error.to_string()))?;
                if !file.is(&content) {
                    let path = &held.manifest().files[file.file as usize].path;
                    return Err(Doubt::Other(format!(
                        "the hub has another model under this name: {path:?} is another file"
                    )));
                }
            }
            Ok(())
        });
        let failed = |error: tokio::task::JoinError| Err(Doubt::Nobody(error.to_string()));
        compared.await.unwrap_or_else(failed)
    }

    /// The hub's list of the files of `name`, asked for again after a while.
    async fn expected(&self, name: &str) -> HubWord {
        let known = lock(&self.hub.0).get(name).cloned();
        if let Some((at, word)) = known {
            let good_for = if word.is_ok() { SAID } else { SILENT };
            if at.elapsed() < good_for {
                return word;
            }
        }
        let word = origin::expected(name).await.map(Arc::new);
        let mut words = lock(&self.hub.0);
        words.retain(|_, (at, _)| at.elapsed() < SAID);
        words.insert(name.to_owned(), (Instant::now(), word.clone()));
        word
    }
}

/// Returns true if a signed manifest may be the model `name`: a signature covers the name and the files, not
/// the name on the hub. So that a signed model cannot be passed off as another signed one, its files have to
/// be called as that name says.
fn may_be_called(name: &str, manifest: &Manifest) -> bool {
    let Ok(hub) = name.parse::<HubName>() else {
        return manifest.name.eq_ignore_ascii_case(name);
    };
    let plain = |text: &str| -> String {
        let text = text.rsplit('/').next().unwrap_or(text).to_ascii_lowercase();
        let text = text.strip_suffix("-gguf").unwrap_or(&text);
        text.chars().filter(char::is_ascii_alphanumeric).collect()
    };
    let model = plain(&hub.repo);
    let called = plain(&manifest.name).starts_with(&model);
    match &hub.which {
        None => called,
        Some(file) if manifest.files.iter().any(|held| held.path == *file) => true,
        Some(which) => called && plain(&manifest.name)[model.len()..] == plain(which),
    }
}

/// Time for which an answer of the hub is good, and for which its silence is.
const SAID: Duration = Duration::from_secs(60);
const SILENT: Duration = Duration::from_secs(15);
/// No file without a SHA-256 is larger.
const LARGEST_SMALL: u64 = 256 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signed_model_is_not_passed_off_as_another_one() {
        let manifest = |name: &str, path: &str| Manifest {
            name: name.to_owned(),
            ..Manifest::parse(&mesh_manifest(path)).unwrap()
        };
        let qwen = manifest("Qwen3-0.6B-Q8_0", "Qwen3-0.6B-Q8_0.gguf");
        for name in [
            "Qwen/Qwen3-0.6B-GGUF:Q8_0",
            "Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf",
            "Qwen/Qwen3-0.6B-GGUF",
            "qwen3-0.6b-q8_0",
        ] {
            assert!(may_be_called(name, &qwen), "{name}");
        }
        for name in [
            "Qwen/Qwen3-0.6B-GGUF:Q4_0",
            "Qwen/Qwen3-8B-GGUF:Q8_0",
            "Qwen/Qwen3-0.6B-GGUF:other.gguf",
            "meta/Llama-3-8B",
            "qwen3",
        ] {
            assert!(!may_be_called(name, &qwen), "{name}");
        }
    }

    fn mesh_manifest(path: &str) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(path), b"x").unwrap();
        let manifest = Manifest::of_files("x", folder.path(), &[path.into()], &|_| ());
        manifest.unwrap().to_bytes()
    }
}
