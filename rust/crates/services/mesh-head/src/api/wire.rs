//! What answers of workers are in the OpenAI API.

use mesh_api::{
    Alternatives, ChatLogprob, ChatLogprobs, CompletionLogprobs, CompletionUsage, LogprobToken,
    Timings,
};
use mesh_control::request::Complete;
use mesh_proto::{FinishReason, TokenLogprob};

use super::generate::Api;

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

    pub(crate) fn id_prefix(self) -> &'static str {
        match self {
            Api::Chat => "chatcmpl",
            Api::Completions => "cmpl",
        }
    }
}

/// Log probabilities as `/v1/chat/completions` gives them.
pub(crate) fn chat_logprobs(logprobs: &[TokenLogprob]) -> ChatLogprobs {
    let token = |logprob: &TokenLogprob| LogprobToken {
        token: text_of(logprob),
        logprob: finite(logprob.logprob),
        bytes: logprob.bytes.clone(),
    };
    let entry = |logprob: &TokenLogprob| ChatLogprob {
        token: token(logprob),
        top_logprobs: logprob.top.iter().map(token).collect(),
    };
    ChatLogprobs {
        content: logprobs.iter().map(entry).collect(),
        refusal: None,
    }
}

/// Log probabilities as `/v1/completions` gives them; `place` is moved behind the last token.
pub(crate) fn completion_logprobs(
    logprobs: &[TokenLogprob],
    place: &mut Place,
) -> CompletionLogprobs {
    let mut these = CompletionLogprobs::default();
    for logprob in logprobs {
        these.text_offset.push(place.after(&logprob.bytes));
        these.tokens.push(name_of(logprob));
        these.token_logprobs.push(finite(logprob.logprob));
        these.top_logprobs.push(alternatives(logprob));
    }
    these
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

/// The likeliest tokens and, always, the one chosen. Names are unique: of several tokens with one text the
/// chosen one counts, then the likeliest.
fn alternatives(chosen: &TokenLogprob) -> Alternatives {
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
    Alternatives(list)
}

/// Counts one more answer; its prompt only if it is the prompt's first answer.
pub(crate) fn add_usage(usage: &mut CompletionUsage, complete: &Complete, first_of_prompt: bool) {
    let done = &complete.done;
    if first_of_prompt {
        let details = &mut usage.prompt_tokens_details;
        usage.prompt_tokens = usage.prompt_tokens.saturating_add(done.prompt_tokens);
        details.cached_tokens = details.cached_tokens.saturating_add(done.cached_tokens);
    }
    usage.completion_tokens = usage
        .completion_tokens
        .saturating_add(done.completion_tokens);
    usage.total_tokens = usage.prompt_tokens.saturating_add(usage.completion_tokens);
}

pub(crate) fn timings(complete: &Complete, worker: &str) -> Timings {
    let first = complete.first_token.unwrap_or(complete.total);
    let decoding = complete.total.saturating_sub(first).as_secs_f64();
    let after_first = f64::from(complete.done.completion_tokens.saturating_sub(1));
    Timings {
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
            serde_json::to_value(chat_logprobs(&list)).unwrap(),
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
            serde_json::to_value(completion_logprobs(&list, &mut place)).unwrap(),
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
        let text =
            serde_json::to_string(&completion_logprobs(&list, &mut Place::default())).unwrap();
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
