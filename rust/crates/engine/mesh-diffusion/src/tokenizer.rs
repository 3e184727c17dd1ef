//! CLIP's tokenizer: text to the tokens of Stable Diffusion's text encoders.
//!
//! The tokens are those of transformers' `CLIPTokenizer`: text is cleaned, lower-cased, cut into words by a pattern, and the
//! bytes of each word are merged by rank, the last one with the mark `</w>`. In one thing it differs: text never becomes a
//! control token, so `<|endoftext|>` in a prompt is a word like others.

mod clean;
mod files;

use fancy_regex::Regex;
use tokenizers::Model as _;
use tokenizers::models::bpe::BPE;

use self::clean::Cleaner;
pub(crate) use self::files::byte_chars;
use self::files::{Merges, Vocab};

/// CLIP's tokenizer.
pub struct ClipTokenizer {
    model: BPE,
    words: Regex,
    cleaner: Cleaner,
    start: u32,
    end: u32,
}

/// Errors of reading a tokenizer's files and of tokenising.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages name the fields")]
pub enum TokenizerError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        path: String,
        source: std::io::Error,
    },
    /// A file is larger than any such file.
    #[error("{path} has over {limit} bytes, which no tokenizer of CLIP has")]
    TooLarge { path: String, limit: u64 },
    /// The folder has no tokenizer.
    #[error("{folder} has neither vocab.json with merges.txt nor tokenizer.json")]
    Missing { folder: String },
    /// Content that is not a tokenizer of CLIP.
    #[error("the tokenizer's {file}: {message}")]
    Malformed { file: &'static str, message: String },
    /// Tokenising failed.
    #[error("a text cannot be tokenised: {0}")]
    Encode(String),
    /// The text has too many tokens.
    #[error("the text has over {limit} tokens; shorten it")]
    TooManyTokens { limit: usize },
}

impl ClipTokenizer {
    /// Reads a folder with `vocab.json` and `merges.txt`, else `tokenizer.json`: the folder `tokenizer` or `tokenizer_2` of a
    /// pipeline.
    ///
    /// # Errors
    /// If the files are missing, unreadable or no tokenizer of CLIP.
    pub fn open(folder: &std::path::Path) -> Result<Self, TokenizerError> {
        let has = |name: &str| folder.join(name).is_file();
        if has("vocab.json") && has("merges.txt") {
            let vocab = files::read(&folder.join("vocab.json"))?;
            let merges = files::read(&folder.join("merges.txt"))?;
            return Self::from_vocab(&vocab, &merges);
        }
        if has("tokenizer.json") {
            return Self::from_json(&files::read(&folder.join("tokenizer.json"))?);
        }
        Err(TokenizerError::Missing {
            folder: folder.display().to_string(),
        })
    }

    /// A tokenizer from the contents of `vocab.json` and `merges.txt`.
    ///
    /// # Errors
    /// If they are not those of a tokenizer of CLIP.
    pub fn from_vocab(vocab: &[u8], merges: &[u8]) -> Result<Self, TokenizerError> {
        let vocab = files::vocab(vocab)?;
        let merges = files::merges(merges, &vocab)?;
        Self::build(vocab, merges)
    }

    /// A tokenizer from the content of `tokenizer.json`, of which the vocabulary and the merges count.
    ///
    /// # Errors
    /// If it is not that of a tokenizer of CLIP.
    pub fn from_json(json: &[u8]) -> Result<Self, TokenizerError> {
        let (vocab, merges) = files::tokenizer_json(json)?;
        Self::build(vocab, merges)
    }

    fn build(vocab: Vocab, merges: Merges) -> Result<Self, TokenizerError> {
        let special = |token: &str| {
            vocab
                .get(token)
                .copied()
                .ok_or_else(|| TokenizerError::Malformed {
                    file: "vocabulary",
                    message: format!("token {token} is missing"),
                })
        };
        let (start, end) = (special(START)?, special(END)?);
        for byte in byte_chars() {
            special(&byte.to_string())?;
            special(&format!("{byte}{END_OF_WORD}"))?;
        }
        let model = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .end_of_word_suffix(END_OF_WORD.to_owned())
            .cache_capacity(CACHED_WORDS)
            .build();
        Ok(ClipTokenizer {
            model: model.map_err(|error| TokenizerError::Malformed {
                file: "merges",
                message: error.to_string(),
            })?,
            words: Regex::new(WORDS).expect("the pattern is valid"),
            cleaner: Cleaner::new(),
            start,
            end,
        })
    }

    /// Token that begins every sequence.
    pub fn start(&self) -> u32 {
        self.start
    }

    /// Token that ends every sequence.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// The tokens of `text`, without those that begin and end a sequence.
    ///
    /// # Errors
    /// If there are more than `limit`.
    pub fn encode(&self, text: &str, limit: usize) -> Result<Vec<u32>, TokenizerError> {
        let failed = |error: String| TokenizerError::Encode(error);
        let text = self.cleaner.clean(text).map_err(failed)?;
        let mut tokens = Vec::new();
        for word in self.words.find_iter(&text) {
            let word = word.map_err(|error| failed(error.to_string()))?;
            let spelled: String = word.as_str().bytes().map(files::byte_char).collect();
            let of_word = self.model.tokenize(&spelled);
            let of_word = of_word.map_err(|error| failed(error.to_string()))?;
            tokens.extend(of_word.iter().map(|token| token.id));
            if tokens.len() > limit {
                return Err(TokenizerError::TooManyTokens { limit });
            }
        }
        Ok(tokens)
    }
}

impl std::fmt::Debug for ClipTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClipTokenizer")
            .field("start", &self.start)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
const END_OF_WORD: &str = "</w>";
/// CLIP's words: English endings, letters, single digits, anything else that is not space.
const WORDS: &str = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+";
const CACHED_WORDS: usize = 2000;
