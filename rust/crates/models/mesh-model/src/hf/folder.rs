//! The files of a model folder: which there are, and reading them within limits.

use std::collections::BTreeMap;
use std::io;
use std::path::{Component, Path, PathBuf};

use data_encoding::HEXLOWER;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::HfError;
use crate::file::{has_extension, read_limited};

const CONFIG: &str = "config.json";
/// Name of the list of files and of the tensors in each.
pub const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";

/// The files beside the weights that say how a model answers, each with the most bytes that are read of it.
const OTHERS: [(&str, u64); 7] = [
    (CONFIG, 1 << 20),
    ("generation_config.json", 1 << 20),
    (TOKENIZER, MAX_TOKENIZER),
    ("tokenizer_config.json", 4 << 20),
    ("special_tokens_map.json", 1 << 20),
    ("chat_template.jinja", 1 << 20),
    (INDEX, 16 << 20),
];

/// The largest known one, Gemma's, has 33 MB.
const MAX_TOKENIZER: u64 = 64 << 20;
const MAX_SHARDS: usize = 1024;

/// Folders that hold files under names made of their contents, to which the files of a model are links: the
/// hub's cache and this system's store have them beside or above the model's folder.
const BLOBS: [&str; 2] = ["blobs", "partial"];
/// Maximum number of levels above the model's folder.
const BLOBS_ABOVE: usize = 3;

/// A folder with a model in Hugging Face's form.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    /// Path of the folder with links resolved.
    canonical: PathBuf,
    /// The one file of weights that was asked for.
    only: Option<PathBuf>,
    index: Option<ShardIndex>,
}

/// `model.safetensors.index.json`.
#[derive(Debug, Deserialize)]
struct ShardIndex {
    /// The file of each tensor.
    weight_map: BTreeMap<String, String>,
}

/// True if the path is of a model in Hugging Face's form: a folder with a `config.json`, or a `.safetensors`
/// file.
pub fn is_hugging_face(path: &Path) -> bool {
    has_extension(path, "safetensors") || path.join(CONFIG).is_file()
}

impl Folder {
    /// The folder at `path`, or the one around the `.safetensors` file at `path`. Reads the index if there is
    /// one.
    ///
    /// # Errors
    /// If the folder cannot be looked at, or its index is malformed.
    pub fn open(path: &Path) -> Result<Self, HfError> {
        let is_folder = path.is_dir();
        let root = match is_folder {
            true => path,
            false => match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            },
        };
        let mut folder = Folder {
            root: root.into(),
            canonical: root.canonicalize().map_err(|source| HfError::Read {
                path: root.into(),
                source,
            })?,
            only: None,
            index: None,
        };
        if let Some(json) = folder.read(INDEX)? {
            folder.index = Some(parse_index(&json)?);
        }
        // A shard represents the whole model.
        let name = path.file_name().and_then(|name| name.to_str());
        let is_shard = folder
            .index
            .as_ref()
            .is_some_and(|index| index.weight_map.values().any(|file| Some(&**file) == name));
        folder.only = (!is_folder && !is_shard).then(|| path.into());
        Ok(folder)
    }

    /// Name of the model: the folder's name, or that of the file if the folder has several models.
    pub fn name(&self) -> String {
        let stem = |path: &Path| {
            path.file_stem()
                .map(|stem| stem.to_string_lossy().into_owned())
        };
        let single = self.only.as_deref().filter(|path| !path.ends_with(SINGLE));
        let folder = self.canonical.file_name();
        single
            .and_then(stem)
            .or_else(|| folder.map(|name| name.to_string_lossy().into_owned()))
            .unwrap_or_else(|| "model".into())
    }

    /// All files that determine the model, by name.
    ///
    /// # Errors
    /// If the files of weights cannot be told.
    pub fn files(&self) -> Result<Vec<PathBuf>, HfError> {
        let others = OTHERS.iter().map(|(name, _)| self.root.join(name));
        let mut files: Vec<PathBuf> = others.filter(|path| path.is_file()).collect();
        files.extend(self.shards()?);
        files.sort();
        Ok(files)
    }

    /// SHA-256 over names and digests of all its files, in the form that `sha256sum` prints, as hexadecimal.
    /// `digest` gives the SHA-256 of one file.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn fingerprint(
        &self,
        mut digest: impl FnMut(&Path) -> io::Result<String>,
    ) -> Result<String, HfError> {
        let mut hasher = Sha256::new();
        for path in self.files()? {
            let digest = digest(&path).map_err(|source| HfError::Read {
                path: path.clone(),
                source,
            })?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            hasher.update(format!("{digest}  {name}\n"));
        }
        Ok(HEXLOWER.encode(&hasher.finalize()))
    }

    /// Reads `config.json`.
    pub(super) fn config(&self) -> Result<Vec<u8>, HfError> {
        let missing =
            "a model in Hugging Face's form has one beside its weights; fetch the whole folder";
        self.require(CONFIG, missing)
    }

    /// Reads `tokenizer.json`.
    pub(crate) fn tokenizer(&self) -> Result<Vec<u8>, HfError> {
        self.require(
            TOKENIZER,
            "save the tokenizer in its fast form (AutoTokenizer.from_pretrained(…).save_pretrained(…))",
        )
    }

    fn require(&self, name: &str, remedy: &'static str) -> Result<Vec<u8>, HfError> {
        self.read(name)?.ok_or_else(|| HfError::Missing {
            path: self.root.join(name),
            remedy,
        })
    }

    /// Reads a JSON or text file; `None` if it does not exist.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, HfError> {
        let limit = OTHERS
            .iter()
            .find(|(known, _)| *known == name)
            .map_or(1 << 20, |(_, limit)| *limit);
        let path = self.root.join(name);
        let failed = |source| HfError::Read {
            path: path.clone(),
            source,
        };
        if !path.try_exists().map_err(failed)? {
            return Ok(None);
        }
        self.check_inside(&path)?;
        read_limited(&path, limit).map_err(|source| match source.kind() {
            io::ErrorKind::InvalidInput => HfError::NotAFile { path: path.clone() },
            io::ErrorKind::FileTooLarge => HfError::TooLarge {
                bytes: std::fs::metadata(&path).map_or(limit, |found| found.len()),
                path: path.clone(),
                limit,
            },
            _ => failed(source),
        })
    }

    /// The files of weights, by name.
    pub(super) fn shards(&self) -> Result<Vec<PathBuf>, HfError> {
        let names: Vec<PathBuf> = match (&self.only, &self.index) {
            (Some(only), _) => vec![only.clone()],
            (None, Some(index)) => {
                let mut names: Vec<&String> = index.weight_map.values().collect();
                names.sort_unstable();
                names.dedup();
                names.into_iter().map(|name| self.root.join(name)).collect()
            }
            (None, None) => vec![self.without_index()?],
        };
        for path in &names {
            self.check_inside(path)?;
        }
        Ok(names)
    }

    /// `model.safetensors`, or the only one there is.
    fn without_index(&self) -> Result<PathBuf, HfError> {
        let single = self.root.join(SINGLE);
        if single.exists() {
            return Ok(single);
        }
        let failed = |source| HfError::Read {
            path: self.root.clone(),
            source,
        };
        let mut found = None;
        for item in std::fs::read_dir(&self.root).map_err(failed)? {
            let path = item.map_err(failed)?.path();
            if !has_extension(&path, "safetensors") {
                continue;
            }
            if found.replace(path).is_some() {
                return Err(HfError::Missing {
                    path: self.root.join(INDEX),
                    remedy: "there are several .safetensors files, and it says which tensor is in which; fetch the whole folder",
                });
            }
        }
        found.ok_or(HfError::Missing {
            path: single,
            remedy: "weights are read from .safetensors files only, since pickled ones can run code; convert the model or \
                     fetch the whole folder",
        })
    }

    /// Checks that a file is in the folder, or is a link into the blobs beside it.
    fn check_inside(&self, path: &Path) -> Result<(), HfError> {
        let target = path.canonicalize().map_err(|source| {
            match source.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() {
                true => HfError::Missing {
                    path: path.into(),
                    remedy: "the model is incomplete, fetch it again",
                },
                false => HfError::Read {
                    path: path.into(),
                    source,
                },
            }
        })?;
        let blobs = self
            .canonical
            .ancestors()
            .skip(1)
            .take(BLOBS_ABOVE)
            .flat_map(|above| BLOBS.map(|name| above.join(name)));
        if target.starts_with(&self.canonical)
            || blobs.into_iter().any(|blobs| target.starts_with(blobs))
        {
            return Ok(());
        }
        Err(HfError::Outside {
            path: path.into(),
            target,
        })
    }

    /// Checks that the tensor in the file at `path` is where the index places it.
    pub(super) fn check_place(&self, tensor: &str, path: &Path) -> Result<(), HfError> {
        let Some(index) = self.index.as_ref().filter(|_| self.only.is_none()) else {
            return Ok(());
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match index.weight_map.get(tensor) {
            Some(expected) if *expected != name => Err(HfError::Index {
                tensor: tensor.into(),
                expected: expected.clone(),
                found: format!("in {name:?}"),
            }),
            _ => Ok(()),
        }
    }
}

fn parse_index(json: &[u8]) -> Result<ShardIndex, HfError> {
    let index: ShardIndex = serde_json::from_slice(json).map_err(|error| HfError::Json {
        file: INDEX.into(),
        message: error.to_string(),
    })?;
    let mut files: Vec<&String> = index.weight_map.values().collect();
    files.sort_unstable();
    files.dedup();
    if files.len() > MAX_SHARDS || files.is_empty() {
        return Err(HfError::Value {
            file: INDEX,
            key: "weight_map".into(),
            value: format!("over {} files", files.len()),
            reason: format!("there must be from 1 to {MAX_SHARDS}"),
        });
    }
    // Other systems' separators, too: a folder may travel.
    let plain = |name: &str| {
        let mut components = Path::new(name).components();
        matches!(
            (components.next(), components.next()),
            (Some(Component::Normal(_)), None)
        ) && !name.contains(['/', '\\', '\0', ':'])
            && has_extension(Path::new(name), "safetensors")
    };
    if let Some(name) = files.into_iter().find(|name| !plain(name)) {
        return Err(HfError::ShardName { name: name.clone() });
    }
    Ok(index)
}

/// The names of the files in an index.
///
/// # Errors
/// If it is malformed or names something outside the folder.
pub fn files_of_index(json: &[u8]) -> Result<Vec<String>, HfError> {
    let mut files: Vec<String> = parse_index(json)?.weight_map.into_values().collect();
    files.sort_unstable();
    files.dedup();
    Ok(files)
}
