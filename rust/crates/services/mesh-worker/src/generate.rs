//! From a Generate message to an engine's request, and from its events to messages.

use std::time::{Duration, Instant};

use dcf::{ErrorCode, MsgType};
use mesh_engine::{Event, Finish, Logprob, Request, RequestError, SamplingParams};
use mesh_model::{
    EncodeOptions, Message as ChatMessage, Model, RenderRequest, Rendered, TokenizerError,
};
use mesh_proto::{FinishReason, Generate, GenerateParams, Prompt};
use prost::Message as _;

use mesh_base::random;
use mesh_base::tokens::ByteCounts;

use crate::config::SamplingDefaults;
use crate::preparations;
use crate::templates::{TemplateError, Templates};

/// Reasons for which a Generate message is refused before it reaches an engine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("no prompt was given")]
    NoPrompt,
    #[error("this worker does not serve a model called {name:?}")]
    UnknownModel { name: String },
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Tokenizer(TokenizerError),
    #[error(
        "This model's maximum context length is {context} tokens. However, your prompt has more than {context} tokens, which exceeds the available context size; shorten it"
    )]
    TooLong { context: u32 },
    #[error(transparent)]
    Full(#[from] preparations::Full),
    #[error("chat_template_kwargs cannot be read: {0}")]
    Variables(serde_json::Error),
    #[error("the request could not be prepared: {0}")]
    Failed(String),
}

impl Refusal {
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            Refusal::UnknownModel { .. } => ErrorCode::UNKNOWN_MODEL,
            Refusal::Failed(_) => ErrorCode::INTERNAL,
            Refusal::TooLong { .. } => ErrorCode::CONTEXT_TOO_LONG,
            Refusal::Full(_) => ErrorCode::WORKER_BUSY,
            Refusal::Template(error) if error.is_internal() => ErrorCode::INTERNAL,
            _ => ErrorCode::INVALID_PAYLOAD,
        }
    }
}

/// Refuses a prompt that is too long by its bytes, whatever its tokens are: before anything is made of it.
pub(crate) fn check_length(
    model: &Model,
    prompt: Option<&Prompt>,
    context: u32,
) -> Result<(), Refusal> {
    let Some(spans) = model.tokenizer().spans() else {
        return Ok(());
    };
    let counts = match prompt {
        Some(Prompt::Tokens(list)) if list.tokens.len() > context as usize => {
            return Err(Refusal::TooLong { context });
        }
        Some(Prompt::Text(text)) => ByteCounts::of(text),
        Some(Prompt::Chat(chat)) if model.keeps_text() => chat.kept_texts().collect(),
        _ => return Ok(()),
    };
    match spans.least_tokens(&counts) > u64::from(context) {
        true => Err(Refusal::TooLong { context }),
        false => Ok(()),
    }
}

/// A prompt as the model will read it.
pub(crate) enum Written {
    /// Text to tokenise as it is, with its control tokens.
    Text(String),
    Tokens(Vec<u32>),
    /// A conversation, rendered by the model's template.
    Chat(Rendered),
}

/// Takes the prompt out of `generate` and writes it as the model's template says, if it is a conversation.
pub(crate) async fn write(
    model: &Model,
    templates: &Templates,
    generate: &mut Generate,
) -> Result<Written, Refusal> {
    Ok(match generate.prompt.take().ok_or(Refusal::NoPrompt)? {
        Prompt::Text(text) => Written::Text(text),
        Prompt::Tokens(list) => Written::Tokens(list.tokens),
        Prompt::Chat(chat) => {
            let messages = chat.messages.into_iter().map(|message| ChatMessage {
                role: message.role,
                content: message.content,
            });
            let kwargs = match chat.template_variables.as_str() {
                "" => serde_json::Map::new(),
                variables => serde_json::from_str(variables).map_err(Refusal::Variables)?,
            };
            let request = RenderRequest {
                messages: messages.collect(),
                add_generation_prompt: !chat.no_generation_prompt && !chat.continue_final_message,
                continue_final_message: chat.continue_final_message,
                kwargs,
            };
            Written::Chat(templates.render(model.template(), request).await?)
        }
    })
}

/// Turns `generate` into a request for the engine of `model`, whose context holds so many tokens. Tokenizes:
/// milliseconds for a long prompt.
pub(crate) fn request(
    model: &Model,
    defaults: &SamplingDefaults,
    generate: Generate,
    prompt: Written,
    context: u32,
    now: Instant,
) -> Result<Request, Refusal> {
    let params = generate.params.unwrap_or_default();
    let echo = match &prompt {
        Written::Text(text) if params.echo => text.clone(),
        Written::Tokens(tokens) if params.echo => model.tokenizer().decode(tokens),
        _ => String::new(),
    };
    let deadline = (generate.deadline_ms > 0)
        .then(|| now.checked_add(Duration::from_millis(generate.deadline_ms)))
        .flatten();
    let default_max = (defaults.max_tokens > 0).then_some(defaults.max_tokens);
    Ok(Request {
        id: generate.request_id,
        prompt_tokens: prompt_tokens(model, prompt, context)?,
        generated: generate.generated,
        text_sent: generate.text_sent,
        stop: params.stop.clone(),
        max_tokens: params.max_tokens.or(default_max),
        deadline,
        echo,
        ignore_eos: params.ignore_eos,
        cache_salt: generate.cache_salt,
        params: sampling(params, defaults),
    })
}

fn prompt_tokens(model: &Model, prompt: Written, context: u32) -> Result<Vec<u32>, Refusal> {
    let tokenizer = model.tokenizer();
    let most = context as usize;
    let encoded = match prompt {
        Written::Text(text) => tokenizer.encode_within(&text, EncodeOptions::RAW_PROMPT, most),
        Written::Tokens(tokens) => Ok(tokens),
        Written::Chat(prompt) => tokenizer.encode_prompt_within(&prompt, most),
    };
    encoded.map_err(|error| match error {
        TokenizerError::TooLong { .. } => Refusal::TooLong { context },
        error => Refusal::Tokenizer(error),
    })
}

fn sampling(params: GenerateParams, defaults: &SamplingDefaults) -> SamplingParams {
    SamplingParams {
        temperature: params.temperature.unwrap_or(defaults.temperature),
        top_k: params.top_k.unwrap_or(defaults.top_k),
        top_p: params.top_p.unwrap_or(defaults.top_p),
        min_p: params.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: params
            .repetition_penalty
            .unwrap_or(defaults.repetition_penalty),
        presence_penalty: params.presence_penalty.unwrap_or(0.0),
        frequency_penalty: params.frequency_penalty.unwrap_or(0.0),
        // Heads always say a seed.
        seed: params.seed.unwrap_or_else(random::number),
        logit_bias: params
            .logit_bias
            .iter()
            .map(|bias| (bias.token, bias.bias))
            .collect(),
        logprobs: params.logprobs,
        stop_token_ids: params.stop_token_ids,
        min_tokens: params.min_tokens,
    }
}

/// The DCF message for an event; an error's code and text if it is one.
pub(crate) fn message(
    event: Event,
    model: &Model,
    sequence: u32,
    timestamp_us: u64,
) -> dcf::Message {
    let new = |kind, body: Vec<u8>| dcf::Message::new(kind, sequence, timestamp_us, body);
    match event {
        Event::Tokens(tokens) => {
            let body = mesh_proto::Tokens {
                index: tokens.index,
                tokens: tokens.tokens,
                text: tokens.text,
                logprobs: tokens
                    .logprobs
                    .iter()
                    .map(|l| token_logprob(model, l.chosen, &l.top))
                    .collect(),
            };
            new(MsgType::TOKENS, body.encode_to_vec())
        }
        Event::Done(done) => {
            let finish = match done.finish {
                Finish::Stop => FinishReason::Stop,
                Finish::Length => FinishReason::Length,
            };
            let body = mesh_proto::Done {
                finish: finish.into(),
                prompt_tokens: done.prompt_tokens,
                completion_tokens: done.completion_tokens,
                cached_tokens: done.cached_tokens,
                first_token_us: done.first_token.map_or(0, micros),
                total_us: micros(done.total),
                text: done.text,
            };
            new(MsgType::DONE, body.encode_to_vec())
        }
        Event::Failed(error) => {
            dcf::Message::error(sequence, timestamp_us, code(&error), &error.to_string())
        }
        Event::Scored(_) => {
            let text = "scores are not part of the protocol";
            dcf::Message::error(sequence, timestamp_us, ErrorCode::INTERNAL, text)
        }
    }
}

/// Code of a request's error on the wire.
pub(crate) fn code(error: &RequestError) -> ErrorCode {
    match error {
        RequestError::EmptyPrompt
        | RequestError::NoSuchToken { .. }
        | RequestError::InvalidParameter { .. } => ErrorCode::INVALID_PAYLOAD,
        RequestError::ContextTooLong { .. } => ErrorCode::CONTEXT_TOO_LONG,
        RequestError::QueueFull { .. } => ErrorCode::WORKER_BUSY,
        RequestError::DeadlineExceeded { .. } => ErrorCode::TIMEOUT,
        RequestError::Draining | RequestError::Moved { .. } => ErrorCode::DRAINING,
        RequestError::RingLost { .. } => ErrorCode::NO_WORKERS,
        _ => ErrorCode::INFERENCE_FAILED,
    }
}

fn token_logprob(model: &Model, chosen: Logprob, top: &[Logprob]) -> mesh_proto::TokenLogprob {
    mesh_proto::TokenLogprob {
        token: chosen.token,
        bytes: model.tokenizer().token_bytes(chosen.token).to_vec(),
        logprob: chosen.logprob,
        top: top.iter().map(|&l| token_logprob(model, l, &[])).collect(),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
