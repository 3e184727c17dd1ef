//! One model file with everything in it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use sha2::{Digest, Sha256};

use crate::chat::{ChatError, ChatTemplate};
use crate::config::{ConfigError, ModelConfig};
use crate::gguf::{Gguf, GgufError};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// A model file, opened and checked: weights, shape, tokenizer and chat template. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Model {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    gguf: Gguf,
    config: ModelConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    fingerprint: OnceLock<String>,
}

/// Why a model file could not be used.
#[derive(Debug, thiserror::Error)]
#[error("model file {}: {kind}", path.display())]
pub struct ModelError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub kind: ModelErrorKind,
}

/// What is wrong with a model file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelErrorKind {
    /// The file itself.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The shape of the network.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The file could not be read to its end.
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
}

impl Model {
    /// Opens the GGUF file at `path` and checks all of it but the weights' values.
    ///
    /// # Errors
    /// If anything in it is malformed or unsupported.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ModelError> {
        let path = path.as_ref();
        Self::load(path).map_err(|kind| ModelError {
            path: path.into(),
            kind,
        })
    }

    fn load(path: &Path) -> Result<Self, ModelErrorKind> {
        let gguf = Gguf::open(path)?;
        let config = ModelConfig::from_gguf(&gguf)?;
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let template = ChatTemplate::from_gguf(&gguf, &tokenizer)?;
        Ok(Model {
            inner: Arc::new(Inner {
                path: path.into(),
                gguf,
                config,
                tokenizer,
                template,
                fingerprint: OnceLock::new(),
            }),
        })
    }

    /// The name that users call the model by: the file's name without `.gguf`.
    pub fn name(&self) -> String {
        model_name(&self.inner.path)
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The file.
    pub fn gguf(&self) -> &Gguf {
        &self.inner.gguf
    }

    /// The shape of the network.
    pub fn config(&self) -> &ModelConfig {
        &self.inner.config
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// The chat template.
    pub fn template(&self) -> &ChatTemplate {
        &self.inner.template
    }

    /// SHA-256 of the file in hexadecimal: two workers with the same fingerprint give the same answers.
    ///
    /// Reads the whole file the first time, which takes a good second per gigabyte: call it off the start path, and keep
    /// the result.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn fingerprint(&self) -> Result<&str, ModelError> {
        if let Some(known) = self.inner.fingerprint.get() {
            return Ok(known);
        }
        let digest = sha256_file(&self.inner.path).map_err(|error| ModelError {
            path: self.inner.path.clone(),
            kind: error.into(),
        })?;
        Ok(self.inner.fingerprint.get_or_init(|| digest))
    }

    /// The fingerprint, if it is known already.
    pub fn known_fingerprint(&self) -> Option<&str> {
        self.inner.fingerprint.get().map(String::as_str)
    }
}

/// The name that the model in the file at `path` goes by: the file's own without `.gguf` or `.safetensors`.
pub fn model_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    for ending in [".gguf", ".safetensors"] {
        let cut = name.len().checked_sub(ending.len());
        match cut.and_then(|cut| name.split_at_checked(cut)) {
            Some((stem, end)) if !stem.is_empty() && end.eq_ignore_ascii_case(ending) => {
                return stem.to_owned();
            }
            _ => {}
        }
    }
    name.into_owned()
}

/// SHA-256 of a file in hexadecimal.
fn sha256_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
    }
    Ok(hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}
