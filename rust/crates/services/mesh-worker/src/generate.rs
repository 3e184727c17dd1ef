//! Chat and completions: from a Generate message to an engine's request, and from its events to messages.

pub(crate) mod load;
mod model;

pub(crate) use self::model::LanguageModel;

use std::time::{Duration, Instant};

use dcf::MsgType;
use mesh_base::random;
use mesh_base::tokens::ByteCounts;
use mesh_engine::{
    Event, Finish, Generation, GenerationRequest, Logprob, Request, RequestError, SamplingParams,
    StageInfo,
};
use mesh_model::{
    EncodeOptions, Message as ChatMessage, Model, RenderRequest, Rendered, TokenizerError,
};
use mesh_proto::{FinishReason, Generate, GenerateParams, Prompt};
use prost::Message as _;

use crate::codec::{Bodies, Codec, ModelEngine, PrepareError, TaskHeader, deadline};
use crate::config::SamplingDefaults;
use crate::templates::Templates;

/// A prompt as the model will read it.
pub(crate) enum WrittenPrompt {
    /// Text to tokenise as it is, with its control tokens.
    Text(String),
    Tokens(Vec<u32>),
    Chat(Rendered),
}

impl Codec for Generation {
    const TASK: MsgType = MsgType::GENERATE;
    const MODEL: &'static str = "a model";

    type Task = Generate;
    type Model = LanguageModel;
    /// The prompt, and the task without it.
    type Written = (WrittenPrompt, Generate);
    /// For the bytes of tokens.
    type Reply = LanguageModel;

    fn header(generate: &Generate) -> TaskHeader<'_> {
        TaskHeader {
            id: &generate.request_id,
            model: &generate.model,
            progress_ms: generate.progress_ms,
        }
    }

    fn check(model: &ModelEngine<Self>, generate: &Generate) -> Result<(), PrepareError> {
        let context = model.engine.info().context;
        check_length(&model.model, generate.prompt.as_ref(), context)
    }

    fn bytes(generate: &Generate) -> usize {
        match &generate.prompt {
            None => 0,
            Some(Prompt::Text(text)) => text.len(),
            Some(Prompt::Tokens(list)) => list.tokens.len() * size_of::<u32>(),
            Some(Prompt::Chat(chat)) => {
                let texts = chat
                    .messages
                    .iter()
                    .map(|message| message.content.len() + message.role.len() + BYTES_PER_MESSAGE);
                texts.sum::<usize>() + chat.template_variables.len()
            }
        }
    }

    async fn write(
        model: &ModelEngine<Self>,
        templates: &Templates,
        mut generate: Generate,
    ) -> Result<Self::Written, PrepareError> {
        let invalid = |fault: &str| PrepareError::Invalid(fault.to_owned());
        let prompt = generate.prompt.take();
        let prompt = match prompt.ok_or_else(|| invalid("no prompt was given"))? {
            Prompt::Text(text) => WrittenPrompt::Text(text),
            Prompt::Tokens(list) => WrittenPrompt::Tokens(list.tokens),
            Prompt::Chat(chat) => {
                let messages = chat.messages.into_iter().map(|message| ChatMessage {
                    role: message.role,
                    content: message.content,
                });
                let kwargs = match chat.template_variables.as_str() {
                    "" => serde_json::Map::new(),
                    variables => serde_json::from_str(variables).map_err(|error| {
                        invalid(&format!("chat_template_kwargs cannot be read: {error}"))
                    })?,
                };
                let request = RenderRequest {
                    messages: messages.collect(),
                    add_generation_prompt: !chat.no_generation_prompt
                        && !chat.continue_final_message,
                    continue_final_message: chat.continue_final_message,
                    kwargs,
                };
                let template = model.model.template();
                WrittenPrompt::Chat(templates.render(template, request).await?)
            }
        };
        Ok((prompt, generate))
    }

    fn request(
        model: &ModelEngine<Self>,
        defaults: &SamplingDefaults,
        (prompt, generate): Self::Written,
        arrived: Instant,
    ) -> Result<(GenerationRequest, LanguageModel), PrepareError> {
        let context = model.engine.info().context;
        let model = model.model.clone();
        let params = generate.params.unwrap_or_default();
        let echo = match &prompt {
            WrittenPrompt::Text(text) if params.echo => text.clone(),
            WrittenPrompt::Tokens(tokens) if params.echo => model.tokenizer().decode(tokens),
            _ => String::new(),
        };
        let default_max = (defaults.max_tokens > 0).then_some(defaults.max_tokens);
        let request = Request {
            id: generate.request_id,
            prompt_tokens: prompt_tokens(&model, prompt, context)?,
            generated: generate.generated,
            text_sent: generate.text_sent,
            stop: params.stop.clone(),
            max_tokens: params.max_tokens.or(default_max),
            deadline: deadline(arrived, generate.deadline_ms),
            echo,
            ignore_eos: params.ignore_eos,
            cache_salt: generate.cache_salt,
            grammar: params
                .grammar
                .as_ref()
                .map(|grammar| model.grammar(grammar))
                .transpose()?,
            params: sampling(params, defaults),
        };
        Ok((request.into(), model))
    }

    async fn encode(model: &LanguageModel, event: Event) -> Result<Bodies, RequestError> {
        Ok(vec![match event {
            Event::Tokens(tokens) => {
                let logprobs = tokens.logprobs.iter();
                let body = mesh_proto::Tokens {
                    index: tokens.index,
                    tokens: tokens.tokens,
                    text: tokens.text,
                    logprobs: logprobs
                        .map(|l| token_logprob(model, l.chosen, &l.top))
                        .collect(),
                };
                (MsgType::TOKENS, body.encode_to_vec())
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
                (MsgType::DONE, body.encode_to_vec())
            }
            Event::Failed(error) => return Err(error),
            Event::Scored(_) => unreachable!("tasks ask for text, not for scores"),
        }])
    }

    fn max_rows(info: &StageInfo) -> usize {
        info.max_rows as usize
    }

    fn of_ring(ring: ModelEngine) -> Option<ModelEngine> {
        Some(ring)
    }
}

/// Refuses a prompt that is too long by its bytes, whatever its tokens are: before anything is made of it.
fn check_length(model: &Model, prompt: Option<&Prompt>, context: u32) -> Result<(), PrepareError> {
    let Some(spans) = model.tokenizer().spans() else {
        return Ok(());
    };
    let counts = match prompt {
        Some(Prompt::Tokens(list)) if list.tokens.len() > context as usize => {
            return Err(PrepareError::TooLong { context });
        }
        Some(Prompt::Text(text)) => ByteCounts::of(text),
        Some(Prompt::Chat(chat)) if model.keeps_text() => chat.kept_texts().collect(),
        _ => return Ok(()),
    };
    match spans.least_tokens(&counts) > u64::from(context) {
        true => Err(PrepareError::TooLong { context }),
        false => Ok(()),
    }
}

fn prompt_tokens(
    model: &Model,
    prompt: WrittenPrompt,
    context: u32,
) -> Result<Vec<u32>, PrepareError> {
    let tokenizer = model.tokenizer();
    let most = context as usize;
    let encoded = match prompt {
        WrittenPrompt::Text(text) => {
            tokenizer.encode_within(&text, EncodeOptions::RAW_PROMPT, most)
        }
        WrittenPrompt::Tokens(tokens) => Ok(tokens),
        WrittenPrompt::Chat(prompt) => tokenizer.encode_prompt_within(&prompt, most),
    };
    encoded.map_err(|error| match error {
        TokenizerError::TooLong { .. } => PrepareError::TooLong { context },
        error => PrepareError::Invalid(error.to_string()),
    })
}

fn sampling(params: GenerateParams, defaults: &SamplingDefaults) -> SamplingParams {
    let repetition_penalty = params.repetition_penalty;
    let logit_bias = params.logit_bias.iter();
    SamplingParams {
        temperature: params.temperature.unwrap_or(defaults.temperature),
        top_k: params.top_k.unwrap_or(defaults.top_k),
        top_p: params.top_p.unwrap_or(defaults.top_p),
        min_p: params.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: params.presence_penalty.unwrap_or(0.0),
        frequency_penalty: params.frequency_penalty.unwrap_or(0.0),
        // Heads always say a seed.
        seed: params.seed.unwrap_or_else(random::number),
        logit_bias: logit_bias.map(|bias| (bias.token, bias.bias)).collect(),
        logprobs: params.logprobs,
        stop_token_ids: params.stop_token_ids,
        min_tokens: params.min_tokens,
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

/// Bytes that a message of a conversation takes besides its text.
const BYTES_PER_MESSAGE: usize = 64;
