//! The payload of a Task: plain text, or a JSON object.

use mesh_proto::{Chat, ChatMessage, GenerateParams, Prompt};
use serde_json::Value;

use super::embeddings::AskedEmbeddings;
use super::fields::{Fields, conversation, sampling};
use super::images::AskedImages;
use super::invalid::Invalid;
use super::json;
use crate::flight::task::ImageRequest;

/// A Task payload of a DCF client.
#[derive(Debug, Clone)]
pub enum DcfTask {
    /// An answer to generate.
    Generate(DcfGenerate),
    /// Texts to embed: `"kind": "embed"`.
    Embed(DcfEmbed),
    /// An image to make: `"kind": "image"`, or a prompt with `steps` or `guidance`.
    Image(DcfImage),
}

/// An image to make, as a DCF client asks for it.
#[derive(Debug, Clone)]
pub struct DcfImage {
    /// The image.
    pub request: ImageRequest,
    /// Acknowledge repeats while the task runs.
    pub ack: bool,
}

/// Texts to embed, as a DCF client asks for them.
#[derive(Debug, Clone)]
pub struct DcfEmbed {
    /// Texts to embed, and the encoding of the vectors.
    pub asked: AskedEmbeddings,
    /// Acknowledge repeats while the task runs.
    pub ack: bool,
}

/// An answer to generate, as a DCF client asks for it.
#[derive(Debug, Clone)]
pub struct DcfGenerate {
    /// Name of the model; the head's default if absent.
    pub model: Option<String>,
    /// Prompt: text, tokens or a conversation.
    pub prompt: Prompt,
    /// Sampling parameters and limits of the answer.
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
            let byte = error.valid_up_to();
            let text = format!("the payload is not UTF-8 text (byte {byte})");
            Invalid::new("payload", text)
        })?;
        if text.trim().is_empty() {
            let text = "the payload is empty: send a prompt";
            return Err(Invalid::new("payload", text));
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

    /// Returns true if repeats should be acknowledged while the task runs.
    pub(crate) fn ack(&self) -> bool {
        match self {
            Self::Generate(task) => task.ack,
            Self::Embed(task) => task.ack,
            Self::Image(task) => task.ack,
        }
    }

    fn parse_json(text: &str) -> Result<Self, Invalid> {
        let wrong = |invalid: Invalid| {
            let text = format!("the payload begins as JSON but is none: {invalid}");
            Invalid::new("payload", text)
        };
        let object = json::object(text.as_bytes()).map_err(wrong)?;
        let fields = Fields::of(&object);
        // Any other kind is a key that means nothing here.
        let kind = fields.get("kind").and_then(Value::as_str);
        if kind == Some("embed") {
            return Ok(Self::Embed(DcfEmbed {
                asked: AskedEmbeddings::of_fields(fields)?,
                ack: fields.flag("ack")?,
            }));
        }
        // DCF v5.1 knows an image task by its keys. Other clients send the same keys with those of text.
        let has = |name: &&str| fields.get(name).is_some();
        let of_text = ["messages", "max_tokens", "temperature", "stop", "stream"];
        let of_v5_1 =
            has(&"prompt") && ["steps", "guidance"].iter().any(has) && !of_text.iter().any(has);
        if kind == Some("image") || (kind.is_none() && of_v5_1) {
            return Ok(Self::Image(DcfImage {
                request: AskedImages::of_fields(fields)?,
                ack: fields.flag("ack")?,
            }));
        }
        let prompt = match (fields.get("messages"), fields.text("prompt")?) {
            (Some(_), _) => Prompt::Chat(conversation(fields)?),
            (None, Some(prompt)) => user_message(prompt),
            (None, None) => {
                let text = "the JSON object has neither 'prompt' nor 'messages'";
                return Err(Invalid::new("prompt", text));
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
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_image_is_asked_for_by_its_kind_or_as_in_v5_1() {
        let image = |payload: &[u8]| match DcfTask::parse(payload) {
            Ok(DcfTask::Image(task)) => Ok((task.request.steps, task.request.guidance)),
            Ok(other) => panic!("{other:?}"),
            Err(invalid) => Err(invalid.param),
        };
        let of_v5_1 = br#"{"prompt":"a fox","steps":20,"guidance":7.5}"#;
        assert_eq!(image(of_v5_1), Ok((Some(20), Some(7.5))));
        assert_eq!(
            image(br#"{"prompt":"a fox","steps":4}"#),
            Ok((Some(4), None))
        );
        assert_eq!(
            image(br#"{"kind":"image","prompt":"a fox"}"#),
            Ok((None, None))
        );
        assert_eq!(image(br#"{"kind":"image"}"#), Err("prompt".into()));
        assert_eq!(image(br#"{"prompt":"x","steps":0}"#), Err("steps".into()));
    }

    #[test]
    fn a_task_of_kind_embed_has_an_input_and_other_kinds_are_ignored() {
        let embed = |payload: &[u8]| match DcfTask::parse(payload) {
            Ok(DcfTask::Embed(task)) => Ok((task.asked.task.inputs.len(), task.asked.base64)),
            Ok(other) => panic!("{other:?}"),
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
