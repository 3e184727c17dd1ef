//! A model as it is stored, in terms that do not depend on the form of its files.
//!
//! Configuration, tokenizer, chat template and weights are read through [`Checkpoint`]. There are two
//! readers: [`Gguf`] for GGUF files, whole or in parts, and [`crate::hf::HfCheckpoint`] for folders in Hugging Face's form. Keys
//! and tensors have the names that GGUF files give them
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).

use crate::gguf::{Array, Gguf, GgufError, Tensor, Tensors, Value};

/// A stored model: metadata keys, tensors, and the order of their rows.
///
/// Methods that read a key as one type give `None` if the key is absent, and fail if its value is of another
/// type.
pub trait Checkpoint {
    /// The value of a metadata key.
    fn metadata(&self, key: &str) -> Option<Value<'_>>;

    /// All tensors.
    fn tensors(&self) -> &Tensors;

    /// The tensors alone, for a model whose keys were read.
    fn into_tensors(self) -> Tensors
    where
        Self: Sized;

    /// The order of the rows of a llama's query and key matrices: which of a head's elements turn together.
    /// Other families have one order everywhere.
    fn row_order(&self) -> RopeStyle;

    /// The offset to add to Gemma's norm weights.
    fn norm_offset(&self) -> f32;

    /// The tokenizer, if it is not among the keys.
    fn tokenizer_json(&self) -> Option<&TokenizerJson> {
        None
    }

    /// The name that the files themselves have for a tensor, for messages.
    fn stored_name(&self, tensor: &str) -> String {
        tensor.to_owned()
    }

    /// The tensor with this name, which must be there.
    fn require_tensor(&self, name: &str) -> Result<Tensor<'_>, GgufError> {
        let missing = || GgufError::MissingTensor {
            tensor: self.stored_name(name),
        };
        self.tensors().get(name).ok_or_else(missing)
    }

    /// A non-negative integer of any width.
    fn unsigned(&self, key: &str) -> Result<Option<u64>, GgufError> {
        let value = self.metadata(key);
        typed(value, key, "a non-negative integer", |value| {
            value.as_unsigned()
        })
    }

    /// A float of either width, or an integer.
    fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        typed(self.metadata(key), key, "a number", |value| match value {
            Value::Float(v) => Some(v),
            Value::Unsigned(v) => Some(v as f64),
            Value::Signed(v) => Some(v as f64),
            _ => None,
        })
    }

    /// A boolean; `None` if the key is missing.
    fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        typed(self.metadata(key), key, "a bool", |value| match value {
            Value::Bool(v) => Some(v),
            _ => None,
        })
    }

    /// Text, which must be UTF-8.
    fn string(&self, key: &str) -> Result<Option<&str>, GgufError> {
        let bytes = typed(self.metadata(key), key, "a string", |value| match value {
            Value::String(v) => Some(v),
            _ => None,
        })?;
        bytes
            .map(std::str::from_utf8)
            .transpose()
            .map_err(|_| GgufError::Utf8 {
                what: format!("metadata {key:?}"),
            })
    }

    /// Text that must be there.
    fn require_string(&self, key: &str) -> Result<&str, GgufError> {
        self.string(key)?
            .ok_or_else(|| GgufError::MissingKey { key: key.into() })
    }

    /// An array; `None` if the key is missing.
    fn array(&self, key: &str) -> Result<Option<Array<'_>>, GgufError> {
        typed(self.metadata(key), key, "an array", |value| match value {
            Value::Array(v) => Some(v),
            _ => None,
        })
    }

    /// An array that must be there.
    fn require_array(&self, key: &str) -> Result<Array<'_>, GgufError> {
        self.array(key)?
            .ok_or_else(|| GgufError::MissingKey { key: key.into() })
    }
}

/// Arrangement of the pairs of a head that rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Elements 2i and 2i + 1 (llama's weights in GGUF files).
    Interleaved,
    /// Elements i and i + dim/2 (Qwen, NeoX).
    Halves,
}

/// The text of a `tokenizer.json`, with what other files say about its special tokens.
#[derive(Debug, Default)]
pub struct TokenizerJson {
    /// Contents of `tokenizer.json`.
    pub json: Vec<u8>,
    /// Special tokens of `tokenizer_config.json` and other files.
    pub special: SpecialTokens,
}

/// Special tokens, as the files beside a `tokenizer.json` name them.
#[derive(Debug, Clone, Default)]
pub struct SpecialTokens {
    /// The begin token's text.
    pub bos: Option<String>,
    /// The end token's text.
    pub eos: Option<String>,
    /// The begin token's id, if only that is known.
    pub bos_id: Option<u64>,
    /// Ids of tokens that end an answer.
    pub eos_ids: Vec<u64>,
    /// Text begins with the begin token; `None` if the files do not say.
    pub add_bos: Option<bool>,
    /// Text ends with the end token; `None` if the files do not say.
    pub add_eos: Option<bool>,
}

impl Checkpoint for Gguf {
    fn metadata(&self, key: &str) -> Option<Value<'_>> {
        Gguf::metadata(self, key)
    }

    fn tensors(&self) -> &Tensors {
        Gguf::tensors(self)
    }

    fn into_tensors(self) -> Tensors {
        Gguf::into_tensors(self)
    }

    fn row_order(&self) -> RopeStyle {
        // Converters interleave the halves of a head.
        RopeStyle::Interleaved
    }

    fn norm_offset(&self) -> f32 {
        // Converters have added it.
        0.0
    }
}

fn typed<'a, T>(
    value: Option<Value<'a>>,
    key: &str,
    wanted: &'static str,
    convert: impl FnOnce(Value<'a>) -> Option<T>,
) -> Result<Option<T>, GgufError> {
    let Some(value) = value else {
        return Ok(None);
    };
    match convert(value) {
        Some(converted) => Ok(Some(converted)),
        None => Err(GgufError::WrongType {
            key: key.into(),
            wanted,
            found: value.describe(),
        }),
    }
}
