//! Requests for generated text.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A chat.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ChatCompletionRequest {
    /// The conversation: 1 to 4,096 messages.
    #[cfg_attr(feature = "schema", schemars(length(min = 1)))]
    pub messages: Vec<Message>,
    /// Model, limits and sampling.
    #[serde(flatten)]
    pub options: GenerationOptions,
    /// Most tokens of the answer; comes before `max_tokens`. -1 is as many as the context holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::limit"))]
    pub max_completion_tokens: Option<i64>,
    /// Send the log probability of each token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "schema",
        schemars(schema_with = "crate::schema::flag_or_bit")
    )]
    pub logprobs: Option<bool>,
    /// Likeliest tokens to send for each place. Only with `logprobs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(max = 20)))]
    pub top_logprobs: Option<u32>,
    /// The answer continues the last message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub continue_final_message: Option<bool>,
    /// The prompt ends with the template's beginning of an answer. Excludes `continue_final_message`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub add_generation_prompt: Option<bool>,
    /// Variables of the model's template, such as `{"enable_thinking": false}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// The same as this variable of the template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enable_thinking: Option<bool>,
    /// The same as this variable of the template; `none` sets `enable_thinking` to false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_effort: Option<String>,
}

impl ChatCompletionRequest {
    /// A chat of one question.
    pub fn question(text: impl Into<String>, options: GenerationOptions) -> Self {
        Self {
            messages: vec![Message::new("user", text)],
            options,
            ..Self::default()
        }
    }
}

/// A message of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Message {
    /// `system`, `user` or `assistant`. Other names of them are understood.
    #[cfg_attr(
        feature = "schema",
        schemars(extend("enum" = ["system", "developer", "user", "human", "assistant", "ai", "model"]))
    )]
    pub role: String,
    /// Text of the message. Only a message of the assistant may be without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<MessageContent>,
    /// In the last message, `true` is the same as `continue_final_message`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<Value>"))]
    pub prefix: Option<bool>,
    /// Name of the speaker. Has no effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<Value>"))]
    pub name: Option<String>,
}

impl Message {
    /// A text by this role.
    pub fn new(role: &str, text: impl Into<String>) -> Self {
        Self {
            role: role.to_owned(),
            content: Some(MessageContent::Text(text.into())),
            ..Self::default()
        }
    }
}

/// Content of a message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum MessageContent {
    /// Text.
    Text(String),
    /// Parts, which are joined by line breaks.
    Parts(Vec<ContentPart>),
}

/// A part of a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum ContentPart {
    /// Text.
    Plain(String),
    /// Text.
    Text(TextPart),
    /// A part of an assistant's message that later turns leave out.
    Skipped(SkippedPart),
}

/// A part with text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TextPart {
    /// `text`, or a name for it in other APIs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "schema",
        schemars(extend("enum" = ["text", "input_text", "output_text", null]))
    )]
    pub r#type: Option<String>,
    /// Text of the part.
    pub text: String,
}

/// A part that is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SkippedPart {
    /// Kind of the part.
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["refusal", "thinking", "reasoning"])))]
    pub r#type: String,
}

/// Texts to continue.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct CompletionRequest {
    /// A text, several texts, token ids, or several lists of token ids. Together with `n` they may ask for up
    /// to 128 answers.
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::prompt"))]
    pub prompt: TextInput,
    /// Model, limits and sampling. Without a limit an answer has at most 16 tokens.
    #[serde(flatten)]
    pub options: GenerationOptions,
    /// Likeliest tokens to send for each place, with their log probabilities; `true` is 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "schema",
        schemars(schema_with = "crate::schema::flag_or_count")
    )]
    pub logprobs: Option<u32>,
    /// The answer begins with the prompt. Excludes `logprobs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub echo: Option<bool>,
    /// Refused unless it is the value of `n`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub best_of: Option<u32>,
}

impl CompletionRequest {
    /// These prompts, with these options.
    pub fn new(prompt: impl Into<TextInput>, options: GenerationOptions) -> Self {
        Self {
            prompt: prompt.into(),
            options,
            ..Self::default()
        }
    }
}

/// A text, several texts, token ids, or several lists of token ids.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TextInput {
    /// One text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// Token ids.
    Tokens(Vec<u32>),
    /// Several lists of token ids.
    TokenLists(Vec<Vec<u32>>),
}

impl Default for TextInput {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

impl<T: Into<String>> From<T> for TextInput {
    fn from(text: T) -> Self {
        Self::Text(text.into())
    }
}

/// Model, limits and sampling, for chats and texts alike.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct GenerationOptions {
    /// The head's default model if absent. At most 512 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Most tokens of the answer. -1 is as many as the context holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::limit"))]
    pub max_tokens: Option<i64>,
    /// Tokens before which the answer does not end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(max = 4_294_967_295_u32)))]
    pub min_tokens: Option<u32>,
    /// Randomness; 0 always takes the likeliest token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 0.0, max = 2.0)))]
    pub temperature: Option<f64>,
    /// Choose among the likeliest tokens that together have this probability.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 0.0, max = 1.0)))]
    pub top_p: Option<f64>,
    /// Choose among this many of the likeliest tokens; -1 and 0 keep all.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = -1, max = 4_294_967_295_i64)))]
    pub top_k: Option<i64>,
    /// Choose among tokens of at least this part of the likeliest token's probability.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 0.0, max = 1.0)))]
    pub min_p: Option<f64>,
    /// Divides the logits of tokens that the text has already; 1 changes nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 0.01, max = 10.0)))]
    pub repetition_penalty: Option<f64>,
    /// Subtracted from the logits of tokens that the text has already.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = -2.0, max = 2.0)))]
    pub presence_penalty: Option<f64>,
    /// Subtracted from the logits of tokens once for each time that the text has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = -2.0, max = 2.0)))]
    pub frequency_penalty: Option<f64>,
    /// With a penalty, refused unless it is -1: penalties look at the whole text.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(with = "Option<Value>"))]
    pub repeat_last_n: Option<i64>,
    /// The same seed gives the same answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::integer"))]
    pub seed: Option<u64>,
    /// Up to 16 texts of up to 1,024 bytes each that end the answer and are not part of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop: Option<StopTexts>,
    /// Up to 64 token ids that end the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(length(max = 64)))]
    pub stop_token_ids: Option<Vec<u32>>,
    /// The model's own end of an answer does not end it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ignore_eos: Option<bool>,
    /// Token ids, and numbers from -100 to 100 that are added to their logits; up to 4,096.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "schema",
        schemars(schema_with = "crate::schema::logit_bias")
    )]
    pub logit_bias: Option<BTreeMap<String, f64>>,
    /// The form that the answer has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_format: Option<ResponseFormat>,
    /// A JSON Schema that the answer follows, as in `response_format`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json_schema: Option<Value>,
    /// A regular expression for the whole answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regex: Option<String>,
    /// A grammar that the answer follows: in GBNF if it has `::=`, else in Lark's syntax.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grammar: Option<String>,
    /// Texts of which the answer is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guided_choice: Option<Vec<String>>,
    /// The answer is a JSON object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guided_json_object: Option<bool>,
    /// One of these forms, as vLLM has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub structured_outputs: Option<StructuredOutputs>,
    /// Answers per prompt, at most `http.choices_limit` (16 by default).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 16)))]
    pub n: Option<u32>,
    /// Send the answer as it grows, as server-sent events that end with `[DONE]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    /// Options of the stream. Only with `stream`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_options: Option<StreamOptions>,
}

/// The form of an answer.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ResponseFormat {
    /// Text as the model likes, any JSON object, or JSON that follows a schema.
    #[serde(rename = "type")]
    pub kind: ResponseKind,
    /// The schema of the type `json_schema`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json_schema: Option<NamedSchema>,
    /// A JSON Schema, which may stand here, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
}

/// The types of a [`ResponseFormat`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ResponseKind {
    /// Text as the model likes.
    #[default]
    Text,
    /// Any JSON object.
    JsonObject,
    /// JSON that follows a schema.
    JsonSchema,
}

/// A JSON Schema with its name.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct NamedSchema {
    /// Name, which means nothing here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Description, which means nothing here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// The JSON Schema: up to 256 KiB of JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<Value>,
    /// Answers always follow the schema.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

/// vLLM's name of the forms of an answer. One of them may be set.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct StructuredOutputs {
    /// A JSON Schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json: Option<Value>,
    /// Any JSON object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json_object: Option<bool>,
    /// A regular expression for the whole answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regex: Option<String>,
    /// Texts of which the answer is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub choice: Option<Vec<String>>,
    /// A grammar in GBNF or in Lark's syntax.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grammar: Option<String>,
}

/// Texts that end an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum StopTexts {
    /// One text.
    One(String),
    /// Several texts.
    Many(#[cfg_attr(feature = "schema", schemars(length(max = 16)))] Vec<String>),
}

/// Options of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct StreamOptions {
    /// End the stream with a chunk that has `usage`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub include_usage: Option<bool>,
    /// Refused if it is true: tokens are counted at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("enum" = [false, null])))]
    pub continuous_usage_stats: Option<bool>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_set_is_sent() {
        let options = GenerationOptions {
            max_tokens: Some(5),
            temperature: Some(0.7),
            seed: Some(u64::MAX),
            ..GenerationOptions::default()
        };
        let chat = ChatCompletionRequest::question("Why?", options.clone());
        assert_eq!(
            serde_json::to_value(&chat).unwrap(),
            json!({"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 5, "temperature": 0.7, "seed": u64::MAX})
        );
        let text = CompletionRequest::new("Once", options);
        assert_eq!(
            serde_json::to_value(&text).unwrap(),
            json!({"prompt": "Once", "max_tokens": 5, "temperature": 0.7, "seed": u64::MAX})
        );
        let read: CompletionRequest =
            serde_json::from_value(json!({"prompt": [[1], [2, 3]]})).unwrap();
        assert_eq!(
            read.prompt,
            TextInput::TokenLists(vec![vec![1], vec![2, 3]])
        );
    }
}
