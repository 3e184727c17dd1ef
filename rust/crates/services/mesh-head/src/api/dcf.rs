//! A task: one answer that is to be generated, whichever front end it came through.

use std::sync::Arc;

use bytes::Bytes;
use mesh_proto::{Chat, ChatMessage, GenerateParams, Prompt};
use serde_json::Value;

use crate::core::affinity::{estimate_tokens, prefixes};
use crate::core::fair::Source;
use crate::core::length::Length;
use crate::core::request::Bounds;
use crate::core::router::Ask;
use crate::fields::{Fields, Invalid, conversation, sampling};
use crate::http::embeddings::AskedEmbeddings;
use crate::json;

/// One answer to generate.
#[derive(Debug, Clone)]
pub struct Task {
    /// Request id in the logs of all services.
    pub id: String,
    /// Model name; the head's default where there is none.
    pub model: Option<String>,
    /// What to answer. Several answers to it share it.
    pub prompt: Arc<Prompt>,
    /// How to answer.
    pub params: GenerateParams,
    /// The client's own payload, where a v5.0.0 worker may take it as it is.
    pub legacy: Option<Bytes>,
    /// The source of the task.
    pub source: Source,
    /// Prefixes of prompts are cached for tasks of the same salt only.
    pub salt: u64,
}

impl Task {
    /// What a worker may send as its answer.
    pub fn bounds(&self) -> Bounds {
        let (bytes, messages) = match &*self.prompt {
            Prompt::Text(text) => (text.len(), 0),
            // More than any token stands for, where it is echoed as text.
            Prompt::Tokens(list) => (list.tokens.len(), 0),
            Prompt::Chat(chat) => {
                let of = |message: &ChatMessage| message.content.len() + message.role.len();
                let bytes: usize = chat.messages.iter().map(of).sum();
                (bytes + chat.template_variables.len(), chat.messages.len())
            }
        };
        // No token is shorter than a byte; templates put something around every message.
        let around = TEMPLATE_TOKENS + messages * MESSAGE_TOKENS;
        let echoed = match (&*self.prompt, self.params.echo) {
            (_, false) => 0,
            (Prompt::Tokens(_), true) => bytes * ECHOED_TOKEN_BYTES,
            (_, true) => bytes + around,
        };
        Bounds {
            tokens: self
                .params
                .max_tokens
                .unwrap_or(u32::MAX)
                .min(Bounds::default().tokens),
            more_text: echoed as u64,
            alternatives: self.params.logprobs,
            prompt_tokens: u32::try_from(bytes.saturating_add(around)).unwrap_or(u32::MAX),
        }
    }

    /// What the router needs to know, for this model.
    pub fn ask(&self, model: &str) -> Ask {
        let prompt_tokens = estimate_tokens(match &*self.prompt {
            Prompt::Text(text) => text.len(),
            Prompt::Chat(chat) => chat
                .messages
                .iter()
                .map(|message| message.content.len())
                .sum(),
            Prompt::Tokens(list) => list.tokens.len() * 4,
        });
        Ask {
            model: model.to_owned(),
            prompt_tokens,
            answer_tokens: self
                .params
                .max_tokens
                .unwrap_or(USUAL_ANSWER)
                .min(USUAL_ANSWER),
            prefixes: prefixes(model, self.salt, &self.prompt),
            length: Length::of(&self.prompt),
            legacy: self.legacy.is_some(),
            revision: self.params.revision().max(self.prompt.revision()),
            source: self.source,
            ..Ask::default()
        }
    }
}

/// A Task payload of a DCF client.
#[derive(Debug, Clone)]
pub enum DcfTask {
    /// An answer to generate.
    Generate(DcfGenerate),
    /// Texts to embed: `"kind": "embed"`.
    Embed(DcfEmbed),
}

/// Texts to embed, as a DCF client asks for them.
#[derive(Debug, Clone)]
pub struct DcfEmbed {
    /// What to embed, and how to write it down.
    pub asked: AskedEmbeddings,
    /// Acknowledge repeats while the task runs.
    pub ack: bool,
}

/// An answer to generate, as a DCF client asks for it.
#[derive(Debug, Clone)]
pub struct DcfGenerate {
    /// Model name.
    pub model: Option<String>,
    /// What to answer.
    pub prompt: Prompt,
    /// How to answer.
    pub params: GenerateParams,
    /// Send Partials while the answer grows.
    pub stream: bool,
    /// Acknowledge repeats while the task runs.
    pub ack: bool,
}

impl DcfTask {
    /// Reads a payload: a JSON object with `prompt` or `messages`, else the prompt itself.
    ///
    /// # Errors
    /// [`Invalid`], in words for the client.
    pub fn parse(payload: &[u8]) -> Result<Self, Invalid> {
        let text = std::str::from_utf8(payload).map_err(|error| {
            Invalid::new(
                "payload",
                format!(
                    "the payload is not UTF-8 text (byte {})",
                    error.valid_up_to()
                ),
            )
        })?;
        if text.trim().is_empty() {
            return Err(Invalid::new(
                "payload",
                "the payload is empty: send a prompt",
            ));
        }
        if text.trim_start().starts_with('{') {
            return Self::parse_json(text);
        }
        Ok(Self::Generate(DcfGenerate {
            model: None,
            prompt: user_message(text),
            params: GenerateParams::default(),
            stream: false,
            ack: false,
        }))
    }

    /// Whether repeats are to be acknowledged while the task runs.
    pub fn ack(&self) -> bool {
        match self {
            Self::Generate(task) => task.ack,
            Self::Embed(task) => task.ack,
        }
    }

    fn parse_json(text: &str) -> Result<Self, Invalid> {
        let wrong = |invalid: Invalid| {
            Invalid::new(
                "payload",
                format!("the payload begins as JSON but is none: {invalid}"),
            )
        };
        let object = json::object(text.as_bytes()).map_err(wrong)?;
        let fields = Fields::of(&object);
        // Any other kind is a key that means nothing here.
        if fields.get("kind").and_then(Value::as_str) == Some("embed") {
            return Ok(Self::Embed(DcfEmbed {
                asked: AskedEmbeddings::of_fields(fields)?,
                ack: fields.flag("ack")?,
            }));
        }
        let prompt = match (fields.get("messages"), fields.text("prompt")?) {
            (Some(_), _) => Prompt::Chat(conversation(fields)?),
            (None, Some(prompt)) => user_message(prompt),
            (None, None) => {
                return Err(Invalid::new(
                    "prompt",
                    "the JSON object has neither 'prompt' nor 'messages'",
                ));
            }
        };
        let params = GenerateParams {
            max_tokens: fields.limit("max_tokens", 1)?,
            ..sampling(fields)?
        };
        Ok(Self::Generate(DcfGenerate {
            model: fields.name("model")?.map(str::to_owned),
            prompt,
            params,
            stream: fields.flag("stream")?,
            ack: fields.flag("ack")?,
        }))
    }
}

/// A prompt as a conversation of one message: workers put it into the model's template, if it has one.
fn user_message(text: &str) -> Prompt {
    Prompt::Chat(Chat {
        messages: vec![ChatMessage {
            role: "user".into(),
            content: text.into(),
        }],
        ..Chat::default()
    })
}

/// Tokens that a template puts into any prompt, and around each message, at most.
const TEMPLATE_TOKENS: usize = 4096;
const MESSAGE_TOKENS: usize = 64;
/// Bytes of an echoed token.
const ECHOED_TOKEN_BYTES: usize = 64;
/// Tokens of an answer whose length nobody knows, for estimates.
const USUAL_ANSWER: u32 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn content(prompt: &Prompt) -> String {
        match prompt {
            Prompt::Chat(chat) => chat
                .messages
                .iter()
                .map(|m| format!("{}:{};", m.role, m.content))
                .collect(),
            other => panic!("no chat: {other:?}"),
        }
    }

    fn parse(payload: &[u8]) -> Result<DcfGenerate, Invalid> {
        match DcfTask::parse(payload)? {
            DcfTask::Generate(task) => Ok(task),
            DcfTask::Embed(task) => panic!("{task:?}"),
        }
    }

    #[test]
    fn a_task_of_kind_embed_has_an_input_and_other_kinds_are_ignored() {
        let embed = |payload: &[u8]| match DcfTask::parse(payload) {
            Ok(DcfTask::Embed(task)) => Ok((task.asked.task.inputs.len(), task.asked.base64)),
            Ok(DcfTask::Generate(task)) => panic!("{task:?}"),
            Err(invalid) => Err(invalid.param),
        };
        assert_eq!(
            embed(br#"{"kind":"embed","input":["a","b"],"encoding_format":"base64"}"#),
            Ok((2, true))
        );
        assert_eq!(
            embed(br#"{"kind":"embed","prompt":"x"}"#),
            Err("input".into())
        );
        let other = parse(br#"{"kind":"poem","prompt":"x"}"#).unwrap();
        assert_eq!(content(&other.prompt), "user:x;");
    }

    #[test]
    fn plain_text_is_a_user_message() {
        let task = parse("  Wie geht's?".as_bytes()).unwrap();
        assert_eq!(content(&task.prompt), "user:  Wie geht's?;");
        assert!(!task.stream && task.model.is_none());
    }

    #[test]
    fn json_carries_prompt_and_parameters_and_unknown_keys_are_ignored() {
        let task =
            parse(br#"{"prompt":"hi","max_tokens":5,"steps":50,"guidance":7.5,"stream":true,"model":"m"}"#).unwrap();
        assert_eq!(content(&task.prompt), "user:hi;");
        assert_eq!(task.params.max_tokens, Some(5));
        assert!(task.stream);
        assert_eq!(task.model.as_deref(), Some("m"));
        let chat = parse(
            br#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"u"}]}"#,
        )
        .unwrap();
        assert_eq!(content(&chat.prompt), "system:s;user:u;");
    }

    #[test]
    fn bad_payloads_get_errors_that_say_why() {
        let cases: [(&[u8], &str); 8] = [
            (b"", "empty"),
            (b" \n", "empty"),
            (b"abc\xff", "not UTF-8 text (byte 3)"),
            (b"{\"prompt\":", "begins as JSON but is none"),
            (b"{}", "neither 'prompt' nor 'messages'"),
            (
                b"{\"prompt\":5}",
                "'prompt': expected a string, got a number",
            ),
            (b"{\"prompt\":\"x\",\"max_tokens\":0}", "'max_tokens'"),
            (b"{\"prompt\":\"x\",\"temperature\":9}", "'temperature'"),
        ];
        for (payload, why) in cases {
            let invalid = DcfTask::parse(payload).expect_err(why);
            assert!(invalid.message.contains(why), "{}", invalid.message);
        }
    }

    #[test]
    fn deeply_nested_json_is_refused_and_not_recursed_into() {
        let nested = format!("{{\"prompt\":{}", "[".repeat(60_000));
        assert!(DcfTask::parse(nested.as_bytes()).is_err());
    }
}
