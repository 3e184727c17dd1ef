//! What a request body of `/v1/chat/completions` or `/v1/completions` asks for.

use mesh_proto::{GenerateParams, Prompt, TokenList};
use serde_json::{Map, Value};

use crate::core::fair::Source;
use crate::fields::{Fields, Invalid, messages, sampling};
use crate::ids;
use crate::task::Task;

/// Which of the two APIs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
}

/// A request, checked.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    /// Which API it came through.
    pub api: Api,
    /// Model named in it.
    pub model: Option<String>,
    /// What to answer, several only in `/v1/completions`.
    pub prompts: Vec<Prompt>,
    /// How to answer.
    pub params: GenerateParams,
    /// Answers per prompt.
    pub choices: u32,
    /// Send the answer as it grows.
    pub stream: bool,
    /// End the stream with a usage chunk.
    pub include_usage: bool,
}

impl Asked {
    /// Reads a body.
    ///
    /// # Errors
    /// [`Invalid`] names the field that is wrong or not supported.
    pub(super) fn parse(api: Api, body: &[u8], choices_limit: u32) -> Result<Self, Invalid> {
        let map: Map<String, Value> = serde_json::from_slice(body).map_err(|error| {
            Invalid::new("body", format!("The body is not a JSON object: {error}"))
        })?;
        let fields = Fields::new(&map);
        refuse_unsupported(api, fields)?;
        let model = fields.text("model")?.map(str::to_owned);
        let prompts = match api {
            Api::Chat => vec![chat_prompt(fields)?],
            Api::Completions => prompts(fields)?,
        };
        let params = match api {
            Api::Chat => chat_params(fields)?,
            Api::Completions => completion_params(fields)?,
        };
        let choices = fields.whole("n", 1..=choices_limit)?.unwrap_or(1);
        let total = u64::from(choices) * prompts.len() as u64;
        if total > MOST_ANSWERS {
            let text = format!(
                "{} prompts times {choices} choices are over the limit of {MOST_ANSWERS} answers",
                prompts.len()
            );
            return Err(Invalid::new("n", text));
        }
        let stream = fields.flag("stream")?;
        let include_usage = match fields.object("stream_options")? {
            Some(_) if !stream => {
                return Err(Invalid::new(
                    "stream_options",
                    "'stream_options' is only allowed when 'stream' is true",
                ));
            }
            Some(options) => options.flag("include_usage")?,
            None => false,
        };
        Ok(Self {
            api,
            model,
            prompts,
            params,
            choices,
            stream,
            include_usage,
        })
    }

    /// One task per answer, in the order of the choices' indices.
    pub(super) fn tasks(&self, request_id: &str) -> Vec<Task> {
        let seed = self.params.seed.unwrap_or_else(ids::unique);
        let mut tasks = Vec::with_capacity(self.prompts.len() * self.choices as usize);
        for prompt in &self.prompts {
            for choice in 0..self.choices {
                let id = match tasks.len() {
                    0 => request_id.to_owned(),
                    index => format!("{request_id}.{index}"),
                };
                // The same seed would make all choices the same answer.
                let params = GenerateParams {
                    seed: Some(seed.wrapping_add(u64::from(choice))),
                    ..self.params.clone()
                };
                tasks.push(Task {
                    id,
                    model: self.model.clone(),
                    prompt: prompt.clone(),
                    params,
                    legacy: None,
                    source: Source::default(),
                });
            }
        }
        tasks
    }
}

/// Fields that change what the answer is and that nobody here acts upon. Ignoring them would be a wrong answer.
fn refuse_unsupported(api: Api, fields: Fields<'_>) -> Result<(), Invalid> {
    let lists: &[&str] = match api {
        Api::Chat => &["tools", "functions"],
        Api::Completions => &[],
    };
    for name in lists {
        if fields
            .get(name)
            .is_some_and(|value| value.as_array().is_none_or(|list| !list.is_empty()))
        {
            return Err(Invalid::unsupported(*name, "ask for text only"));
        }
    }
    for name in ["tool_choice", "function_call"] {
        if fields
            .get(name)
            .is_some_and(|value| !matches!(value.as_str(), Some("none" | "auto")))
        {
            return Err(Invalid::unsupported(name, "ask for text only"));
        }
    }
    for name in ["audio", "prediction", "web_search_options"] {
        if fields.get(name).is_some() {
            return Err(Invalid::unsupported(name, "leave it out"));
        }
    }
    if let Some(modalities) = fields.get("modalities")
        && modalities
            .as_array()
            .is_none_or(|list| list.iter().any(|modality| modality != "text"))
    {
        return Err(Invalid::unsupported("modalities", "only text is generated"));
    }
    if let Some(format) = fields.object("response_format")?
        && format.text("type")? != Some("text")
    {
        return Err(Invalid::unsupported(
            "response_format",
            "only the type text is there",
        ));
    }
    if api == Api::Completions {
        if fields
            .text("suffix")?
            .is_some_and(|suffix| !suffix.is_empty())
        {
            return Err(Invalid::unsupported(
                "suffix",
                "put all text before the answer into 'prompt'",
            ));
        }
        let choices = fields.get("n").and_then(Value::as_u64).unwrap_or(1);
        if fields
            .get("best_of")
            .is_some_and(|best_of| best_of.as_u64() != Some(choices))
        {
            return Err(Invalid::unsupported(
                "best_of",
                "leave it out, or set it to the value of 'n'",
            ));
        }
    }
    Ok(())
}

fn chat_prompt(fields: Fields<'_>) -> Result<Prompt, Invalid> {
    match fields.get("messages") {
        Some(list) => Ok(Prompt::Chat(messages(list)?)),
        None => Err(Invalid::new(
            "messages",
            "Missing required parameter: 'messages'",
        )),
    }
}

fn chat_params(fields: Fields<'_>) -> Result<GenerateParams, Invalid> {
    let newer = fields.whole("max_completion_tokens", 1..=u32::MAX)?;
    let older = fields.whole("max_tokens", 1..=u32::MAX)?;
    let top_logprobs = fields.whole("top_logprobs", 0..=20)?;
    let logprobs = match (fields.flag("logprobs")?, top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            return Err(Invalid::new(
                "top_logprobs",
                "'top_logprobs' is only allowed when 'logprobs' is true",
            ));
        }
    };
    Ok(GenerateParams {
        max_tokens: newer.or(older),
        logprobs,
        ..sampling(fields)?
    })
}

fn completion_params(fields: Fields<'_>) -> Result<GenerateParams, Invalid> {
    let max_tokens = fields
        .whole("max_tokens", 1..=u32::MAX)?
        .unwrap_or(DEFAULT_COMPLETION);
    let logprobs = fields.whole("logprobs", 0..=20)?;
    let echo = fields.flag("echo")?;
    if echo && logprobs.is_some() {
        return Err(Invalid::unsupported(
            "logprobs",
            "with 'echo' there are none for the prompt; leave one of them out",
        ));
    }
    Ok(GenerateParams {
        max_tokens: Some(max_tokens),
        logprobs,
        echo,
        ..sampling(fields)?
    })
}

/// The `prompt` of `/v1/completions`: a text, several texts, token ids, or several lists of them.
fn prompts(fields: Fields<'_>) -> Result<Vec<Prompt>, Invalid> {
    let wrong = || {
        Invalid::new(
            "prompt",
            "'prompt' must be a string, an array of strings, or an array of token ids",
        )
    };
    let text = |value: &Value| value.as_str().map(|text| Prompt::Text(text.to_owned()));
    let tokens = |value: &Value| {
        let ids = value
            .as_array()?
            .iter()
            .map(|id| u32::try_from(id.as_u64()?).ok());
        Some(Prompt::Tokens(TokenList {
            tokens: ids.collect::<Option<Vec<u32>>>()?,
        }))
    };
    let prompts = match fields.get("prompt") {
        None => {
            return Err(Invalid::new(
                "prompt",
                "Missing required parameter: 'prompt'",
            ));
        }
        Some(value @ Value::String(_)) => text(value).into_iter().collect(),
        Some(value @ Value::Array(list)) => match list.first() {
            Some(Value::String(_)) => list
                .iter()
                .map(text)
                .collect::<Option<Vec<_>>>()
                .ok_or_else(wrong)?,
            Some(Value::Number(_)) => vec![tokens(value).ok_or_else(wrong)?],
            Some(Value::Array(_)) => list
                .iter()
                .map(tokens)
                .collect::<Option<Vec<_>>>()
                .ok_or_else(wrong)?,
            _ => return Err(wrong()),
        },
        Some(_) => return Err(wrong()),
    };
    Ok(prompts)
}

/// What the OpenAI API answers with where `/v1/completions` names no `max_tokens`.
const DEFAULT_COMPLETION: u32 = 16;
const MOST_ANSWERS: u64 = 128;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chat(extra: Value) -> Result<Asked, Invalid> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        Asked::parse(Api::Chat, body.to_string().as_bytes(), 4)
    }

    fn completion(body: Value) -> Result<Asked, Invalid> {
        Asked::parse(Api::Completions, body.to_string().as_bytes(), 4)
    }

    #[test]
    fn both_names_of_the_token_limit_are_read_and_the_newer_wins() {
        assert_eq!(
            chat(json!({"max_tokens": 5})).unwrap().params.max_tokens,
            Some(5)
        );
        assert_eq!(
            chat(json!({"max_tokens": 5, "max_completion_tokens": 7}))
                .unwrap()
                .params
                .max_tokens,
            Some(7)
        );
        assert_eq!(chat(json!({})).unwrap().params.max_tokens, None);
        assert_eq!(
            completion(json!({"prompt": "x"}))
                .unwrap()
                .params
                .max_tokens,
            Some(16)
        );
    }

    #[test]
    fn choices_have_different_seeds_and_their_own_ids() {
        let tasks = chat(json!({"n": 3, "seed": 9})).unwrap().tasks("req-1");
        let seeds: Vec<_> = tasks.iter().map(|task| task.params.seed.unwrap()).collect();
        let ids: Vec<_> = tasks.iter().map(|task| task.id.as_str()).collect();
        assert_eq!(seeds, [9, 10, 11]);
        assert_eq!(ids, ["req-1", "req-1.1", "req-1.2"]);
    }

    #[test]
    fn prompts_come_in_four_shapes() {
        let count =
            |prompt: Value| completion(json!({"prompt": prompt})).map(|asked| asked.prompts.len());
        assert_eq!(count(json!("a")), Ok(1));
        assert_eq!(count(json!(["a", "b"])), Ok(2));
        assert_eq!(count(json!([1, 2, 3])), Ok(1));
        assert_eq!(count(json!([[1], [2, 3]])), Ok(2));
        for wrong in [
            json!([]),
            json!(5),
            json!(["a", 1]),
            json!([1, "a"]),
            json!([[-1]]),
            json!([[5_000_000_000_u64]]),
        ] {
            assert_eq!(count(wrong.clone()).unwrap_err().param, "prompt", "{wrong}");
        }
    }

    #[test]
    fn harmless_fields_are_taken_as_they_are() {
        chat(json!({
            "user": "u", "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
            "store": false, "metadata": {}, "parallel_tool_calls": true, "service_tier": "auto", "top_logprobs": 0,
        }))
        .unwrap();
        completion(json!({"prompt": "x", "n": 2, "best_of": 2, "suffix": ""})).unwrap();
    }

    #[test]
    fn what_is_wrong_or_not_there_is_named() {
        let cases = [
            (chat(json!({"tools": [{}]})), "tools", true),
            (chat(json!({"functions": [{}]})), "functions", true),
            (
                chat(json!({"tool_choice": "required"})),
                "tool_choice",
                true,
            ),
            (
                chat(json!({"response_format": {"type": "json_object"}})),
                "response_format",
                true,
            ),
            (chat(json!({"modalities": ["audio"]})), "modalities", true),
            (chat(json!({"n": 5})), "n", false),
            (chat(json!({"n": 0})), "n", false),
            (chat(json!({"max_tokens": 0})), "max_tokens", false),
            (chat(json!({"top_logprobs": 2})), "top_logprobs", false),
            (chat(json!({"logprobs": 2})), "logprobs", false),
            (
                chat(json!({"logprobs": true, "top_logprobs": 21})),
                "top_logprobs",
                false,
            ),
            (
                chat(json!({"stream_options": {"include_usage": true}})),
                "stream_options",
                false,
            ),
            (chat(json!({"messages": null})), "messages", false),
            (chat(json!({"model": 5})), "model", false),
            (completion(json!({})), "prompt", false),
            (
                completion(json!({"prompt": "x", "suffix": "y"})),
                "suffix",
                true,
            ),
            (
                completion(json!({"prompt": "x", "best_of": 3})),
                "best_of",
                true,
            ),
            (
                completion(json!({"prompt": "x", "echo": true, "logprobs": 1})),
                "logprobs",
                true,
            ),
            (completion(json!({"prompt": vec!["x"; 200]})), "n", false),
            (Asked::parse(Api::Chat, b"{\"model\":", 4), "body", false),
            (Asked::parse(Api::Chat, b"[]", 4), "body", false),
        ];
        for (result, param, unsupported) in cases {
            let invalid = result.expect_err(param);
            assert_eq!(
                (invalid.param.as_str(), invalid.unsupported),
                (param, unsupported),
                "{invalid}"
            );
        }
    }
}
