//! The handling of every field that a well-known server has.
//!
//! A field is acted upon, or it changes nothing here, or it is refused unless its value asks for nothing. A
//! field that stands in no table is ignored, and named in the answer's headers.

use serde_json::Value;

use super::reader::{Fields, is_empty};
use crate::api::invalid::Invalid;

/// The API that a request came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Api {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/v1/embeddings`.
    Embeddings,
}

/// Refuses fields that change the meaning of the answer and are not supported; to ignore them would give a
/// wrong answer. Returns the names of unknown fields.
///
/// # Errors
/// [`Invalid`] names the first field of them and what to do instead.
pub(crate) fn check<'a>(api: Api, fields: Fields<'a>) -> Result<Vec<&'a str>, Invalid> {
    let (read, harmless, refused) = match api {
        Api::Chat => (CHAT_READ, HARMLESS, &[CHAT_REFUSED, REFUSED][..]),
        Api::Completions => (
            COMPLETIONS_READ,
            HARMLESS,
            &[COMPLETIONS_REFUSED, REFUSED][..],
        ),
        Api::Embeddings => (
            EMBEDDINGS_READ,
            EMBEDDINGS_HARMLESS,
            &[EMBEDDINGS_REFUSED][..],
        ),
    };
    let is_read = |name: &str| {
        read.contains(&name) || (api != Api::Embeddings && GENERATION_READ.contains(&name))
    };
    let mut unknown = Vec::new();
    for name in fields.names() {
        if is_read(name) || harmless.contains(&name) {
            continue;
        }
        let rules = refused.iter().copied().flatten();
        let Some(rule) = rules.into_iter().find(|rule| rule.name == name) else {
            // Speculative decoding, by whatever means, changes the speed alone.
            if !name.starts_with("speculative") {
                unknown.push(name);
            }
            continue;
        };
        if let Some(value) = fields.get(name)
            && !(rule.asks_for_nothing)(value)
        {
            return Err(Invalid::unsupported(name, rule.remedy));
        }
    }
    Ok(unknown)
}

/// A field that is refused unless its value asks for nothing.
struct Rule {
    name: &'static str,
    asks_for_nothing: fn(&Value) -> bool,
    remedy: &'static str,
}

const fn refuse(name: &'static str, remedy: &'static str) -> Rule {
    unless(name, is_empty, remedy)
}

const fn unless(
    name: &'static str,
    asks_for_nothing: fn(&Value) -> bool,
    remedy: &'static str,
) -> Rule {
    Rule {
        name,
        asks_for_nothing,
        remedy,
    }
}

fn is(value: &Value, number: f64) -> bool {
    value.as_f64() == Some(number)
}

fn zero(value: &Value) -> bool {
    is_empty(value) || is(value, 0.0)
}

fn one(value: &Value) -> bool {
    is_empty(value) || is(value, 1.0)
}

fn at_most_zero(value: &Value) -> bool {
    is_empty(value) || value.as_f64().is_some_and(|number| number <= 0.0)
}

fn at_most_one(value: &Value) -> bool {
    is_empty(value) || value.as_f64().is_some_and(|number| number <= 1.0)
}

fn yes(value: &Value) -> bool {
    value == true
}

fn word(value: &Value, words: &[&str]) -> bool {
    is_empty(value)
        || value
            .as_str()
            .is_some_and(|text| words.iter().any(|word| word.eq_ignore_ascii_case(text)))
}

fn no_tool(value: &Value) -> bool {
    word(value, &["none", "auto"])
}

fn text_format(value: &Value) -> bool {
    is_empty(value) || value["type"] == "text"
}

fn text_only(value: &Value) -> bool {
    let is_text = |list: &Vec<Value>| list.iter().all(|modality| modality == "text");
    value.as_array().is_some_and(is_text)
}

const TEXT_ONLY: &str = "ask for text only";
const LEAVE_OUT: &str = "leave it out";
const UNCONSTRAINED: &str =
    "answers cannot be held to a grammar or schema yet; describe the form in the prompt";
const OTHER_SAMPLERS: &str = "leave it out, or use temperature, top_k, top_p and min_p";
const OTHER_PENALTIES: &str =
    "use repetition_penalty, presence_penalty and frequency_penalty, which look at the whole text";
const THINKING: &str = "use chat_template_kwargs, such as {\"enable_thinking\": false}";

/// Fields that both APIs that generate text act upon.
const GENERATION_READ: &[&str] = &[
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "random_seed",
    "sampling_seed",
    "stop",
    "logit_bias",
    "ignore_eos",
    "stop_token_ids",
    "min_tokens",
    "max_tokens",
    "n_predict",
    "n",
    "stream",
    "stream_options",
    "logprobs",
    "repeat_last_n",
];
const CHAT_READ: &[&str] = &[
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "continue_final_message",
    "add_generation_prompt",
    "chat_template_kwargs",
    "enable_thinking",
    "reasoning_effort",
];
const COMPLETIONS_READ: &[&str] = &["prompt", "echo", "best_of"];
const EMBEDDINGS_READ: &[&str] = &[
    "model",
    "input",
    "encoding_format",
    "dimensions",
    "user",
    "input_type",
    "prompt_name",
];

/// Fields that change nothing in an answer: the asker and the reason, hints on speed and caching, and
/// switches of features that do not exist here.
const HARMLESS: &[&str] = &[
    // OpenAI
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "parallel_tool_calls",
    // vLLM
    "priority",
    "request_id",
    "cache_salt",
    "kv_transfer_params",
    "mm_processor_kwargs",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "spaces_between_special_tokens",
    // llama.cpp
    "cache_prompt",
    "id_slot",
    "slot_id",
    "n_keep",
    "n_discard",
    "n_cache_reuse",
    "mirostat_tau",
    "mirostat_eta",
    "dynatemp_exponent",
    "xtc_threshold",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "parse_tool_calls",
    "preserved_tokens",
    "thinking_forced_open",
    "backend_sampling",
    // SGLang
    "rid",
    "extra_key",
    "data_parallel_rank",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "stream_reasoning",
    // Ollama, LM Studio, text-generation-webui, TGI
    "keep_alive",
    "ttl",
    "draft_model",
    "prompt_lookup_num_tokens",
    "tool_prompt",
];
const EMBEDDINGS_HARMLESS: &[&str] = &[
    "metadata",
    "safety_identifier",
    "service_tier",
    "store",
    "priority",
    "request_id",
    "cache_salt",
    "keep_alive",
    "ttl",
    "rid",
];

/// Fields that both APIs that generate text refuse.
const REFUSED: &[Rule] = &[
    // OpenAI
    unless("response_format", text_format, UNCONSTRAINED),
    // vLLM, SGLang, TGI
    refuse("structured_outputs", UNCONSTRAINED),
    refuse("structural_tag", UNCONSTRAINED),
    refuse("guided_json", UNCONSTRAINED),
    refuse("guided_regex", UNCONSTRAINED),
    refuse("guided_choice", UNCONSTRAINED),
    refuse("guided_grammar", UNCONSTRAINED),
    refuse("guided_json_object", UNCONSTRAINED),
    refuse("guideline", UNCONSTRAINED),
    refuse("regex", UNCONSTRAINED),
    refuse("ebnf", UNCONSTRAINED),
    refuse("use_beam_search", "answers are sampled; leave it out"),
    unless(
        "length_penalty",
        one,
        "it belongs to beam search, which is not supported",
    ),
    refuse(
        "early_stopping",
        "it belongs to beam search, which is not supported",
    ),
    refuse(
        "include_stop_str_in_output",
        "the stop text is not part of the answer; add it yourself",
    ),
    refuse(
        "no_stop_trim",
        "the stop text is not part of the answer; add it yourself",
    ),
    refuse("stop_regex", "use 'stop' with texts"),
    unless(
        "skip_special_tokens",
        |value| yes(value) || value.is_null(),
        "control tokens are never part of the text",
    ),
    refuse("allowed_token_ids", "use logit_bias"),
    refuse("bad_words", "use logit_bias"),
    refuse("bad_words_ids", "use logit_bias"),
    unless(
        "prompt_logprobs",
        |value| value.is_null() || value == false,
        "there are log probabilities of the answer only",
    ),
    refuse("logprob_token_ids", "use logprobs"),
    refuse("logits_processors", LEAVE_OUT),
    refuse("custom_logit_processor", LEAVE_OUT),
    refuse("custom_params", LEAVE_OUT),
    unless(
        "truncate_prompt_tokens",
        |value| value.is_null(),
        "shorten the prompt yourself",
    ),
    refuse("return_token_ids", "use logprobs, which name each token"),
    refuse(
        "return_tokens_as_token_ids",
        "use logprobs, which name each token",
    ),
    refuse("return_hidden_states", LEAVE_OUT),
    refuse("vllm_xargs", LEAVE_OUT),
    refuse("repetition_detection", LEAVE_OUT),
    refuse("thinking_token_budget", THINKING),
    refuse("thinking_budget", THINKING),
    refuse("lora_path", "name a model that has the adapter built in"),
    refuse("lora", "name a model that has the adapter built in"),
    refuse("adapter_id", "name a model that has the adapter built in"),
    refuse("session_params", "send the whole conversation each time"),
    refuse("prompt_embeds", "send text or token ids"),
    refuse(
        "input_ids",
        "send text, or token ids as 'prompt' of /v1/completions",
    ),
    // llama.cpp
    refuse("grammar", UNCONSTRAINED),
    refuse("grammar_lazy", UNCONSTRAINED),
    refuse("grammar_triggers", UNCONSTRAINED),
    refuse("json_schema", UNCONSTRAINED),
    unless("truncation_length", zero, "shorten the prompt yourself"),
    unless("n_probs", zero, "use logprobs"),
    unless("min_keep", at_most_one, OTHER_SAMPLERS),
    unless("dynatemp_range", zero, OTHER_SAMPLERS),
    unless("typical_p", one, OTHER_SAMPLERS),
    unless("typ_p", one, OTHER_SAMPLERS),
    unless("tfs_z", one, OTHER_SAMPLERS),
    unless("tfs", one, OTHER_SAMPLERS),
    unless("xtc_probability", zero, OTHER_SAMPLERS),
    unless("mirostat", zero, OTHER_SAMPLERS),
    unless("top_n_sigma", at_most_zero, OTHER_SAMPLERS),
    unless("adaptive_target", at_most_zero, OTHER_SAMPLERS),
    unless("dry_multiplier", zero, OTHER_PENALTIES),
    refuse("samplers", "samplers always run in one order; leave it out"),
    refuse("penalize_nl", OTHER_PENALTIES),
    unless("n_indent", zero, LEAVE_OUT),
    unless(
        "t_max_predict_ms",
        at_most_zero,
        "close the connection when it takes too long",
    ),
    unless(
        "t_max_prompt_ms",
        at_most_zero,
        "close the connection when it takes too long",
    ),
    refuse(
        "post_sampling_probs",
        "log probabilities are the model's own",
    ),
    refuse("return_tokens", "use logprobs, which name each token"),
    refuse("return_progress", "a stream shows what there is"),
    refuse("timings_per_token", "the last chunk has the timings"),
    refuse("response_fields", "all fields are sent"),
    refuse("image_data", TEXT_ONLY),
    refuse("multimodal_data", TEXT_ONLY),
    // Ollama's own API
    unless("format", is_empty, UNCONSTRAINED),
    refuse(
        "options",
        "put the parameters beside 'model', under OpenAI's names",
    ),
    refuse(
        "template",
        "prompts are written by the model's own template; /v1/completions takes them as they are",
    ),
    refuse("images", TEXT_ONLY),
    refuse("num_predict", "use max_tokens"),
    refuse("num_ctx", "set 'context' at the worker"),
    refuse("system", "send a message of the role system"),
    refuse("raw", "/v1/completions takes prompts as they are"),
    // TGI, text-generation-webui, Anthropic, OpenRouter
    refuse("max_new_tokens", "use max_tokens"),
    refuse("max_length", "use max_tokens"),
    refuse("min_length", "use min_tokens"),
    refuse("min_new_tokens", "use min_tokens"),
    refuse("stop_sequences", "use stop"),
    unless(
        "do_sample",
        |value| yes(value) || value.is_null(),
        "use temperature 0",
    ),
    refuse("watermark", LEAVE_OUT),
    refuse("decoder_input_details", LEAVE_OUT),
    unless("top_n_tokens", zero, "use logprobs"),
    unless("top_a", zero, OTHER_SAMPLERS),
    unless("epsilon_cutoff", zero, OTHER_SAMPLERS),
    unless("eta_cutoff", zero, OTHER_SAMPLERS),
    unless("smoothing_factor", zero, OTHER_SAMPLERS),
    unless("penalty_alpha", zero, OTHER_SAMPLERS),
    unless("encoder_repetition_penalty", one, OTHER_PENALTIES),
    unless("no_repeat_ngram_size", zero, OTHER_PENALTIES),
    unless("guidance_scale", one, LEAVE_OUT),
    refuse("negative_prompt", LEAVE_OUT),
    refuse("ban_eos_token", "use ignore_eos or min_tokens"),
    refuse("custom_token_bans", "use logit_bias"),
    refuse("grammar_string", UNCONSTRAINED),
    refuse("dynamic_temperature", OTHER_SAMPLERS),
    refuse(
        "temperature_last",
        "samplers always run in one order; leave it out",
    ),
    refuse(
        "sampler_priority",
        "samplers always run in one order; leave it out",
    ),
    refuse(
        "sampler_order",
        "samplers always run in one order; leave it out",
    ),
    refuse("search_parameters", TEXT_ONLY),
    refuse("data_sources", TEXT_ONLY),
    refuse("plugins", TEXT_ONLY),
    refuse("safe_prompt", "send a message of the role system"),
];

const CHAT_REFUSED: &[Rule] = &[
    refuse("tools", "tools are not supported yet; ask for text only"),
    refuse(
        "functions",
        "tools are not supported yet; ask for text only",
    ),
    unless(
        "tool_choice",
        no_tool,
        "tools are not supported yet; ask for text only",
    ),
    unless(
        "function_call",
        no_tool,
        "tools are not supported yet; ask for text only",
    ),
    unless(
        "best_of",
        one,
        "leave it out, or set it to the value of 'n'",
    ),
    refuse("audio", LEAVE_OUT),
    refuse("web_search_options", LEAVE_OUT),
    unless(
        "modalities",
        |value| is_empty(value) || text_only(value),
        "only text is generated",
    ),
    unless(
        "verbosity",
        |value| word(value, &["medium"]),
        "say in the prompt how long the answer is to be",
    ),
    refuse(
        "echo",
        "the last message is not part of the answer; add it yourself",
    ),
    refuse(
        "add_special_tokens",
        "the model's template writes its control tokens",
    ),
    refuse("documents", "put them into a message"),
    refuse(
        "chat_template",
        "prompts are written by the model's own template; /v1/completions takes them as they are",
    ),
    unless(
        "reasoning_format",
        |value| word(value, &["none", "auto"]),
        "what the model thinks stays in the answer",
    ),
    unless("separate_reasoning", |_| true, ""),
    unless(
        "include_reasoning",
        |value| yes(value) || value.is_null(),
        THINKING,
    ),
    refuse("reasoning", "use reasoning_effort or chat_template_kwargs"),
    refuse("thinking", THINKING),
    unless("think", is_empty, THINKING),
    unless("prompt_mode", is_empty, THINKING),
    refuse("suffix", "only /v1/completions could take it"),
    refuse("prompt", "send 'messages', or POST /v1/completions"),
];

const COMPLETIONS_REFUSED: &[Rule] = &[
    refuse(
        "suffix",
        "put all text before the answer into 'prompt', with the model's own tokens for filling in the middle",
    ),
    refuse(
        "input_prefix",
        "put all text before the answer into 'prompt', with the model's own tokens for filling in the middle",
    ),
    refuse(
        "input_suffix",
        "put all text before the answer into 'prompt', with the model's own tokens for filling in the middle",
    ),
    refuse(
        "input_extra",
        "put all text before the answer into 'prompt'",
    ),
    unless(
        "add_special_tokens",
        |value| yes(value) || value.is_null(),
        "send token ids as 'prompt'",
    ),
    unless(
        "add_bos_token",
        |value| yes(value) || value.is_null(),
        "send token ids as 'prompt'",
    ),
    refuse("messages", "POST /v1/chat/completions takes messages"),
    refuse("tools", "tools are not supported yet; ask for text only"),
    refuse(
        "chat_template_kwargs",
        "only /v1/chat/completions uses a template",
    ),
];

const EMBEDDINGS_REFUSED: &[Rule] = &[
    unless(
        "truncate",
        |value| yes(value) || value.is_null() || word_end(value),
        "texts that are too long lose their end; cut them yourself",
    ),
    unless(
        "truncation_direction",
        |value| word(value, &["right"]),
        "texts that are too long lose their end; cut them yourself",
    ),
    unless(
        "truncate_prompt_tokens",
        |value| value.is_null() || is(value, -1.0),
        "texts that are too long lose their end; cut them yourself",
    ),
    unless(
        "normalize",
        |value| yes(value) || value.is_null(),
        "vectors are as the model's own files say",
    ),
    unless(
        "normalized",
        |value| yes(value) || value.is_null(),
        "vectors are as the model's own files say",
    ),
    unless(
        "embd_normalize",
        |value| is(value, 2.0) || value.is_null(),
        "vectors are as the model's own files say",
    ),
    unless(
        "add_special_tokens",
        |value| yes(value) || value.is_null(),
        "the model's control tokens are added",
    ),
    unless("embedding_types", floats, "use encoding_format"),
    unless("embedding_type", floats, "use encoding_format"),
    unless("output_dtype", floats, "vectors are 32-bit floats"),
    unless("embed_dtype", floats, "vectors are 32-bit floats"),
    unless(
        "endianness",
        |value| word(value, &["native", "little"]),
        "base64 is little-endian",
    ),
    refuse("output_dimension", "use dimensions"),
    refuse("late_chunking", LEAVE_OUT),
    refuse("task", "use input_type"),
    refuse("prompt", "use input_type, or put it before each text"),
    refuse("instruction", "put it before each text"),
    refuse("messages", "send texts as 'input'"),
    refuse("content", "send texts as 'input'"),
    refuse("texts", "send texts as 'input'"),
    refuse("images", "send texts as 'input'"),
    refuse("inputs", "send texts as 'input'"),
    refuse("options", LEAVE_OUT),
    refuse("pooling", "vectors are as the model's own files say"),
    refuse("additional_data", LEAVE_OUT),
];

fn word_end(value: &Value) -> bool {
    value.as_str().is_some_and(|text| {
        ["end", "right"]
            .iter()
            .any(|word| word.eq_ignore_ascii_case(text))
    })
}

fn floats(value: &Value) -> bool {
    let is_float = |value: &Value| word(value, &["float", "float32"]);
    match value.as_array() {
        Some(list) => list.iter().all(is_float),
        None => is_float(value),
    }
}

#[cfg(test)]
mod tests;
