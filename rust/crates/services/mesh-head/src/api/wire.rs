//! The answers of the OpenAI API as they go over the wire.

use mesh_control::request::Complete;
use mesh_proto::{FinishReason, TokenLogprob};
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use super::generate::Api;

/// A whole answer, or one chunk of a stream: the two differ in the name of `object` and in what a choice
/// holds.
#[derive(Debug, Serialize)]
pub(crate) struct Envelope<'a, C> {
    /// Id of the answer, the same in all its chunks.
    pub id: &'a str,
    /// Type of the object, as the OpenAI API names it.
    pub object: &'static str,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// Name of the model that answers.
    pub model: &'a str,
    /// Fingerprint of the weights.
    pub system_fingerprint: Option<&'a str>,
    /// The answers or their pieces.
    pub choices: Vec<C>,
    /// Tokens used; `null` in chunks before the last when usage was asked for, left out when not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
    /// Timings of the answer, an extension of the OpenAI API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
}

/// One answer of `/v1/chat/completions`.
#[derive(Debug, Serialize)]
pub(crate) struct ChatChoice {
    /// Index of the choice, below `n`.
    pub index: usize,
    /// Message of the assistant.
    pub message: ChatText,
    /// Log probabilities where asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
}

/// The message of an answer.
#[derive(Debug, Serialize)]
pub(crate) struct ChatText {
    /// Always `assistant`.
    pub role: &'static str,
    /// Text of the answer.
    pub content: String,
    /// Always `null`.
    pub refusal: Option<()>,
}

/// A piece of one answer of `/v1/chat/completions`.
#[derive(Debug, Serialize)]
pub(crate) struct ChatChunk<'a> {
    /// Index of the choice, below `n`.
    pub index: usize,
    /// Difference from the chunk before.
    pub delta: ChatDelta<'a>,
    /// Log probabilities where asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`, in the last piece only.
    pub finish_reason: Option<&'static str>,
}

/// New part of a message in a chunk.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ChatDelta<'a> {
    /// Role of the message, in the first piece only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Text since the chunk before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'a str>,
}

/// One answer of `/v1/completions`, whole or a piece.
#[derive(Debug, Serialize)]
pub(crate) struct TextChoice<'a> {
    /// Index of the answer.
    pub index: usize,
    /// Text of the answer, or of the piece.
    pub text: &'a str,
    /// Log probabilities where asked for.
    pub logprobs: Option<TextLogprobs>,
    /// `stop` or `length`, in the last piece only.
    pub finish_reason: Option<&'static str>,
}

/// Log probabilities as `/v1/chat/completions` gives them.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ChatLogprobs {
    /// Log probabilities, one per token.
    pub content: Vec<ChatLogprob>,
    /// Always `null`.
    pub refusal: Option<()>,
}

/// One token's log probability.
#[derive(Debug, Serialize)]
pub(crate) struct ChatLogprob {
    /// The alternatives have no alternatives of their own.
    #[serde(flatten)]
    pub token: LogprobToken,
    /// The likeliest tokens.
    pub top_logprobs: Vec<LogprobToken>,
}

/// A token and its log probability.
#[derive(Debug, Serialize)]
pub(crate) struct LogprobToken {
    /// Its text; U+FFFD where it is part of a character.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Bytes of its text.
    pub bytes: Vec<u8>,
}

/// Log probabilities as `/v1/completions` gives them.
#[derive(Debug, Default, Serialize)]
pub(crate) struct TextLogprobs {
    /// Texts of the tokens.
    pub tokens: Vec<String>,
    /// Log probabilities of the tokens.
    pub token_logprobs: Vec<f32>,
    /// The likeliest tokens in each place, and the one that was chosen.
    pub top_logprobs: Vec<Alternatives>,
    /// Offset of each token in the answer, in characters.
    pub text_offset: Vec<usize>,
}

/// Alternatives by their text; an object in JSON.
#[derive(Debug)]
pub(crate) struct Alternatives(Vec<(String, f32)>);

/// Tokens used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    /// Tokens of the prompts.
    pub prompt_tokens: u32,
    /// Tokens of the answers.
    pub completion_tokens: u32,
    /// Sum of the two.
    pub total_tokens: u32,
    /// Details of the prompts.
    pub prompt_tokens_details: PromptDetails,
}

/// Details of the prompt tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct PromptDetails {
    /// Found in a KV cache.
    pub cached_tokens: u32,
}

/// Timings and speed of an answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Timings {
    /// Time from arrival at the head to the first token.
    pub first_token_ms: f64,
    /// Time from arrival to the end.
    pub total_ms: f64,
    /// Tokens per second after the first token.
    pub tokens_per_second: f64,
    /// Worker that completed the answer.
    pub worker: String,
    /// Number of reruns.
    pub reruns: u32,
}

impl Api {
    /// The `object` of a whole answer.
    pub(crate) fn object(self) -> &'static str {
        match self {
            Api::Chat => "chat.completion",
            Api::Completions => "text_completion",
        }
    }

    /// The `object` of a chunk.
    pub(crate) fn chunk_object(self) -> &'static str {
        match self {
            Api::Chat => "chat.completion.chunk",
            Api::Completions => "text_completion",
        }
    }

    /// Prefix of the ids of answers.
    pub(crate) fn id_prefix(self) -> &'static str {
        match self {
            Api::Chat => "chatcmpl",
            Api::Completions => "cmpl",
        }
    }
}

impl ChatLogprobs {
    /// In this API's form.
    pub(crate) fn new(logprobs: &[TokenLogprob]) -> Self {
        let entry = |logprob: &TokenLogprob| ChatLogprob {
            token: LogprobToken::new(logprob),
            top_logprobs: logprob.top.iter().map(LogprobToken::new).collect(),
        };
        Self {
            content: logprobs.iter().map(entry).collect(),
            refusal: None,
        }
    }
}

impl LogprobToken {
    fn new(logprob: &TokenLogprob) -> Self {
        Self {
            token: text_of(logprob),
            logprob: finite(logprob.logprob),
            bytes: logprob.bytes.clone(),
        }
    }
}

impl TextLogprobs {
    /// In this API's form; `place` is moved behind the last token.
    pub(crate) fn new(logprobs: &[TokenLogprob], place: &mut Place) -> Self {
        let mut these = Self::default();
        for logprob in logprobs {
            these.text_offset.push(place.after(&logprob.bytes));
            these.tokens.push(name_of(logprob));
            these.token_logprobs.push(finite(logprob.logprob));
            these.top_logprobs.push(Alternatives::new(logprob));
        }
        these
    }
}

/// A place in the text of an answer, as its tokens come in.
#[derive(Debug, Clone, Default)]
pub(crate) struct Place {
    /// Number of whole characters so far.
    characters: usize,
    /// The beginning of a character whose end has not come.
    open: Vec<u8>,
}

impl Place {
    /// The position at which a token of these bytes begins, in characters; the place is behind it then. A
    /// token that ends a character begins where the character does.
    fn after(&mut self, bytes: &[u8]) -> usize {
        let begin = self.characters;
        self.open.extend_from_slice(bytes);
        let mut rest = &self.open[..];
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.characters += text.chars().count();
                    rest = &[];
                }
                Err(error) => {
                    let (whole, broken) = rest.split_at(error.valid_up_to());
                    self.characters += String::from_utf8_lossy(whole).chars().count();
                    rest = broken;
                    match error.error_len() {
                        // It may yet become one.
                        None => break,
                        // The text has U+FFFD there.
                        Some(len) => {
                            self.characters += 1;
                            rest = &rest[len..];
                        }
                    }
                }
            }
        }
        self.open = rest.to_vec();
        begin
    }
}

impl Alternatives {
    /// The likeliest tokens and, always, the one chosen. Names are unique: of several tokens with one text
    /// the chosen one counts, then the likeliest.
    fn new(chosen: &TokenLogprob) -> Self {
        let name = name_of(chosen);
        let mut list: Vec<(String, f32)> = Vec::with_capacity(chosen.top.len() + 1);
        for top in &chosen.top {
            let other = name_of(top);
            if list.iter().all(|(known, _)| *known != other) {
                list.push((other, finite(top.logprob)));
            }
        }
        let logprob = finite(chosen.logprob);
        match list.iter_mut().find(|(known, _)| *known == name) {
            Some(entry) => entry.1 = logprob,
            None => list.push((name, logprob)),
        }
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

impl Usage {
    /// Counts one more answer; its prompt only if it is the prompt's first answer.
    pub(crate) fn add(&mut self, complete: &Complete, first_of_prompt: bool) {
        let done = &complete.done;
        if first_of_prompt {
            self.prompt_tokens = self.prompt_tokens.saturating_add(done.prompt_tokens);
            self.prompt_tokens_details.cached_tokens = self
                .prompt_tokens_details
                .cached_tokens
                .saturating_add(done.cached_tokens);
        }
        self.completion_tokens = self
            .completion_tokens
            .saturating_add(done.completion_tokens);
        self.total_tokens = self.prompt_tokens.saturating_add(self.completion_tokens);
    }
}

impl Timings {
    /// Timings of this answer.
    pub(crate) fn new(complete: &Complete, worker: &str) -> Self {
        let first = complete.first_token.unwrap_or(complete.total);
        let decoding = complete.total.saturating_sub(first).as_secs_f64();
        let after_first = f64::from(complete.done.completion_tokens.saturating_sub(1));
        Self {
            first_token_ms: first.as_secs_f64() * 1e3,
            total_ms: complete.total.as_secs_f64() * 1e3,
            tokens_per_second: if decoding > 0.0 {
                after_first / decoding
            } else {
                0.0
            },
            worker: worker.to_owned(),
            reruns: complete.reruns,
        }
    }
}

/// The API's name for the reason why an answer ended.
pub(crate) fn finish_reason(complete: &Complete) -> &'static str {
    match complete.done.finish() {
        FinishReason::Length => "length",
        FinishReason::Stop | FinishReason::Unspecified => "stop",
    }
}

/// The API's fingerprint of a model file.
pub(crate) fn system_fingerprint(model_fingerprint: &str) -> Option<String> {
    let start = model_fingerprint.get(..12).unwrap_or(model_fingerprint);
    (!start.is_empty()).then(|| format!("fp_{start}"))
}

/// A token's text, or its bytes if they are not text: names of tokens must differ where the tokens do.
fn name_of(logprob: &TokenLogprob) -> String {
    match std::str::from_utf8(&logprob.bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => logprob
            .bytes
            .iter()
            .fold("bytes:".to_owned(), |name, byte| {
                name + &format!("\\x{byte:02x}")
            }),
    }
}

fn text_of(logprob: &TokenLogprob) -> String {
    String::from_utf8_lossy(&logprob.bytes).into_owned()
}

/// JSON has no infinities: the API writes -9999 for "impossible".
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob
    } else {
        -9999.0
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn logprob(text: &str, value: f32, top: Vec<TokenLogprob>) -> TokenLogprob {
        TokenLogprob {
            token: 1,
            bytes: text.into(),
            logprob: value,
            top,
        }
    }

    #[test]
    fn log_probabilities_take_both_shapes() {
        let list = [
            logprob("é", -0.5, vec![logprob("é", -0.5, vec![])]),
            logprob("b", f32::NEG_INFINITY, vec![]),
        ];
        assert_eq!(
            serde_json::to_value(ChatLogprobs::new(&list)).unwrap(),
            json!({"content": [
                {"token": "é", "logprob": -0.5, "bytes": [195, 169],
                 "top_logprobs": [{"token": "é", "logprob": -0.5, "bytes": [195, 169]}]},
                {"token": "b", "logprob": -9999.0, "bytes": [98], "top_logprobs": []},
            ], "refusal": null})
        );
        let mut place = Place {
            characters: 3,
            open: Vec::new(),
        };
        assert_eq!(
            serde_json::to_value(TextLogprobs::new(&list, &mut place)).unwrap(),
            json!({
                "tokens": ["é", "b"], "token_logprobs": [-0.5, -9999.0], "top_logprobs": [{"é": -0.5}, {"b": -9999.0}],
                "text_offset": [3, 4],
            })
        );
        assert_eq!(place.characters, 5);
    }

    #[test]
    fn names_of_tokens_are_unique_and_the_chosen_one_is_there() {
        let byte = |byte: u8, value: f32, top| TokenLogprob {
            token: 1,
            bytes: vec![byte],
            logprob: value,
            top,
        };
        let top = vec![
            byte(0xe2, -1.0, vec![]),
            byte(0x82, -2.0, vec![]),
            logprob("x", -3.0, vec![]),
            logprob("x", -4.0, vec![]),
        ];
        let list = [byte(0x99, -5.0, top.clone()), logprob("x", -4.0, top)];
        let text = serde_json::to_string(&TextLogprobs::new(&list, &mut Place::default())).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            value["top_logprobs"],
            json!([
                {"bytes:\\xe2": -1.0, "bytes:\\x82": -2.0, "x": -3.0, "bytes:\\x99": -5.0},
                {"bytes:\\xe2": -1.0, "bytes:\\x82": -2.0, "x": -4.0},
            ])
        );
        assert_eq!(value["tokens"], json!(["bytes:\\x99", "x"]));
        assert_eq!(
            text.matches("bytes:\\\\xe2").count(),
            2,
            "once in each place"
        );
    }

    #[test]
    fn offsets_count_characters_and_pieces_of_one_begin_where_it_does() {
        let tokens: [&[u8]; 7] = [
            b"a",
            b"\xf0\x9f",
            b"\x98",
            b"\x80b",
            b"\xff",
            b"c\xc3",
            b"d",
        ];
        let mut place = Place::default();
        let offsets: Vec<usize> = tokens.iter().map(|bytes| place.after(bytes)).collect();
        // "a😀b\u{fffd}c\u{fffd}d"
        assert_eq!(offsets, [0, 1, 1, 1, 3, 4, 5]);
        assert_eq!(place.characters, 7);
    }
}
