//! Embedding models: a BERT-family encoder in a Hugging Face folder.
//!
//! | file | what is read from it |
//! |---|---|
//! | `config.json` | the network's shape |
//! | `model.safetensors` | its weights |
//! | `tokenizer.json` | its tokenizer |
//! | `modules.json`, `1_Pooling/config.json` | pooling and normalisation (sentence-transformers) |
//! | `sentence_bert_config.json`, `tokenizer_config.json` | maximum tokens; lower case or not |
//! | `config_sentence_transformers.json` | texts that are put in front, such as e5's `query: ` |
//!
//! The last three rows may be missing. Nothing in any of them is trusted.

mod config;
mod error;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

pub use config::{Activation, EncoderConfig, Pooling, Sentences};
pub use error::EncoderError;

use crate::safetensors::Safetensors;

/// An embedding model's folder, opened: everything is in memory except the weights, which stay in the file.
#[derive(Debug)]
pub struct EncoderModel {
    folder: PathBuf,
    config: EncoderConfig,
    sentences: Sentences,
    tokenizer: Tokenizer,
    /// Token ids that begin and end every sequence.
    begin: Vec<u32>,
    end: Vec<u32>,
    tensors: Safetensors,
    /// Digest of the small files.
    digest: String,
}

/// Result of tokenising a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenised {
    /// Token ids with those that begin and end a sequence.
    pub tokens: Vec<u32>,
    /// True if the text was longer than the model accepts and was cut.
    pub truncated: bool,
}

impl EncoderModel {
    /// Opens the model in `folder`.
    ///
    /// # Errors
    /// If a file is missing, too large or malformed, or says something that is not supported.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, EncoderError> {
        let folder = folder.as_ref().to_path_buf();
        let mut digest = Sha256::new();
        let mut read = |name: &str, limit: u64| -> Result<Option<Vec<u8>>, EncoderError> {
            let bytes = config::read(&folder.join(name), limit)?;
            if let Some(bytes) = &bytes {
                digest.update((name.len() as u64).to_le_bytes());
                digest.update(name);
                digest.update((bytes.len() as u64).to_le_bytes());
                digest.update(bytes);
            }
            Ok(bytes)
        };
        let needed = |name: &str, bytes: Option<Vec<u8>>| {
            bytes.ok_or_else(|| EncoderError::MissingFile {
                path: folder.join(name),
            })
        };
        let main = needed(CONFIG, read(CONFIG, config::LIMIT)?)?;
        let config = EncoderConfig::parse(&main)?;
        let sentences = Sentences::parse(&mut read, &config)?;
        let tokenizer = needed(TOKENIZER, read(TOKENIZER, TOKENIZER_LIMIT)?)?;
        let tokenizer = load_tokenizer(&tokenizer)?;
        let (begin, end) = ends(&tokenizer)?;
        let added = begin.len() + end.len();
        if added >= sentences.max_tokens {
            return Err(EncoderError::Unsupported {
                what: format!(
                    "a sequence of {} tokens, {added} of which the tokenizer adds",
                    sentences.max_tokens
                ),
                remedy: "set max_seq_length in sentence_bert_config.json to more",
            });
        }
        let weights = folder.join(WEIGHTS);
        if !weights.exists() {
            return Err(EncoderError::MissingFile { path: weights });
        }
        let tensors = Safetensors::open(weights)?;
        Ok(EncoderModel {
            digest: HEXLOWER.encode(&digest.finalize()),
            folder,
            config,
            sentences,
            tokenizer,
            begin,
            end,
            tensors,
        })
    }

    /// Name of the model, that of its folder.
    pub fn name(&self) -> String {
        name(&self.folder)
    }

    /// Shape of the network.
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// Settings between texts and vectors.
    pub fn sentences(&self) -> &Sentences {
        &self.sentences
    }

    /// Weights of the network.
    pub fn tensors(&self) -> &Safetensors {
        &self.tensors
    }

    /// The file with the weights.
    pub fn weights_path(&self) -> PathBuf {
        self.folder.join(WEIGHTS)
    }

    /// SHA-256 over all files of the model, given that of its weights: what two replicas have in common.
    pub fn fingerprint(&self, weights: &str) -> String {
        let mut digest = Sha256::new();
        digest.update(&self.digest);
        digest.update(weights);
        HEXLOWER.encode(&digest.finalize())
    }

    /// Replaces the model's prompts, for models whose files have none.
    pub fn set_prompts(&mut self, prompts: BTreeMap<String, String>) {
        self.sentences.prompts = prompts;
    }

    /// The tokens of `text` behind the prompt called `prompt`, or behind the model's default one if it has
    /// one. Texts longer than the model takes lose their end, as in sentence-transformers.
    ///
    /// # Errors
    /// If there is no such prompt, or the text is over [`TEXT_LIMIT`] bytes.
    pub fn tokenise(&self, text: &str, prompt: Option<&str>) -> Result<Tokenised, EncoderError> {
        let prefix = self.sentences.prompt(prompt)?;
        if text.len() > TEXT_LIMIT {
            return Err(EncoderError::TextTooLong {
                bytes: text.len(),
                limit: TEXT_LIMIT,
            });
        }
        let mut beginning = BYTES_A_TOKEN * self.sentences.max_tokens;
        // What is behind the last token that the model takes is not tokenised: as much of the text as holds
        // enough tokens.
        loop {
            let begins = beginning_of(text, beginning);
            let tokens = self.tokens(prefix, begins)?;
            if begins.len() == text.len() {
                return Ok(self.wrap(&tokens));
            }
            // Where it was cut, the last tokens may not be those of the whole.
            if tokens.len() >= self.sentences.max_tokens + MARGIN {
                return Ok(Tokenised {
                    truncated: true,
                    ..self.wrap(&tokens)
                });
            }
            beginning = 4 * begins.len();
        }
    }

    fn tokens(&self, prefix: &str, text: &str) -> Result<Vec<u32>, EncoderError> {
        let mut whole;
        let mut text = text;
        if !prefix.is_empty() {
            whole = format!("{prefix}{text}");
            text = &whole;
        }
        if self.sentences.lower_case {
            whole = text.to_lowercase();
            text = &whole;
        }
        let encoding =
            self.tokenizer
                .encode_fast(text, false)
                .map_err(|error| EncoderError::Tokenizer {
                    message: error.to_string(),
                })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Prepares a sequence of the client's own token ids. Tokens that begin and end a sequence are added if
    /// missing.
    ///
    /// # Errors
    /// If an id is outside the vocabulary.
    pub fn wrap_tokens(&self, tokens: &[u32]) -> Result<Tokenised, EncoderError> {
        if let Some(&token) = tokens
            .iter()
            .find(|&&token| token as usize >= self.config.vocab)
        {
            return Err(EncoderError::NoSuchToken {
                token,
                vocab: self.config.vocab,
            });
        }
        let inner = tokens
            .strip_prefix(self.begin.as_slice())
            .and_then(|rest| rest.strip_suffix(self.end.as_slice()));
        Ok(self.wrap(inner.unwrap_or(tokens)))
    }

    fn wrap(&self, inner: &[u32]) -> Tokenised {
        let room = self.sentences.max_tokens - self.begin.len() - self.end.len();
        let kept = &inner[..inner.len().min(room)];
        Tokenised {
            tokens: [&self.begin, kept, &self.end].concat(),
            truncated: kept.len() < inner.len(),
        }
    }
}

/// The first `bytes` bytes of `text` and the rest of the word there; all of it if no blank follows.
fn beginning_of(text: &str, bytes: usize) -> &str {
    let Some(behind) = text.get(text.floor_char_boundary(bytes)..) else {
        return text;
    };
    match behind.find(char::is_whitespace) {
        Some(blank) => &text[..text.len() - behind.len() + blank],
        None => text,
    }
}

/// The folder that `name` refers to, if it has a BERT-family encoder: a path, or a folder in one of `dirs`.
pub fn find(name: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    let inside = dirs
        .iter()
        .map(|dir| dir.join(name))
        .filter(|_| !name.is_empty() && !name.contains(".."));
    std::iter::once(PathBuf::from(name))
        .chain(inside)
        .find(|path| path.is_dir() && is_encoder(path))
}

/// True if `folder` holds a BERT-family encoder according to its `config.json`.
pub fn is_encoder(folder: &Path) -> bool {
    let bytes = config::read(&folder.join(CONFIG), config::LIMIT);
    bytes.is_ok_and(|bytes| bytes.is_some_and(|bytes| config::is_encoder(&bytes)))
}

fn name(folder: &Path) -> String {
    let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.to_path_buf());
    folder
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

fn load_tokenizer(bytes: &[u8]) -> Result<Tokenizer, EncoderError> {
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| EncoderError::Tokenizer {
        message: error.to_string(),
    })?;
    // A text to embed is data: the name of a control token in it is text, too.
    tokenizer.set_encode_special_tokens(true);
    // Truncation and padding depend on the settings at saving; sequences are cut here, and nothing is padded.
    tokenizer.with_padding(None);
    tokenizer
        .with_truncation(None)
        .map_err(|error| EncoderError::Tokenizer {
            message: error.to_string(),
        })?;
    Ok(tokenizer)
}

/// The tokens that the tokenizer puts around a text.
fn ends(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>), EncoderError> {
    let encode = |special| {
        let encoding = tokenizer.encode_fast("a", special);
        encoding.map_err(|error| EncoderError::Tokenizer {
            message: error.to_string(),
        })
    };
    let (bare, whole) = (encode(false)?, encode(true)?);
    let (bare, whole) = (bare.get_ids(), whole.get_ids());
    let at = (0..=whole.len().saturating_sub(bare.len()))
        .find(|&at| whole[at..].starts_with(bare))
        .filter(|_| whole.len() >= bare.len())
        .ok_or_else(|| EncoderError::Tokenizer {
            message: "its post-processor does not keep a text's tokens together".into(),
        })?;
    Ok((whole[..at].to_vec(), whole[at + bare.len()..].to_vec()))
}

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const WEIGHTS: &str = "model.safetensors";

/// More than most tokens have.
const BYTES_A_TOKEN: usize = 8;
/// Tokens at the end of a part of a text that may be others than in the whole.
const MARGIN: usize = 64;

/// The largest tokenizer known to us, of 250,000 tokens, takes 17 MB.
const TOKENIZER_LIMIT: u64 = 64 << 20;

/// Maximum length of a text in bytes. No model here reads more than 8,192 tokens; tokenising more is wasted
/// work.
pub const TEXT_LIMIT: usize = 256 << 10;
