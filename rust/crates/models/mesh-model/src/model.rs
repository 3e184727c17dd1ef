//! One model with everything that belongs to it: a GGUF file, perhaps in parts, or a folder in Hugging Face's
//! form.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use data_encoding::HEXLOWER;

use crate::chat::{ChatTemplate, Message, RenderRequest};
use crate::checkpoint::Checkpoint;
use crate::config::{ConfigError, ModelConfig};
use crate::file::{open_regular, sha256};
use crate::gguf::split::{self, PartName};
use crate::gguf::{Gguf, GgufError, Tensors};
use crate::hf::{self, HfCheckpoint, HfError};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// A model file, opened and checked: weights, shape, tokenizer and chat template. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Model {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    tensors: Tensors,
    config: ModelConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    turn_end: OnceLock<u32>,
    keeps_text: OnceLock<bool>,
    fingerprint: OnceLock<String>,
}

/// Error of a model file, with its path.
#[derive(Debug, thiserror::Error)]
#[error("model file {}: {kind}", path.display())]
pub struct ModelError {
    /// Path of the file or folder.
    pub path: PathBuf,
    /// Error of the file's contents.
    #[source]
    pub kind: ModelErrorKind,
}

/// Errors of the contents of a model file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelErrorKind {
    /// The GGUF file is invalid.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A folder in Hugging Face's form is invalid.
    #[error(transparent)]
    HuggingFace(#[from] HfError),
    /// The network is invalid or not supported.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The tokenizer is invalid or not supported.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The file could not be read to its end.
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
}

impl Model {
    /// Opens the model at `path` and checks all of it but the weights' values: a GGUF file, a split one
    /// ([`split::find`] says which paths mean it), a folder in Hugging Face's form ([`crate::hf`]), or a
    /// safetensors file in such a folder.
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
        if let Some(first) = split::find(path) {
            return Self::read(&first, Gguf::open(&first)?);
        }
        match is_folder(path) {
            true => Self::read(path, HfCheckpoint::open(path)?),
            false => Self::read(path, Gguf::open(path)?),
        }
    }

    fn read(path: &Path, checkpoint: impl Checkpoint) -> Result<Self, ModelErrorKind> {
        let config = ModelConfig::read(&checkpoint)?;
        let tokenizer = Tokenizer::read(&checkpoint, config.vocab)?;
        Ok(Model {
            inner: Arc::new(Inner {
                path: path.into(),
                config,
                template: ChatTemplate::read(&checkpoint, &tokenizer),
                tokenizer,
                tensors: checkpoint.into_tensors(),
                turn_end: OnceLock::new(),
                keeps_text: OnceLock::new(),
                fingerprint: OnceLock::new(),
            }),
        })
    }

    /// The name that users call the model by: the file's name without `.gguf`, or the folder's.
    pub fn name(&self) -> String {
        model_name(&self.inner.path)
    }

    /// Path of the file or folder; of a split file that of its first part.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The weights, under the names that GGUF files have for them.
    pub fn tensors(&self) -> &Tensors {
        &self.inner.tensors
    }

    /// The shape of the network.
    pub fn config(&self) -> &ModelConfig {
        &self.inner.config
    }

    /// Tokenizer of the model.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// Chat template of the model.
    pub fn template(&self) -> &ChatTemplate {
        &self.inner.template
    }

    /// A conversation that shows the template's output behind an answer, for [`Model::learn_turn_end`].
    pub fn turn_probe() -> RenderRequest {
        RenderRequest {
            messages: vec![
                Message::new("user", "a question"),
                Message::new("assistant", PROBE),
            ],
            add_generation_prompt: false,
            ..RenderRequest::default()
        }
    }

    /// Adds the special token that the template writes behind an answer to those that end answers; returns
    /// its name if it was new. `rendered` is the template's text of [`Model::turn_probe`]. Templates are
    /// untrusted programs, so the caller decides where they run.
    pub fn learn_turn_end(&self, rendered: &str) -> Option<String> {
        let (_, behind) = rendered.rsplit_once(PROBE)?;
        let tokenizer = self.tokenizer();
        let id = tokenizer.special_at(behind.trim_start())?;
        if tokenizer.eos_ids().contains(&id) || tokenizer.bos() == Some(id) {
            return None;
        }
        let news = self.inner.turn_end.set(id).is_ok();
        news.then(|| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned())
    }

    /// A conversation that shows whether the template writes all that users say, for
    /// [`Model::learn_keeps_text`]. It is long, in turns and in its messages, and holds what templates are
    /// known to look for.
    pub fn text_probe() -> RenderRequest {
        let turns = 0..PROBE_TURNS;
        let messages = turns.flat_map(|turn| {
            [
                Message::new("user", probe_text(turn)),
                Message::new("assistant", "ok"),
            ]
        });
        RenderRequest {
            messages: messages.take(2 * PROBE_TURNS - 1).collect(),
            add_generation_prompt: true,
            ..RenderRequest::default()
        }
    }

    /// Notes whether `rendered`, the template's text of [`Model::text_probe`], holds all of it.
    pub fn learn_keeps_text(&self, rendered: &str) {
        let all = (0..PROBE_TURNS).all(|turn| rendered.contains(&probe_text(turn)));
        let _ = self.inner.keeps_text.set(all);
    }

    /// True if the template writes all text of users to the prompt, except for blanks around it. False until
    /// the template was tried.
    pub fn keeps_text(&self) -> bool {
        self.inner.keeps_text.get() == Some(&true)
    }

    /// True if this token ends an answer.
    pub fn is_end(&self, token: u32) -> bool {
        self.tokenizer().eos_ids().contains(&token) || self.inner.turn_end.get() == Some(&token)
    }

    /// SHA-256 of the file, over the SHA-256 of all parts of a split file ([`split::fingerprint`]), or over the
    /// names and SHA-256 of all files of a folder, in hexadecimal: two workers with the same fingerprint give
    /// the same answers.
    ///
    /// Reads the whole file the first time, which takes a good second per gigabyte: call it off the start
    /// path, and keep the result.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn fingerprint(&self) -> Result<&str, ModelError> {
        if let Some(known) = self.inner.fingerprint.get() {
            return Ok(known);
        }
        let digest = self.digest().map_err(|kind| ModelError {
            path: self.inner.path.clone(),
            kind,
        })?;
        Ok(self.inner.fingerprint.get_or_init(|| digest))
    }

    fn digest(&self) -> Result<String, ModelErrorKind> {
        let path = &self.inner.path;
        if let Some(parts) = split::parts(path) {
            let digests: io::Result<Vec<String>> =
                parts.iter().map(|part| sha256_file(part)).collect();
            return Ok(split::fingerprint(&digests?));
        }
        Ok(match is_folder(path) {
            true => hf::Folder::open(path)?.fingerprint(sha256_file)?,
            false => sha256_file(path)?,
        })
    }

    /// Tells the model its fingerprint, where it was computed before.
    pub fn know_fingerprint(&self, fingerprint: &str) {
        self.inner
            .fingerprint
            .get_or_init(|| fingerprint.to_owned());
    }

    /// The fingerprint, if it is known already.
    pub fn known_fingerprint(&self) -> Option<&str> {
        self.inner.fingerprint.get().map(String::as_str)
    }
}

/// True if the model at `path` is in Hugging Face's form.
fn is_folder(path: &Path) -> bool {
    path.is_dir() || hf::is_hugging_face(path)
}

/// Turns of [`Model::text_probe`].
const PROBE_TURNS: usize = 24;

/// Text of the user in a turn of the probe.
fn probe_text(turn: usize) -> String {
    let line = format!(
        "turn {turn}: a  b\t(c) [d] {{e}} <think>f</think> g | h\n\n  \"i\" 1234567890 \u{e9}\u{1f600}\n"
    );
    format!("{}end {turn}", line.repeat(40))
}

const PROBE: &str = "PROBE42";

/// Name of the model in the file at `path`: the file's name without `.gguf` or `.safetensors`, and without the
/// numbers of a part.
pub fn model_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if let Some(part) = PartName::parse(&name) {
        return part.stem;
    }
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
    Ok(HEXLOWER.encode(&sha256(open_regular(path)?)?))
}
