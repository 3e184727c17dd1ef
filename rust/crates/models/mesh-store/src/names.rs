//! Resolution of names: to a model in a folder, in the store, or on the hub.

mod close;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use mesh_model::gguf::split;

use crate::digest::Digest;
use crate::error::StoreError;
use crate::local::{self, LocalError, LocalIndex, LocalKind, LocalModel};
use crate::store::Store;

pub use close::close_names;

/// Folders and store in which names are looked up.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a> {
    /// Folders of model files. Of models with the same name, the one in the first folder counts.
    pub folders: &'a [PathBuf],
    /// The store, if there is one.
    pub store: Option<&'a Store>,
}

/// The model that a name resolves to, with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// Model that the name resolves to.
    pub target: Target,
    /// Explanation of the resolution, for people.
    pub why: String,
}

/// A model and its location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A file or a folder outside the store.
    Local(LocalModel),
    /// A model in the store; not all of it needs to be there.
    Stored {
        /// Name in the store.
        name: String,
        /// Fingerprint of the model.
        fingerprint: Digest,
    },
    /// A model that is not here, but the hub may have it.
    Hub {
        /// `ORGANISATION/MODEL`, with `@REVISION` and `:WHICH` where they were given.
        id: String,
    },
}

/// Errors of resolving a name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum NameError {
    /// No model has this name.
    #[error("no model {name:?}: {}", hint(known, close))]
    NotFound {
        name: String,
        /// Names of the models here.
        known: Vec<String>,
        /// Short names that look like it.
        close: Vec<String>,
    },
    /// The name looks like a path, but no file exists there.
    #[error("there is no file or folder {name:?}")]
    NoFile {
        /// Path that was given as the name.
        name: String,
    },
    /// There is something, but no model.
    #[error("{} is no model: neither a .gguf or .safetensors file, nor a folder with config.json and .safetensors files or with the parts of one split .gguf file", path.display())]
    NoModel { path: PathBuf },
    /// The name could refer to several models.
    #[error("model {name:?} is ambiguous: it may be any of {}; give more of the name, or a path", candidates.join(", "))]
    Ambiguous {
        name: String,
        /// Models that the name could refer to.
        candidates: Vec<String>,
    },
    /// A folder cannot be listed.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn hint(known: &[String], close: &[String]) -> String {
    let here = match known {
        [] => "neither the model folders nor the store hold any".to_owned(),
        known => format!("there are {}", known.join(", ")),
    };
    let close = match close {
        [] => String::new(),
        close => format!("; short names like it are {}", close.join(", ")),
    };
    format!("{here}{close}; a name on the hub is written ORGANISATION/MODEL")
}

impl Places<'_> {
    /// Resolves `name`, in this order: a path; the exact name of a model in a folder, then of one in the
    /// store; a fingerprint in the store, or its beginning; a short name such as `qwen2.5:7b`; a name on the
    /// hub (`ORGANISATION/MODEL`, optionally with `@REVISION` and `:QUANTISATION` or `:FILE`;
    /// `ORGANISATION/MODEL/FILE` is accepted, too); the unique beginning of one of these names, ignoring
    /// case. A model that both the store and the hub have is taken from the store.
    ///
    /// # Errors
    /// If there is no such model, or several, or a place cannot be read.
    pub fn resolve(&self, name: &str) -> Result<Resolved, NameError> {
        if let Some(resolved) = self.path(name)? {
            return Ok(resolved);
        }
        let locals = local::list(self.folders)?;
        let wanted = split::without_numbers(name);
        let wanted = strip_ending(&wanted);
        if let Some(model) = locals.iter().find(|model| model.name == wanted) {
            return Ok(in_folder(model, "the name of a"));
        }
        let stored = self.stored()?;
        if let Some(resolved) = stored.exactly(name)? {
            return Ok(resolved);
        }
        if let Some(resolved) = stored.by_fingerprint(name)? {
            return Ok(resolved);
        }
        if let Some(id) = short_names().get(name) {
            let why = format!("the short name of {id}");
            return stored.or_hub(id, why);
        }
        if let Some(id) = hub_id(name) {
            return stored.or_hub(&id, "a name on the hub".into());
        }
        self.beginning(name, &locals, &stored)
    }

    /// Resolves an existing file or folder, or text that can only be a path.
    fn path(&self, name: &str) -> Result<Option<Resolved>, NameError> {
        let path = Path::new(name);
        // Also the common name of the parts of a split file, which is no file's.
        if !name.is_empty()
            && let Some(model) = local::look_at(path.into())
        {
            let why = format!("the path of a {}", model.kind.name());
            let target = Target::Local(model);
            return Ok(Some(Resolved { target, why }));
        }
        if !name.is_empty() && path.exists() {
            // Blobs have no endings; opening the file shows its format.
            if path.is_file() {
                let target = Target::Local(LocalModel {
                    name: mesh_model::model::model_name(path),
                    path: path.into(),
                    bytes: path.metadata().map_or(0, |found| found.len()),
                    kind: LocalKind::Gguf,
                });
                let why = "the path of a file".into();
                return Ok(Some(Resolved { target, why }));
            }
            // A folder may be called like a model that is meant.
            return match path.is_dir() && !looks_like_path(name) {
                true => Ok(None),
                false => Err(NameError::NoModel { path: path.into() }),
            };
        }
        match looks_like_path(name) {
            true => Err(NameError::NoFile { name: name.into() }),
            false => Ok(None),
        }
    }

    fn stored(&self) -> Result<Stored, NameError> {
        let mut stored = Stored::default();
        let Some(store) = self.store else {
            return Ok(stored);
        };
        for named in store.names()? {
            stored.names.push((named.name, named.fingerprint));
        }
        let contents = store.contents()?;
        for model in contents.models {
            stored.fingerprints.push(model.fingerprint);
            let name = model.signed.manifest.name;
            stored.names.push((name, model.fingerprint));
        }
        // Damaged models are found, too, so that their error is shown; intact ones take precedence.
        for model in contents.damaged {
            stored.fingerprints.push(model.fingerprint);
            let mut names = model.names;
            names.retain(|name| !stored.names.iter().any(|(known, _)| known == name));
            if names.is_empty() {
                names.push(model.fingerprint.to_string());
            }
            let names = names.into_iter().map(|name| (name, model.fingerprint));
            stored.names.extend(names);
        }
        // Names of models that were removed by hand.
        let Stored {
            names,
            fingerprints,
        } = &mut stored;
        names.retain(|(_, fingerprint)| fingerprints.contains(fingerprint));
        names.sort();
        names.dedup();
        Ok(stored)
    }

    /// The only model whose name begins so.
    fn beginning(
        &self,
        name: &str,
        locals: &[LocalModel],
        stored: &Stored,
    ) -> Result<Resolved, NameError> {
        let lower = strip_ending(&split::without_numbers(name)).to_lowercase();
        let fits = |known: &str| !lower.is_empty() && known.to_lowercase().starts_with(&lower);
        let mut found: Vec<(String, Resolved)> = Vec::new();
        for model in locals.iter().filter(|model| fits(&model.name)) {
            let label = format!("{} ({})", model.name, model.path.display());
            found.push((label, in_folder(model, "the beginning of the name of a")));
        }
        let index = self.store.map(LocalIndex::read).unwrap_or_default();
        for (known, fingerprint) in stored.names.iter().filter(|(known, _)| fits(known)) {
            let same = |other: &Resolved| match &other.target {
                Target::Stored {
                    fingerprint: other, ..
                } => other == fingerprint,
                // The store may know what lies in a folder, or knew it. By its whole name the folder's
                // counts, too.
                Target::Local(model) => {
                    model.name == *known || index.lies_at(fingerprint, &model.path)
                }
                Target::Hub { .. } => false,
            };
            if !found.iter().any(|(_, other)| same(other)) {
                let why = format!("the beginning of {known}, a name in the store");
                let label = format!("{known} (in the store)");
                found.push((label, in_store(known, *fingerprint, why)));
            }
        }
        // Local models take precedence over those to fetch.
        if found.is_empty() {
            for (short, id) in short_names().iter().filter(|(short, _)| fits(short)) {
                let why = format!("the beginning of {short}, the short name of {id}");
                found.push((format!("{short} ({id})"), stored.or_hub(id, why)?));
            }
        }
        match found.len() {
            1 => Ok(found.remove(0).1),
            0 => {
                let locals = locals.iter().map(|model| model.name.clone());
                let mut known: Vec<String> = locals.collect();
                known.extend(stored.names.iter().map(|(name, _)| name.clone()));
                let short = short_names().keys().map(String::as_str);
                Err(NameError::NotFound {
                    name: name.into(),
                    known,
                    close: close_names(name, short),
                })
            }
            _ => Err(NameError::Ambiguous {
                name: name.into(),
                candidates: found.into_iter().map(|(label, _)| label).collect(),
            }),
        }
    }
}

/// Names and fingerprints in the store.
#[derive(Debug, Default)]
struct Stored {
    /// Names with their fingerprints, sorted.
    names: Vec<(String, Digest)>,
    fingerprints: Vec<Digest>,
}

impl Stored {
    fn exactly(&self, name: &str) -> Result<Option<Resolved>, NameError> {
        let found = self.names.iter().filter(|(known, _)| known == name);
        self.only(name, found, |known| {
            format!("{known} is a name in the store")
        })
    }

    fn by_fingerprint(&self, name: &str) -> Result<Option<Resolved>, NameError> {
        /// Shorter ones are words.
        const SHORTEST: usize = 8;
        let is_digits = name.bytes().all(|digit| digit.is_ascii_hexdigit());
        if name.len() < SHORTEST || !is_digits {
            return Ok(None);
        }
        let lower = name.to_lowercase();
        let fits = |digest: &Digest| digest.to_string().starts_with(&lower);
        let names = self.names.iter();
        let found = names.filter(|(_, fingerprint)| fits(fingerprint));
        self.only(name, found, |known| {
            format!("the fingerprint of {known}, in the store")
        })
    }

    /// The store's model by a name of the hub, or the hub's.
    fn or_hub(&self, id: &str, why: String) -> Result<Resolved, NameError> {
        let here = self.names.iter().filter(|(known, _)| {
            let rest = known.strip_prefix(id);
            // With a revision or a file that was not asked for it is still that model.
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['@', ':']))
        });
        let exact = self.names.iter().filter(|(known, _)| known == id);
        let because = |known: &str| format!("{why}; {known} is in the store");
        if let Some(resolved) = self.only(id, exact, because)? {
            return Ok(resolved);
        }
        if let Some(resolved) = self.only(id, here, because)? {
            return Ok(resolved);
        }
        Ok(Resolved {
            target: Target::Hub { id: id.into() },
            why,
        })
    }

    fn only<'a>(
        &self,
        name: &str,
        found: impl Iterator<Item = &'a (String, Digest)>,
        why: impl FnOnce(&str) -> String,
    ) -> Result<Option<Resolved>, NameError> {
        let mut found: Vec<&(String, Digest)> = found.collect();
        // Several names of one model are not ambiguous.
        found.dedup_by_key(|(_, fingerprint)| *fingerprint);
        match found[..] {
            [] => Ok(None),
            [(known, fingerprint)] => Ok(Some(in_store(known, *fingerprint, why(known)))),
            _ => Err(NameError::Ambiguous {
                name: name.into(),
                candidates: found
                    .into_iter()
                    .map(|(known, fingerprint)| format!("{known} ({})", fingerprint.short()))
                    .collect(),
            }),
        }
    }
}

fn in_folder(model: &LocalModel, how: &str) -> Resolved {
    Resolved {
        why: format!("{how} {} in a model folder", model.kind.name()),
        target: Target::Local(model.clone()),
    }
}

fn in_store(name: &str, fingerprint: Digest, why: String) -> Resolved {
    Resolved {
        target: Target::Stored {
            name: name.into(),
            fingerprint,
        },
        why,
    }
}

fn strip_ending(name: &str) -> &str {
    [".gguf", ".safetensors"]
        .into_iter()
        .find_map(|ending| name.strip_suffix(ending))
        .unwrap_or(name)
}

/// True for text that is a path even if nothing exists there. `a/b.gguf` is not: it may be a file on the hub.
fn looks_like_path(name: &str) -> bool {
    ["/", "./", "../", "~/"]
        .iter()
        .any(|start| name.starts_with(start))
}

/// Host names of the hub.
pub const HUB_HOSTS: [&str; 2] = ["huggingface.co", "hf.co"];

/// The text behind `https://` and the hub's host name, or behind `hf:`; true if `name` has one of the latter.
pub fn without_hub(name: &str) -> (&str, bool) {
    let rest = ["https://", "http://"]
        .into_iter()
        .find_map(|scheme| name.strip_prefix(scheme))
        .unwrap_or(name);
    let on_hub = HUB_HOSTS
        .into_iter()
        .find_map(|host| rest.strip_prefix(host)?.strip_prefix('/'))
        .or_else(|| rest.strip_prefix("hf:"));
    (on_hub.unwrap_or(rest), on_hub.is_some())
}

/// A name on the hub in the form in which models from there are named:
/// `ORGANISATION/MODEL[@REVISION][:WHICH]`.
fn hub_id(name: &str) -> Option<String> {
    let (rest, _) = without_hub(name);
    let end = rest.find(['@', ':']).unwrap_or(rest.len());
    let (repo, behind) = rest.split_at(end);
    let mut parts = repo.splitn(3, '/');
    let (organisation, model, file) = (parts.next()?, parts.next()?, parts.next());
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let plain = |part: &str| {
        !part.is_empty() && part.len() <= 96 && part.bytes().all(allowed) && !part.starts_with('.')
    };
    // With the hub's address in it twice it would mean something else when it is read again.
    if !plain(organisation) || !plain(model) || HUB_HOSTS.contains(&organisation) {
        return None;
    }
    if rest.chars().any(char::is_control) {
        return None;
    }
    match file {
        None => Some(format!("{organisation}/{model}{behind}")),
        Some(file) if behind.is_empty() && !file.is_empty() => {
            Some(format!("{organisation}/{model}:{file}"))
        }
        Some(_) => None,
    }
}

/// Short names with their names on the hub, from names.toml.
pub fn short_names() -> &'static BTreeMap<String, String> {
    static NAMES: OnceLock<BTreeMap<String, String>> = OnceLock::new();
    NAMES.get_or_init(|| {
        let sections: BTreeMap<String, BTreeMap<String, String>> =
            toml::from_str(include_str!("names.toml")).expect("a test reads this very file");
        sections.into_values().flatten().collect()
    })
}

/// Default folder of the store: `$XDG_DATA_HOME/hydramesh/models`, else `~/.local/share/hydramesh/models`,
/// else the services' folder `/var/lib/hydramesh/store`.
pub fn default_store() -> PathBuf {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    folder("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| folder("HOME").map(|home| Path::new(&home).join(".local/share")))
        .map_or("/var/lib/hydramesh/store".into(), |data| {
            data.join("hydramesh/models")
        })
}

#[cfg(test)]
mod tests;
