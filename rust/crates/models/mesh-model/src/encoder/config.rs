//! Configuration of an embedding model, from the JSON files of its folder.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use serde::Deserialize;

use super::error::EncoderError;
use crate::file::read_limited;

/// The shape of a BERT-family encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    /// `bert`, `roberta` or `xlm-roberta`.
    pub architecture: String,
    /// Number of transformer layers.
    pub layers: usize,
    /// Length of a hidden row.
    pub hidden: usize,
    /// Width between the halves of a feed-forward layer.
    pub intermediate: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Number of tokens in the vocabulary.
    pub vocab: usize,
    /// Number of rows of the position table.
    pub positions: usize,
    /// Row of that table for a sequence's first token: RoBERTa counts from its padding token's id plus one.
    pub first_position: usize,
    /// Number of rows of the token type table; every token is of type 0.
    pub token_types: usize,
    /// Epsilon of the layer norms.
    pub norm_eps: f32,
    /// Activation between the halves of a feed-forward layer.
    pub activation: Activation,
}

/// The function between the halves of a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Exact GELU, with the normal distribution.
    Gelu,
    /// GELU in its tanh form.
    GeluTanh,
    /// ReLU: `max(x, 0)`.
    Relu,
}

/// Reduction of a text's rows to one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of all rows.
    Mean,
    /// The first row: that of `[CLS]`, or of the token in its place.
    Cls,
}

/// Settings between texts and vectors: pooling, normalisation, limits and prompts.
#[derive(Debug, Clone, PartialEq)]
pub struct Sentences {
    /// Reduction of rows to one vector.
    pub pooling: Pooling,
    /// Vectors are scaled to length 1.
    pub normalise: bool,
    /// Maximum tokens of a text, including those that begin and end a sequence.
    pub max_tokens: usize,
    /// Text is converted to lower case before tokenising.
    pub lower_case: bool,
    /// Prompts to put before texts, by name.
    pub prompts: BTreeMap<String, String>,
    /// Name of the prompt to use if none is given.
    pub default_prompt: Option<String>,
}

/// Reads the file at `path` if it exists.
pub(super) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, EncoderError> {
    read_limited(path, limit).map_err(|source| match source.kind() {
        ErrorKind::FileTooLarge => EncoderError::TooLarge {
            path: path.into(),
            bytes: std::fs::metadata(path).map_or(limit, |found| found.len()),
            limit,
        },
        _ => EncoderError::Read {
            path: path.into(),
            source,
        },
    })
}

/// Fields of `config.json`.
#[derive(Deserialize)]
struct MainFile {
    model_type: Option<String>,
    hidden_size: Option<u64>,
    num_hidden_layers: Option<u64>,
    num_attention_heads: Option<u64>,
    intermediate_size: Option<u64>,
    vocab_size: Option<u64>,
    max_position_embeddings: Option<u64>,
    type_vocab_size: Option<u64>,
    layer_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    position_embedding_type: Option<String>,
    pad_token_id: Option<u64>,
    #[serde(default)]
    is_decoder: bool,
}

/// True if this `config.json` is of a supported encoder.
pub(super) fn is_encoder(bytes: &[u8]) -> bool {
    serde_json::from_slice::<MainFile>(bytes).is_ok_and(|main| {
        let known = |ty: &String| ARCHITECTURES.contains(&ty.as_str());
        !main.is_decoder && main.model_type.as_ref().is_some_and(known)
    })
}

impl EncoderConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// If it is not JSON, lacks a key, or has a value that is out of range or not supported.
    pub fn parse(bytes: &[u8]) -> Result<Self, EncoderError> {
        let main: MainFile = json(CONFIG, bytes)?;
        let architecture = main.model_type.unwrap_or_default();
        if !ARCHITECTURES.contains(&architecture.as_str()) || main.is_decoder {
            return Err(EncoderError::Unsupported {
                what: format!("the architecture {architecture:?}"),
                remedy: "use an encoder of type bert, roberta or xlm-roberta",
            });
        }
        if let Some(kind) = main
            .position_embedding_type
            .filter(|kind| kind != "absolute")
        {
            return Err(EncoderError::Unsupported {
                what: format!("positions of type {kind:?}"),
                remedy: "use a model with absolute positions",
            });
        }
        let activation = match main.hidden_act.as_deref() {
            Some("gelu") | None => Activation::Gelu,
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Activation::GeluTanh,
            Some("relu") => Activation::Relu,
            Some(other) => {
                return Err(EncoderError::Unsupported {
                    what: format!("the activation {other:?}"),
                    remedy: "use a model with gelu, gelu_new, gelu_pytorch_tanh or relu",
                });
            }
        };
        let hidden = number("hidden_size", main.hidden_size, 16..=8192)?;
        let heads = number("num_attention_heads", main.num_attention_heads, 1..=256)?;
        if !hidden.is_multiple_of(heads) || !(hidden / heads).is_multiple_of(16) {
            return Err(EncoderError::Unsupported {
                what: format!("{heads} heads over a width of {hidden}"),
                remedy: "use a model whose heads are a multiple of 16 wide",
            });
        }
        let positions = number(
            "max_position_embeddings",
            main.max_position_embeddings,
            1..=65_536,
        )?;
        let first_position = if architecture == "bert" {
            0
        } else {
            number("pad_token_id", main.pad_token_id.or(Some(1)), 0..=65_535)? + 1
        };
        if first_position >= positions {
            return Err(EncoderError::Value {
                file: CONFIG,
                key: "pad_token_id",
                value: first_position as u64 - 1,
                need: "positions begin behind it and must fit max_position_embeddings",
            });
        }
        let norm_eps = main.layer_norm_eps.unwrap_or(1e-12);
        if !(0.0..=0.1).contains(&norm_eps) {
            return Err(EncoderError::Unsupported {
                what: format!("layer_norm_eps = {norm_eps}"),
                remedy: "use a model where it is from 0 to 0.1",
            });
        }
        Ok(EncoderConfig {
            architecture,
            layers: number("num_hidden_layers", main.num_hidden_layers, 1..=256)?,
            hidden,
            intermediate: number("intermediate_size", main.intermediate_size, 16..=65_536)?,
            heads,
            vocab: number("vocab_size", main.vocab_size, 1..=4_194_304)?,
            positions,
            first_position,
            token_types: number("type_vocab_size", main.type_vocab_size.or(Some(1)), 1..=256)?,
            norm_eps: norm_eps as f32,
            activation,
        })
    }

    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }
}

#[derive(Deserialize)]
struct ModuleEntry {
    #[serde(default)]
    path: String,
    #[serde(rename = "type", default)]
    kind: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct PoolingFile {
    pooling_mode_cls_token: bool,
    pooling_mode_mean_tokens: bool,
    pooling_mode_max_tokens: bool,
    pooling_mode_mean_sqrt_len_tokens: bool,
    pooling_mode_weightedmean_tokens: bool,
    pooling_mode_lasttoken: bool,
    /// Newer files say it in one word.
    pooling_mode: Option<String>,
    include_prompt: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct SentenceBertFile {
    max_seq_length: Option<u64>,
    do_lower_case: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct TokenizerFile {
    /// Files of models without a limit have 1e30 here.
    model_max_length: Option<f64>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct PromptsFile {
    prompts: Option<BTreeMap<String, String>>,
    default_prompt_name: Option<String>,
}

impl Sentences {
    /// Reads the files that say it through `read`, which gives `None` for one that is not there.
    ///
    /// # Errors
    /// If a file is malformed, or says something that is not supported.
    pub fn parse(
        mut read: impl FnMut(&str, u64) -> Result<Option<Vec<u8>>, EncoderError>,
        config: &EncoderConfig,
    ) -> Result<Self, EncoderError> {
        let (mut pooling, mut normalise) = (Pooling::Mean, false);
        if let Some(bytes) = read(MODULES, LIMIT)? {
            let modules: Vec<ModuleEntry> = json(MODULES, &bytes)?;
            for module in &modules {
                match module.kind.rsplit('.').next().unwrap_or_default() {
                    "Transformer" => {}
                    "Normalize" => normalise = true,
                    "Pooling" => pooling = read_pooling(&module.path, &mut read)?,
                    other => {
                        return Err(EncoderError::Unsupported {
                            what: format!("a module {other:?} in modules.json"),
                            remedy: "use a model of Transformer, Pooling and Normalize",
                        });
                    }
                }
            }
        }
        let sentence: SentenceBertFile = optional(SENTENCE_BERT, &mut read)?;
        let tokenizer: TokenizerFile = optional(TOKENIZER_CONFIG, &mut read)?;
        let prompts: PromptsFile = optional(PROMPTS, &mut read)?;
        let most = config.positions - config.first_position;
        let said = sentence.max_seq_length.map(|most| most as f64);
        let max_tokens = match said.or(tokenizer.model_max_length) {
            // The comparison is false for NaN, too.
            Some(limit) if limit >= 1.0 && limit < most as f64 => limit as usize,
            Some(limit) if limit < 1.0 => {
                return Err(EncoderError::Value {
                    file: SENTENCE_BERT,
                    key: "max_seq_length",
                    value: 0,
                    need: "it must be at least 1",
                });
            }
            _ => most,
        };
        let sentences = Sentences {
            pooling,
            normalise,
            max_tokens,
            lower_case: sentence.do_lower_case,
            prompts: prompts.prompts.unwrap_or_default(),
            default_prompt: prompts.default_prompt_name,
        };
        sentences.prompt(None)?;
        Ok(sentences)
    }

    /// The text of the prompt called `name`, or of the default prompt without a name; empty if there is no
    /// default.
    ///
    /// # Errors
    /// If there is no prompt of that name.
    pub fn prompt(&self, name: Option<&str>) -> Result<&str, EncoderError> {
        let Some(name) = name.or(self.default_prompt.as_deref()) else {
            return Ok("");
        };
        let found = self.prompts.get(name);
        found
            .map(String::as_str)
            .ok_or_else(|| EncoderError::NoSuchPrompt {
                name: name.to_owned(),
                known: self.prompts.keys().cloned().collect(),
            })
    }
}

fn read_pooling(
    folder: &str,
    read: &mut impl FnMut(&str, u64) -> Result<Option<Vec<u8>>, EncoderError>,
) -> Result<Pooling, EncoderError> {
    // A name from a file: it must not lead out of the model's folder.
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if folder.len() > 64 || !folder.chars().all(plain) {
        return Err(EncoderError::Json {
            file: MODULES,
            message: format!("the path {folder:?} of the Pooling module is no plain folder name"),
        });
    }
    let name = format!("{folder}/config.json");
    let Some(bytes) = read(name.trim_start_matches('/'), LIMIT)? else {
        return Ok(Pooling::Mean);
    };
    let file: PoolingFile = json(POOLING, &bytes)?;
    let modes = [
        (file.pooling_mode_cls_token, "cls"),
        (file.pooling_mode_mean_tokens, "mean"),
        (file.pooling_mode_max_tokens, "max"),
        (
            file.pooling_mode_mean_sqrt_len_tokens,
            "mean_sqrt_len_tokens",
        ),
        (file.pooling_mode_weightedmean_tokens, "weightedmean"),
        (file.pooling_mode_lasttoken, "lasttoken"),
    ];
    let mut named: Vec<&str> = modes
        .iter()
        .filter(|(set, _)| *set)
        .map(|(_, name)| *name)
        .collect();
    if let Some(mode) = file.pooling_mode.as_deref() {
        named = vec![mode];
    }
    let unsupported = |what: String| EncoderError::Unsupported {
        what,
        remedy: "use a model that pools by mean or by its first token",
    };
    if file.include_prompt == Some(false) {
        return Err(unsupported("pooling that leaves prompts out".into()));
    }
    match named[..] {
        ["mean"] | [] => Ok(Pooling::Mean),
        ["cls"] => Ok(Pooling::Cls),
        _ => Err(unsupported(format!("pooling {}", named.join(" with ")))),
    }
}

fn optional<T: Default + for<'de> Deserialize<'de>>(
    file: &'static str,
    read: &mut impl FnMut(&str, u64) -> Result<Option<Vec<u8>>, EncoderError>,
) -> Result<T, EncoderError> {
    match read(file, LIMIT)? {
        Some(bytes) => json(file, &bytes),
        None => Ok(T::default()),
    }
}

fn json<T: for<'de> Deserialize<'de>>(file: &'static str, bytes: &[u8]) -> Result<T, EncoderError> {
    serde_json::from_slice(bytes).map_err(|error| EncoderError::Json {
        file,
        message: error.to_string(),
    })
}

fn number(
    key: &'static str,
    value: Option<u64>,
    range: std::ops::RangeInclusive<u64>,
) -> Result<usize, EncoderError> {
    let value = value.ok_or_else(|| EncoderError::Json {
        file: CONFIG,
        message: format!("the key {key} is missing"),
    })?;
    if !range.contains(&value) {
        return Err(EncoderError::Value {
            file: CONFIG,
            key,
            value,
            need: "no model of this kind has such a value: the file is damaged",
        });
    }
    Ok(value as usize)
}

const ARCHITECTURES: [&str; 3] = ["bert", "roberta", "xlm-roberta"];
const CONFIG: &str = "config.json";
const MODULES: &str = "modules.json";
const POOLING: &str = "the Pooling module's config.json";
const SENTENCE_BERT: &str = "sentence_bert_config.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const PROMPTS: &str = "config_sentence_transformers.json";

/// Most bytes of each of these files.
pub(super) const LIMIT: u64 = 4 << 20;
