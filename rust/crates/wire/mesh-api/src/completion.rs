//! Generated text: whole answers, and the chunks of streams.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

/// A whole answer to a chat.
pub type ChatCompletion<'a> = Envelope<'a, ChatChoice<'a>>;
/// A chunk of a streamed chat.
pub type ChatCompletionChunk<'a> = Envelope<'a, ChatChunkChoice<'a>>;
/// A continued text, whole or a chunk of a stream.
pub type Completion<'a> = Envelope<'a, CompletionChoice<'a>>;

/// A whole answer, or one chunk of a stream: the two differ in the name of `object` and in what a choice
/// holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(inline))]
pub struct Envelope<'a, C> {
    /// Id of the answer, the same in all its chunks.
    #[serde(default, deserialize_with = "crate::null::as_default")]
    pub id: Cow<'a, str>,
    /// `chat.completion`, `chat.completion.chunk` or `text_completion`.
    #[serde(default, deserialize_with = "crate::null::as_default")]
    pub object: Cow<'a, str>,
    /// Seconds since 1970.
    #[serde(default, deserialize_with = "crate::null::as_default")]
    pub created: u64,
    /// Name of the model that answers.
    #[serde(default, deserialize_with = "crate::null::as_default")]
    pub model: Cow<'a, str>,
    /// Fingerprint of the weights.
    #[serde(default)]
    pub system_fingerprint: Option<Cow<'a, str>>,
    /// The answers or their pieces; empty in the chunk that ends a stream with `usage`.
    #[serde(default)]
    pub choices: Vec<C>,
    /// Tokens used; `null` in chunks before the last when usage was asked for, left out when not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<CompletionUsage>>,
    /// Timings of the answer, an extension of the OpenAI API: in whole answers and in last chunks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
}

/// One answer to a chat.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ChatChoice<'a> {
    /// Index of the choice, below `n`.
    pub index: usize,
    /// Message of the assistant.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub message: ChatResponseMessage<'a>,
    /// Log probabilities where asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub finish_reason: Cow<'a, str>,
}

/// The message of an answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ChatResponseMessage<'a> {
    /// Always `assistant`.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub role: Cow<'a, str>,
    /// Text of the answer.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub content: Cow<'a, str>,
    /// Always `null`.
    pub refusal: Option<()>,
}

/// A piece of one answer to a chat.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ChatChunkChoice<'a> {
    /// Index of the choice, below `n`.
    pub index: usize,
    /// Difference from the chunk before.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub delta: ChatDelta<'a>,
    /// Log probabilities where asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`, in the last piece only.
    pub finish_reason: Option<Cow<'a, str>>,
}

/// New part of a message in a chunk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ChatDelta<'a> {
    /// Role of the message, in the first piece only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<Cow<'a, str>>,
    /// Text since the chunk before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<Cow<'a, str>>,
}

/// One continuation of a text, whole or a piece.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct CompletionChoice<'a> {
    /// Index of the choice: the prompts in their order, each with `n` choices.
    pub index: usize,
    /// Text of the answer, or of the piece.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub text: Cow<'a, str>,
    /// Log probabilities where asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`, in the last piece only.
    pub finish_reason: Option<Cow<'a, str>>,
}

/// Log probabilities of a chat.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ChatLogprobs {
    /// Log probabilities, one per token.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub content: Vec<ChatLogprob>,
    /// Always `null`.
    pub refusal: Option<()>,
}

/// One token's log probability.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct ChatLogprob {
    /// The alternatives have no alternatives of their own.
    #[serde(flatten)]
    pub token: LogprobToken,
    /// The likeliest tokens.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub top_logprobs: Vec<LogprobToken>,
}

/// A token and its log probability.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct LogprobToken {
    /// Its text; U+FFFD where it is part of a character.
    pub token: String,
    /// Natural logarithm of its probability; -9999 for an impossible token.
    pub logprob: f32,
    /// Bytes of its text.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub bytes: Vec<u8>,
}

/// Log probabilities of a continued text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct CompletionLogprobs {
    /// Texts of the tokens.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub tokens: Vec<String>,
    /// Log probabilities of the tokens.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub token_logprobs: Vec<f32>,
    /// The likeliest tokens in each place, and the one that was chosen.
    #[serde(deserialize_with = "crate::null::as_default")]
    #[cfg_attr(feature = "schema", schemars(with = "Vec<BTreeMap<String, f32>>"))]
    pub top_logprobs: Vec<Alternatives>,
    /// Offset of each token in the answer, in characters.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub text_offset: Vec<usize>,
}

/// Alternatives by their text, the likeliest first; an object in JSON.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(from = "BTreeMap<String, f32>")]
pub struct Alternatives(pub Vec<(String, f32)>);

impl From<BTreeMap<String, f32>> for Alternatives {
    fn from(map: BTreeMap<String, f32>) -> Self {
        let mut list = Vec::from_iter(map);
        list.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        Self(list)
    }
}

impl Serialize for Alternatives {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (token, logprob) in &self.0 {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

/// Tokens used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct CompletionUsage {
    /// Tokens of the prompts.
    pub prompt_tokens: u32,
    /// Tokens of the answers.
    pub completion_tokens: u32,
    /// Sum of the two.
    pub total_tokens: u32,
    /// Details of the prompts.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub prompt_tokens_details: PromptTokensDetails,
}

/// Details of the prompt tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct PromptTokensDetails {
    /// Tokens found in a KV cache.
    #[serde(deserialize_with = "crate::null::as_default")]
    pub cached_tokens: u32,
}

/// Timings and speed of an answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Timings {
    /// Milliseconds from the request's arrival at the head to the first token.
    pub first_token_ms: f64,
    /// Milliseconds from arrival to the end.
    pub total_ms: f64,
    /// Tokens per second after the first token.
    pub tokens_per_second: f64,
    /// Name of the worker that completed the answer.
    pub worker: String,
    /// Number of reruns on other workers.
    pub reruns: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_absent_null_or_there() {
        let chunk = |usage| ChatCompletionChunk {
            id: "a".into(),
            object: "chat.completion.chunk".into(),
            created: 1,
            model: "m".into(),
            usage,
            ..ChatCompletionChunk::default()
        };
        let text = |usage| serde_json::to_string(&chunk(usage)).unwrap();
        assert!(!text(None).contains("usage"));
        assert!(text(Some(None)).ends_with(r#""choices":[],"usage":null}"#));
        let used = text(Some(Some(CompletionUsage::default())));
        let read: ChatCompletionChunk<'_> = serde_json::from_str(&used).unwrap();
        assert_eq!(read.usage, Some(Some(CompletionUsage::default())));
    }

    #[test]
    fn null_is_the_default() {
        let sent = r#"{"id": null, "choices": [{"message": {"role": "assistant", "content": null},
            "logprobs": {"content": [{"token": "a", "logprob": -1.0, "bytes": null, "top_logprobs": null}]},
            "finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "prompt_tokens_details": null}}"#;
        let read: ChatCompletion<'_> = serde_json::from_str(sent).unwrap();
        let choice = &read.choices[0];
        assert_eq!(choice.message.content, "");
        let logprobs = choice.logprobs.as_ref().unwrap();
        assert_eq!(logprobs.content[0].token.token, "a");
        assert!(logprobs.content[0].token.bytes.is_empty());
        let usage = read.usage.flatten().unwrap();
        assert_eq!(usage.prompt_tokens, 3);
        assert_eq!(usage.prompt_tokens_details, PromptTokensDetails::default());

        let sent =
            r#"{"choices": [{"text": null, "logprobs": {"tokens": ["a"], "top_logprobs": null}}]}"#;
        let read: Completion<'_> = serde_json::from_str(sent).unwrap();
        let logprobs = read.choices[0].logprobs.as_ref().unwrap();
        assert_eq!(logprobs.tokens, ["a"]);
        assert!(logprobs.top_logprobs.is_empty());
    }

    #[test]
    fn alternatives_are_an_object_with_the_likeliest_first() {
        let alternatives: Alternatives = serde_json::from_str(r#"{"a":-2.0,"b":-0.5}"#).unwrap();
        assert_eq!(
            serde_json::to_string(&alternatives).unwrap(),
            r#"{"b":-0.5,"a":-2.0}"#
        );
    }
}
