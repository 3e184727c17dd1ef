//! Embeddings.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::requests::TextInput;

/// Texts to embed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CreateEmbeddingRequest {
    /// A text, token ids, or up to 2,048 texts or lists of token ids. None of them is empty.
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::input"))]
    pub input: TextInput,
    /// The head's default model for embeddings if absent. At most 512 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Form of the vectors: numbers, or base64 of little-endian 32-bit floats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoding_format: Option<EncodingFormat>,
    /// First numbers of each vector to keep. The model must support that.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 4_294_967_295_u32)))]
    pub dimensions: Option<u32>,
    /// The client's own user. Has no effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Name of the model's prompt that comes before each text, such as `query`. At most 512 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_type: Option<String>,
}

/// Form of vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum EncodingFormat {
    /// Numbers.
    Float,
    /// Base64 of little-endian 32-bit floats.
    Base64,
}

/// Vectors of texts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct CreateEmbeddingResponse<'a> {
    /// Always `list`.
    pub object: Cow<'a, str>,
    /// The vectors, in the order of the texts.
    pub data: Vec<Embedding<'a>>,
    /// Name of the model.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub model: Cow<'a, str>,
    /// Tokens used.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub usage: EmbeddingUsage,
}

/// The vector of one text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Embedding<'a> {
    /// Always `embedding`.
    pub object: Cow<'a, str>,
    /// Index of the text.
    pub index: usize,
    /// The vector.
    pub embedding: Vector,
}

/// A vector, in the form that was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum Vector {
    /// Numbers.
    Floats(Vec<f32>),
    /// Base64 of little-endian 32-bit floats.
    Base64(String),
}

impl Default for Vector {
    fn default() -> Self {
        Self::Floats(Vec::new())
    }
}

/// Tokens of all texts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct EmbeddingUsage {
    /// Tokens of the texts.
    pub prompt_tokens: u64,
    /// The same.
    pub total_tokens: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_is_the_default() {
        let sent = r#"{"data": [{"embedding": [1.5]}], "model": null, "usage": null}"#;
        let read: CreateEmbeddingResponse<'_> = serde_json::from_str(sent).unwrap();
        assert_eq!(read.data[0].embedding, Vector::Floats(vec![1.5]));
        assert_eq!((&*read.model, read.usage), ("", EmbeddingUsage::default()));
    }
}
