//! Models outside the store: in folders that people put them in.

mod fingerprints;
mod stamp;

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use mesh_model::file::has_extension;
use mesh_model::gguf::split;
use mesh_model::hf::is_hugging_face;
use mesh_model::image::is_image_model;
use mesh_model::model::model_name;
use serde::{Deserialize, Serialize};

pub use fingerprints::FingerprintCache;
use stamp::{MAX_INDEX, MAX_REMEMBERED, Stamp};

use crate::digest::Digest;
use crate::error::StoreError;
use crate::files;
use crate::manifest::{Manifest, model_files};
use crate::signature::SignedManifest;
use crate::store::Store;

/// A model in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalModel {
    /// The file's name without its ending and the numbers of a part, or the folder's name.
    pub name: String,
    /// Path of the file or folder; of a split file that of the first part that is there.
    pub path: PathBuf,
    /// Total length of its files in bytes.
    pub bytes: u64,
    /// Form of the model's files.
    pub kind: LocalKind,
}

/// Form of a model outside the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalKind {
    /// A single GGUF file.
    Gguf,
    /// A GGUF file in several parts. Not all of them need to be there.
    SplitGguf,
    /// A safetensors file by itself.
    Safetensors,
    /// A folder as Hugging Face has it: `config.json` and safetensors files.
    Folder,
    /// A folder with a model for images as diffusers has it: `model_index.json` and folders of safetensors files.
    Diffusers,
}

impl LocalKind {
    /// Name of the form, for people.
    pub fn name(self) -> &'static str {
        match self {
            LocalKind::Gguf => "GGUF file",
            LocalKind::SplitGguf => "split GGUF file",
            LocalKind::Safetensors => "safetensors file",
            LocalKind::Folder => "Hugging Face folder",
            LocalKind::Diffusers => "diffusers folder",
        }
    }
}

impl LocalModel {
    /// Time of the last change: of the file, of any part of a split one, or of the folder.
    pub fn changed(&self) -> Option<SystemTime> {
        let files = split::parts(&self.path).unwrap_or_else(|| vec![self.path.clone()]);
        let changed = |path: &PathBuf| std::fs::metadata(path).ok()?.modified().ok();
        files.iter().filter_map(changed).max()
    }
}

/// Errors of looking up a model in folders.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum LocalError {
    /// A folder could not be listed.
    #[error("cannot list the model folder {}: {source}", path.display())]
    List { path: PathBuf, source: io::Error },
    /// No file of that name.
    #[error("no model {name:?}: {}", known_names(known))]
    NotFound { name: String, known: Vec<String> },
    /// Several files answer to a name.
    #[error("model {name:?} is ambiguous: it may be any of {}; give more of the name or a path", known.join(", "))]
    Ambiguous {
        name: String,
        /// The names that begin so.
        known: Vec<String>,
    },
}

fn known_names(known: &[String]) -> String {
    match known {
        [] => "the model folders hold no model; put a .gguf or .safetensors file or a Hugging Face folder there, or give a path".into(),
        names => format!("there are {}", names.join(", ")),
    }
}

/// All models directly in `dirs`, by name: `.gguf` and `.safetensors` files, and folders with a `config.json`
/// and safetensors files or with the parts of one split GGUF file. A split file is one model, whole or not. A
/// folder that does not exist holds none; of models with one name the first folder's counts, and there a file
/// before parts. What cannot be looked at is left out.
///
/// # Errors
/// If a folder exists but cannot be listed.
pub fn list(dirs: &[PathBuf]) -> Result<Vec<LocalModel>, LocalError> {
    let mut models: Vec<LocalModel> = Vec::new();
    for dir in dirs {
        let failed = |source| LocalError::List {
            path: dir.clone(),
            source,
        };
        let listing = match std::fs::read_dir(dir) {
            Ok(listing) => listing,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        let paths: io::Result<Vec<PathBuf>> = listing.map(|item| Ok(item?.path())).collect();
        let mut paths = paths.map_err(failed)?;
        // Of two files with one name, the same one wins each time.
        paths.sort_by_cached_key(|path| (split::parts(path).is_some(), path.clone()));
        for path in paths {
            // The first part that is there stands for all.
            if split::parts(&path).is_some() && split::find(&path).as_ref() != Some(&path) {
                continue;
            }
            if let Some(model) = look_at(path)
                && !models.iter().any(|known| known.name == model.name)
            {
                models.push(model);
            }
        }
    }
    models.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(models)
}

/// The model at `path`, which [`split::find`] may find, too; `None` if there is none.
pub fn look_at(path: PathBuf) -> Option<LocalModel> {
    if let Some(first) = split::find(&path) {
        return Some(split_model(first));
    }
    // Dangling links and files that are gone since the listing have no metadata.
    let metadata = std::fs::metadata(&path).ok()?;
    let (kind, bytes) = if metadata.is_dir() {
        let kind = match is_image_model(&path) {
            true => LocalKind::Diffusers,
            false => LocalKind::Folder,
        };
        (kind, folder_bytes(&path)?)
    } else if !metadata.is_file() {
        return None;
    } else if has_extension(&path, "gguf") {
        (LocalKind::Gguf, metadata.len())
    } else if has_extension(&path, "safetensors") {
        (LocalKind::Safetensors, metadata.len())
    } else {
        return None;
    };
    let name = match kind {
        LocalKind::Folder | LocalKind::Diffusers => {
            path.file_name()?.to_string_lossy().into_owned()
        }
        _ => model_name(&path),
    };
    Some(LocalModel {
        name,
        path,
        bytes,
        kind,
    })
}

/// The split file of which `first` is the first part that is there.
fn split_model(first: PathBuf) -> LocalModel {
    let parts = split::parts(&first).unwrap_or_default();
    let lengths = parts.iter().map(std::fs::metadata);
    LocalModel {
        name: model_name(&first),
        bytes: lengths
            .map(|found| found.map_or(0, |found| found.len()))
            .sum(),
        path: first,
        kind: LocalKind::SplitGguf,
    }
}

/// Length of the files of a folder as Hugging Face or diffusers has it.
fn folder_bytes(path: &Path) -> Option<u64> {
    if !path.join("config.json").is_file() && !is_image_model(path) {
        return None;
    }
    let files = model_files(path).ok()?;
    let weights = files.iter().any(|file| has_extension(file, "safetensors"));
    let lengths = files.iter().map(|file| std::fs::metadata(path.join(file)));
    let bytes = lengths
        .map(|found| found.map_or(0, |found| found.len()))
        .sum();
    weights.then_some(bytes)
}

/// The file or folder that `name` refers to: a path, the name of a model in `dirs`, or a unique beginning of
/// one, ignoring case. Of a split file it is the first part that is there.
///
/// # Errors
/// If there is no such model, or several.
pub fn resolve(name: &str, dirs: &[PathBuf]) -> Result<PathBuf, LocalError> {
    let path = Path::new(name);
    if let Some(first) = split::find(path) {
        return Ok(first);
    }
    if path.is_file() || is_hugging_face(path) || is_image_model(path) {
        return Ok(path.into());
    }
    let mut models = list(dirs)?;
    let wanted = split::without_numbers(name);
    let wanted = wanted.strip_suffix(".gguf").unwrap_or(&wanted);
    if let Some(i) = models.iter().position(|model| model.name == wanted) {
        return Ok(models.swap_remove(i).path);
    }
    let lower = wanted.to_lowercase();
    let known: Vec<String> = models.iter().map(|model| model.name.clone()).collect();
    models.retain(|model| !lower.is_empty() && model.name.to_lowercase().starts_with(&lower));
    match &models[..] {
        [only] => Ok(only.path.clone()),
        [] => Err(LocalError::NotFound {
            name: name.into(),
            known,
        }),
        several => Err(LocalError::Ambiguous {
            name: name.into(),
            known: several.iter().map(|model| model.name.clone()).collect(),
        }),
    }
}

/// The store's memory of models outside of it: `local.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct LocalIndex {
    models: Vec<Adopted>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Adopted {
    /// The file or folder.
    path: PathBuf,
    name: String,
    fingerprint: Digest,
    files: Vec<AdoptedFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct AdoptedFile {
    /// As the manifest names it.
    file: String,
    #[serde(flatten)]
    stamp: Stamp,
}

impl LocalIndex {
    pub(crate) fn read(store: &Store) -> Self {
        let json = files::read_limited(&index_path(store), MAX_INDEX);
        let json = json.ok().flatten();
        json.and_then(|json| serde_json::from_slice(&json).ok())
            .unwrap_or_default()
    }

    /// Path of `file` of the model, if the file is still the one that was read.
    pub(crate) fn find(&self, fingerprint: &Digest, file: &str) -> Option<PathBuf> {
        let mut files = self.of(fingerprint).flat_map(|model| &model.files);
        let known = files.find(|known| known.file == file && known.is_unchanged())?;
        Some(known.stamp.path.clone())
    }

    /// Names of the model where it was found.
    pub(crate) fn names(&self, fingerprint: &Digest) -> impl Iterator<Item = &str> {
        self.of(fingerprint).map(|model| model.name.as_str())
    }

    /// True if the model is, or was when last read, the one at `path`.
    pub(crate) fn lies_at(&self, fingerprint: &Digest, path: &Path) -> bool {
        let Ok(path) = path.canonicalize() else {
            return false;
        };
        let same = |known: &Adopted| known.path.canonicalize().is_ok_and(|known| known == path);
        self.of(fingerprint).any(same)
    }

    fn of(&self, fingerprint: &Digest) -> impl Iterator<Item = &Adopted> {
        let models = self.models.iter();
        models.filter(move |model| model.fingerprint == *fingerprint)
    }
}

impl AdoptedFile {
    fn is_unchanged(&self) -> bool {
        Stamp::of(&self.stamp.path).is_ok_and(|stamp| stamp == self.stamp)
    }
}

fn index_path(store: &Store) -> PathBuf {
    store.root().join("local.json")
}

impl Store {
    /// Registers a model outside the store, a file, all parts of one, or a folder: makes its manifest, or reuses the last one if
    /// nothing changed since. Its bytes stay where they are; [`Store::presence`] finds them there.
    ///
    /// # Errors
    /// If the model cannot be read, or the disk fails.
    pub fn adopt(
        &self,
        name: &str,
        path: &Path,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<SignedManifest, StoreError> {
        // Links are not followed: a blob behind one has no name that shows its format.
        let path = std::path::absolute(path).map_err(StoreError::io("look at", path))?;
        let path = split::find(&path).unwrap_or(path);
        if let Some(known) = self.adopted(name, &path)? {
            return Ok(known);
        }
        let manifest = Manifest::of_path(name, &path, progress)?;
        let signed = SignedManifest::unsigned(manifest);
        let fingerprint = self.put_manifest(&signed)?;
        let mut adopted = Adopted {
            name: name.to_owned(),
            fingerprint,
            files: Vec::new(),
            path: path.clone(),
        };
        for file in &signed.manifest.files {
            let found = match path.is_dir() {
                true => path.join(file.relative_path()),
                // A part, or the only file.
                false => path.with_file_name(file.relative_path()),
            };
            let stamp = Stamp::of(&found).map_err(StoreError::io("look at", &found))?;
            adopted.files.push(AdoptedFile {
                file: file.path.clone(),
                stamp,
            });
        }
        let index_path = index_path(self);
        let _lock = self.lock()?;
        let mut index = LocalIndex::read(self);
        index
            .models
            .retain(|known| known.path != path || known.name != name);
        let excess = (index.models.len() + 1).saturating_sub(MAX_REMEMBERED);
        index.models.drain(..excess);
        index.models.push(adopted);
        serde_json::to_vec(&index)
            .map_err(io::Error::from)
            .and_then(|json| files::replace(&index_path, &self.tmp(), &json))
            .map_err(StoreError::io("write", &index_path))?;
        drop(_lock);
        // With signatures that it may have had.
        Ok(self.manifest(&fingerprint)?.unwrap_or(signed))
    }

    /// The known manifest of the model at `path`, if nothing of it changed.
    fn adopted(&self, name: &str, path: &Path) -> Result<Option<SignedManifest>, StoreError> {
        let index = LocalIndex::read(self);
        let known = index
            .models
            .iter()
            .find(|known| known.path == path && known.name == name);
        let Some(known) = known.filter(|known| {
            let same_files = match path.is_dir() {
                true => model_files(path).is_ok_and(|files| files.len() == known.files.len()),
                false => true,
            };
            same_files && known.files.iter().all(AdoptedFile::is_unchanged)
        }) else {
            return Ok(None);
        };
        match self.manifest(&known.fingerprint) {
            // It is made anew.
            Err(StoreError::Damaged { .. }) => Ok(None),
            read => read,
        }
    }
}

#[cfg(test)]
mod tests;
