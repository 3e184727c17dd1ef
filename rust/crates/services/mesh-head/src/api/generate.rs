//! Parses request bodies of `/v1/chat/completions` and `/v1/completions`.

use std::sync::Arc;

use bytes::Bytes;
use mesh_control::fair::Source;
use mesh_proto::{GenerateParams, Prompt, TokenList};
use serde_json::{Map, Value, json};

use crate::api::fields::{self, Fields, check, conversation, sampling, whole_number};
use crate::api::invalid::Invalid;
use crate::api::json;
use crate::api::text_inputs::{TextInput, text_inputs};
use crate::flight::task::GenerateTask;
use crate::ids;
use crate::workers::MOST_TASK_BYTES;

/// The two OpenAI APIs for text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Api {
    Chat,
    Completions,
}

impl From<Api> for fields::Api {
    fn from(api: Api) -> Self {
        match api {
            Api::Chat => fields::Api::Chat,
            Api::Completions => fields::Api::Completions,
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub api: Api,
    pub model: Option<String>,
    /// Prompts; several only in `/v1/completions`.
    pub prompts: Vec<Arc<Prompt>>,
    pub params: GenerateParams,
    /// Number of answers per prompt.
    pub choices: u32,
    pub stream: bool,
    /// End the stream with a usage chunk.
    pub include_usage: bool,
    /// Fields that mean nothing here.
    pub ignored: Vec<String>,
    /// The plain DCF task that asks for the same, if one can.
    plain: Option<Bytes>,
}

impl Asked {
    /// Reads a body.
    ///
    /// # Errors
    /// [`Invalid`] names the field that is wrong or not supported.
    pub(crate) fn parse(api: Api, body: &[u8], choices_limit: u32) -> Result<Self, Invalid> {
        let object = json::object(body)?;
        let fields = Fields::of(&object);
        let ignored = check(api.into(), fields)?.into_iter();
        let ignored = ignored.map(str::to_owned).collect();
        let model = fields.name("model")?.map(str::to_owned);
        let (prompts, params) = match api {
            Api::Chat => {
                let chat = Prompt::Chat(conversation(fields)?);
                (vec![chat], chat_params(fields)?)
            }
            Api::Completions => (prompts(fields)?, completion_params(fields)?),
        };
        check_lengths(&params)?;
        check_penalty_window(fields, &params)?;
        let choices = fields.whole("n", 1..=choices_limit)?.unwrap_or(1);
        check_best_of(fields, choices)?;
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
            Some(options) if !stream && options.names().next().is_some() => {
                let text = "'stream_options' is only allowed when 'stream' is true";
                return Err(Invalid::new("stream_options", text));
            }
            Some(options) if options.flag("continuous_usage_stats")? => {
                return Err(Invalid::unsupported(
                    "stream_options.continuous_usage_stats",
                    "tokens are counted at the end, with include_usage",
                ));
            }
            Some(options) => options.flag("include_usage")?,
            None => false,
        };
        let plain = match &prompts[..] {
            [prompt] if choices == 1 => plain_task(prompt, &params, fields.map()),
            _ => None,
        };
        let prompts = prompts.into_iter().map(Arc::new).collect();
        Ok(Self {
            api,
            model,
            prompts,
            params,
            choices,
            stream,
            include_usage,
            ignored,
            plain,
        })
    }

    pub(crate) fn answers(&self) -> usize {
        self.prompts.len() * self.choices as usize
    }

    /// Bytes of memory that it may need from now on: its prompts, each once as it is and once on its way to a
    /// worker, and its answers, which end with the model's `context`.
    pub(crate) fn memory(&self, context: Option<u32>) -> u64 {
        let prompts: usize = self.prompts.iter().map(|prompt| bytes_of(prompt)).sum();
        let asked = self.params.max_tokens.unwrap_or(UNSAID_TOKENS);
        let text = BYTES_A_TOKEN * u64::from(asked.min(USUAL_TOKENS));
        let logprobs = self.params.logprobs.map_or(0, |alternatives| {
            // All of them are held until an answer that does not stream is complete.
            let tokens = match self.stream {
                true => asked.min(USUAL_TOKENS),
                false => asked.min(context.unwrap_or(LONG_ANSWER)),
            };
            u64::from(tokens) * u64::from(alternatives.saturating_add(1)) * BYTES_A_LOGPROB
        });
        let answer = PER_ANSWER + text + logprobs;
        let grammar = self.params.grammar.as_ref();
        let prompts = prompts + grammar.map_or(0, |grammar| grammar.text.len());
        2 * prompts as u64 + self.answers() as u64 * answer
    }

    /// One task per answer, in the order of the choices' indices. They may go out as `plain` tasks, too.
    pub(crate) fn tasks(&self, request_id: &str, plain: bool) -> Vec<GenerateTask> {
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
                tasks.push(GenerateTask {
                    id,
                    model: self.model.clone(),
                    prompt: prompt.clone(),
                    params,
                    plain: self.plain.clone().filter(|_| plain),
                    source: Source::default(),
                    salt: 0,
                    holder: None,
                });
            }
        }
        tasks
    }
}

fn chat_params(fields: Fields<'_>) -> Result<GenerateParams, Invalid> {
    let limits = ["max_completion_tokens", "max_tokens", "n_predict"];
    let max_tokens = first_limit(fields, &limits)?;
    let top_logprobs = fields.whole("top_logprobs", 0..=20)?;
    let wanted = match fields.get("logprobs").map(whole_number) {
        Some(Some(number @ (0 | 1))) => number == 1,
        _ => fields.flag("logprobs")?,
    };
    let logprobs = match (wanted, top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            let text = "'top_logprobs' is only allowed when 'logprobs' is true";
            return Err(Invalid::new("top_logprobs", text));
        }
    };
    Ok(GenerateParams {
        max_tokens: max_tokens.flatten(),
        logprobs,
        ..sampling(fields)?
    })
}

fn completion_params(fields: Fields<'_>) -> Result<GenerateParams, Invalid> {
    let max_tokens = first_limit(fields, &["max_tokens", "n_predict"])?;
    let logprobs = match fields.get("logprobs") {
        Some(Value::Bool(wanted)) => wanted.then_some(1),
        _ => fields.whole("logprobs", 0..=20)?,
    };
    let echo = fields.flag("echo")?;
    if echo && logprobs.is_some() {
        let remedy = "with 'echo' there are none for the prompt; leave one of them out";
        return Err(Invalid::unsupported("logprobs", remedy));
    }
    Ok(GenerateParams {
        max_tokens: max_tokens.unwrap_or(Some(DEFAULT_COMPLETION)),
        logprobs,
        echo,
        ..sampling(fields)?
    })
}

/// The first of these limits that is given; within it, `None` is without limit.
fn first_limit(fields: Fields<'_>, names: &[&str]) -> Result<Option<Option<u32>>, Invalid> {
    let mut found = None;
    for name in names {
        let limit = fields.limit(name, 1)?;
        if fields.get(name).is_some() {
            found.get_or_insert(limit);
        }
    }
    Ok(found)
}

fn check_lengths(params: &GenerateParams) -> Result<(), Invalid> {
    let least = params.min_tokens;
    match params.max_tokens {
        Some(most) if least > most => {
            let text = format!(
                "'min_tokens' is {least}, more than the limit of {most} tokens ('max_tokens')"
            );
            Err(Invalid::new("min_tokens", text))
        }
        _ => Ok(()),
    }
}

/// llama.cpp's penalties look at the last `repeat_last_n` tokens, ours at the whole text.
fn check_penalty_window(fields: Fields<'_>, params: &GenerateParams) -> Result<(), Invalid> {
    let is_all = |value| whole_number(value) == Some(-1);
    let whole_text = fields.get("repeat_last_n").is_none_or(is_all);
    let off = [
        params.repetition_penalty.unwrap_or(1.0) == 1.0,
        params.presence_penalty.unwrap_or(0.0) == 0.0,
        params.frequency_penalty.unwrap_or(0.0) == 0.0,
    ];
    if whole_text || off == [true; 3] {
        return Ok(());
    }
    let remedy = "penalties look at the whole text; leave it out or set it to -1";
    Err(Invalid::unsupported("repeat_last_n", remedy))
}

fn check_best_of(fields: Fields<'_>, choices: u32) -> Result<(), Invalid> {
    let fits = |value| whole_number(value) == Some(i64::from(choices));
    if fields.get("best_of").is_none_or(fits) {
        return Ok(());
    }
    let remedy = "leave it out, or set it to the value of 'n'";
    Err(Invalid::unsupported("best_of", remedy))
}

/// The plain DCF task with a single question: the question, with parameters if there are any. `None` if a
/// worker that takes plain tasks could not be trusted to act upon all that is asked for.
fn plain_task(
    prompt: &Prompt,
    params: &GenerateParams,
    fields: &Map<String, Value>,
) -> Option<Bytes> {
    let Prompt::Chat(chat) = prompt else {
        return None;
    };
    let [message] = &chat.messages[..] else {
        return None;
    };
    let plain = message.role == "user"
        && prompt.revision() == 0
        && params.revision() == 0
        && params.logprobs.is_none()
        && params.logit_bias.is_empty()
        && !params.ignore_eos;
    if !plain {
        return None;
    }
    let mut task = json!({ "prompt": message.content });
    for name in PLAIN_PARAMETERS {
        if let Some(value) = fields.get(*name).filter(|value| !value.is_null()) {
            task[*name] = value.clone();
        }
    }
    if let Some(most) = params.max_tokens {
        task["max_tokens"] = most.into();
    }
    let payload = match task.as_object().map_or(0, Map::len) {
        1 => Bytes::from(message.content.clone()),
        _ => Bytes::from(task.to_string()),
    };
    (payload.len() <= MOST_TASK_BYTES).then_some(payload)
}

fn prompts(fields: Fields<'_>) -> Result<Vec<Prompt>, Invalid> {
    let shapes = "'prompt' must be a string, an array of strings, or an array of token ids";
    let too_many = |count| {
        let text = format!("{count} prompts are over the limit of {MOST_ANSWERS} answers");
        Invalid::new("prompt", text)
    };
    let limit = (MOST_ANSWERS as usize, too_many);
    let prompts = text_inputs(fields, "prompt", shapes, limit)?;
    if prompts.is_empty() {
        return Err(Invalid::new("prompt", shapes));
    }
    let prompt = |input| match input {
        TextInput::Text(text) => Prompt::Text(text),
        TextInput::Tokens(tokens) => Prompt::Tokens(TokenList { tokens }),
    };
    Ok(prompts.into_iter().map(prompt).collect())
}

fn bytes_of(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(list) => list.tokens.len() * size_of::<u32>(),
        Prompt::Chat(chat) => {
            let messages = chat.messages.iter();
            let texts = messages.map(|m| m.content.len() + m.role.len() + size_of_val(m));
            texts.sum::<usize>() + chat.template_variables.len()
        }
    }
}

/// Bytes that a running answer is charged besides its tokens.
const PER_ANSWER: u64 = 8 << 10;
/// A token with its text.
const BYTES_A_TOKEN: u64 = 16;
/// The probability of a token or of one of its alternatives, as it comes and in the answer's JSON.
const BYTES_A_LOGPROB: u64 = 96;
/// Tokens of an answer without a limit, for the estimate of its memory.
const UNSAID_TOKENS: u32 = 2048;
/// Tokens of a long answer of a model whose context is not known.
const LONG_ANSWER: u32 = 8192;
/// Tokens that an answer is counted with at most: of the many that wait few are longer at once.
const USUAL_TOKENS: u32 = 512;

/// The OpenAI API's default of `max_tokens` for `/v1/completions`.
const DEFAULT_COMPLETION: u32 = 16;
const MOST_ANSWERS: u64 = 128;
/// Parameters of plain tasks that all workers know, besides `max_tokens`.
const PLAIN_PARAMETERS: &[&str] = &["temperature", "top_p", "seed", "stop"];

#[cfg(test)]
mod tests;
