//! `/v1/embeddings`: parses the body, and writes the answer. DCF tasks of kind `embed` are read and answered
//! alike.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mesh_api::{CreateEmbeddingResponse, Embedding, EmbeddingUsage, Vector};
use mesh_control::fair::Origin;
use mesh_proto::{EmbedInput, EmbedText, TokenList};

use crate::api::fields::{Api, Fields, check};
use crate::api::invalid::Invalid;
use crate::api::json;
use crate::api::text_inputs::{TextInput, text_inputs};
use crate::flight::task::{EmbedTask, Embedded};

/// A checked request for embeddings.
#[derive(Debug, Clone, PartialEq)]
pub struct AskedEmbeddings {
    /// Model and texts.
    pub task: EmbedTask,
    /// Vectors in base64 of little-endian f32, instead of as numbers.
    pub base64: bool,
    /// Fields that mean nothing here.
    pub ignored: Vec<String>,
}

impl AskedEmbeddings {
    /// Reads a body.
    ///
    /// # Errors
    /// [`Invalid`] names the field that is wrong or not supported.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        let object = json::object(body)?;
        let fields = Fields::of(&object);
        let ignored = check(Api::Embeddings, fields)?;
        let ignored = ignored.into_iter().map(str::to_owned).collect();
        Ok(Self {
            ignored,
            ..Self::of_fields(fields)?
        })
    }

    /// Reads the fields of a body or of a DCF task.
    ///
    /// # Errors
    /// As [`AskedEmbeddings::parse`].
    pub(crate) fn of_fields(fields: Fields<'_>) -> Result<Self, Invalid> {
        let base64 = match fields.text("encoding_format")? {
            None | Some("float") => false,
            Some("base64") => true,
            Some(other) => {
                let text =
                    format!("'encoding_format' must be \"float\" or \"base64\", not {other:?}");
                return Err(Invalid::new("encoding_format", text));
            }
        };
        // `user` only names the client's own user: its type is checked, and its value is not used.
        fields.text("user")?;
        // sentence-transformers' name for the same.
        let prompt_name = fields.name("input_type")?.or(fields.name("prompt_name")?);
        Ok(AskedEmbeddings {
            task: EmbedTask {
                id: String::new(),
                model: fields.name("model")?.map(str::to_owned),
                inputs: inputs(fields)?,
                prompt_name: prompt_name.unwrap_or_default().to_owned(),
                dimensions: fields.whole("dimensions", 1..=u32::MAX)?.unwrap_or(0),
                origin: Origin::Unknown,
                holder: None,
            },
            base64,
            ignored: Vec::new(),
        })
    }

    /// Body of the answer, JSON.
    pub(crate) fn answer(&self, embedded: &Embedded) -> Vec<u8> {
        let size = (embedded.dimensions as usize * 4).max(1);
        let vectors = embedded.vectors.chunks_exact(size).enumerate();
        let answer = CreateEmbeddingResponse {
            object: "list".into(),
            data: vectors
                .map(|(index, bytes)| Embedding {
                    object: "embedding".into(),
                    index,
                    embedding: if self.base64 {
                        Vector::Base64(STANDARD.encode(bytes))
                    } else {
                        let floats = bytes.as_chunks::<4>().0.iter();
                        Vector::Floats(floats.map(|b| f32::from_le_bytes(*b)).collect())
                    },
                })
                .collect(),
            model: embedded.model.as_str().into(),
            usage: EmbeddingUsage {
                prompt_tokens: embedded.tokens,
                total_tokens: embedded.tokens,
            },
        };
        serde_json::to_vec(&answer).expect("our own types are JSON and a Vec takes all of it")
    }
}

fn inputs(fields: Fields<'_>) -> Result<Vec<EmbedInput>, Invalid> {
    let shapes = "'input' must be a string, an array of strings, an array of token ids, or an array of arrays of token ids";
    let too_many = |count| {
        let text = format!("{count} inputs are more than the limit of {MOST_INPUTS}");
        Invalid::new("input", text)
    };
    let inputs = text_inputs(fields, "input", shapes, (MOST_INPUTS, too_many))?;
    let is_empty = |input: &TextInput| match input {
        TextInput::Text(text) => text.is_empty(),
        TextInput::Tokens(tokens) => tokens.is_empty(),
    };
    if inputs.is_empty() || inputs.iter().any(is_empty) {
        let text = "'input' must not be empty, nor may any text in it be";
        return Err(Invalid::new("input", text));
    }
    let input = |input| EmbedInput {
        text: Some(match input {
            TextInput::Text(text) => EmbedText::Text(text),
            TextInput::Tokens(tokens) => EmbedText::Tokens(TokenList { tokens }),
        }),
    };
    Ok(inputs.into_iter().map(input).collect())
}

/// As many as the OpenAI API takes.
const MOST_INPUTS: usize = 2048;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parse(body: Value) -> Result<AskedEmbeddings, Invalid> {
        AskedEmbeddings::parse(body.to_string().as_bytes())
    }

    #[test]
    fn inputs_come_in_four_shapes() {
        let count =
            |input: Value| parse(json!({"input": input})).map(|asked| asked.task.inputs.len());
        assert_eq!(count(json!("a")), Ok(1));
        assert_eq!(count(json!(["a", "b"])), Ok(2));
        assert_eq!(count(json!([1, 2, 3])), Ok(1));
        assert_eq!(count(json!([[1], [2, 3]])), Ok(2));
        for wrong in [
            json!(""),
            json!([]),
            json!(["a", ""]),
            json!([[]]),
            json!(["a", 1]),
            json!([1, "a"]),
            json!([[-1]]),
            json!(5),
            json!({}),
            json!([null]),
            json!(vec!["x"; 2049]),
        ] {
            assert_eq!(count(wrong.clone()).unwrap_err().param, "input", "{wrong}");
        }
    }

    #[test]
    fn inputs_are_counted_before_they_are_read() {
        let most = parse(json!({"input": vec!["x"; MOST_INPUTS]})).unwrap();
        assert_eq!(most.task.inputs.len(), MOST_INPUTS);
        let mut inputs = vec![json!("x"); MOST_INPUTS];
        inputs.push(json!(1));
        let invalid = parse(json!({"input": inputs})).unwrap_err();
        assert!(invalid.message.contains("2049 inputs"), "{invalid}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (extra, param) in [
            (json!({"encoding_format": "hex"}), "encoding_format"),
            (json!({"encoding_format": 1}), "encoding_format"),
            (json!({"dimensions": 0}), "dimensions"),
            (json!({"dimensions": "x"}), "dimensions"),
            (json!({"model": 5}), "model"),
            (json!({"user": 5}), "user"),
            (json!({"input_type": 5}), "input_type"),
            (json!({"input": null}), "input"),
        ] {
            let mut body = json!({"input": "x"});
            body.as_object_mut()
                .unwrap()
                .extend(extra.as_object().unwrap().clone());
            assert_eq!(parse(body).unwrap_err().param, param);
        }
        assert_eq!(AskedEmbeddings::parse(b"[]").unwrap_err().param, "body");
    }

    #[test]
    fn both_encodings_say_the_same() {
        let embedded = Embedded {
            model: "m".into(),
            dimensions: 2,
            vectors: [0.25_f32, -1.0, 3.5, 0.1]
                .iter()
                .flat_map(|x| x.to_le_bytes())
                .collect(),
            tokens: 7,
        };
        let answer = |format: &str| -> Value {
            let asked = parse(json!({"input": ["a", "b"], "encoding_format": format})).unwrap();
            serde_json::from_slice(&asked.answer(&embedded)).unwrap()
        };
        assert_eq!(
            answer("float"),
            json!({
                "object": "list", "model": "m", "usage": {"prompt_tokens": 7, "total_tokens": 7},
                "data": [
                    {"object": "embedding", "index": 0, "embedding": [0.25, -1.0]},
                    {"object": "embedding", "index": 1, "embedding": [3.5, 0.1]},
                ],
            })
        );
        let coded = answer("base64")["data"][1]["embedding"]
            .as_str()
            .unwrap()
            .to_owned();
        assert_eq!(STANDARD.decode(coded).unwrap(), embedded.vectors[8..]);
    }
}
