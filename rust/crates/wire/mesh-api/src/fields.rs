//! The fields of requests that well-known servers have and that this API does not act upon.
//!
//! A field is acted upon (those are the fields of the request types, and [`ALIASES`] of theirs), or it changes
//! nothing here, or it is refused unless its value asks for nothing. A field that stands in no table is
//! ignored, and named in the answer's headers.

use serde_json::Value;

/// Other names of fields of the request types, each with the field that it means.
pub const ALIASES: &[(&str, &str)] = &[
    // llama.cpp's and Ollama's names.
    ("repeat_penalty", "repetition_penalty"),
    ("n_predict", "max_tokens"),
    // vLLM's and SGLang's names.
    ("guided_json", "json_schema"),
    ("guided_regex", "regex"),
    ("guided_grammar", "grammar"),
    ("ebnf", "grammar"),
    // Mistral's and SGLang's names.
    ("random_seed", "seed"),
    ("sampling_seed", "seed"),
    // sentence-transformers' name.
    ("prompt_name", "input_type"),
    // Names of stable-diffusion.cpp, AUTOMATIC1111, diffusers, LocalAI and others.
    ("num_inference_steps", "steps"),
    ("inference_steps", "steps"),
    ("sample_steps", "steps"),
    ("guidance", "guidance_scale"),
    ("cfg_scale", "guidance_scale"),
    ("sampler_name", "sampler"),
    ("sample_method", "sampler"),
    ("sampling_method", "sampler"),
    ("schedule", "scheduler"),
    ("denoising_strength", "strength"),
    ("prompt_strength", "strength"),
];

/// The fields of one kind of request that are not acted upon.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// Names of fields that change nothing in an answer, with blanks between them.
    harmless: &'static [&'static str],
    refused: [&'static [Refused]; 2],
}

/// `/v1/chat/completions`.
pub const CHAT: Table = Table {
    harmless: HARMLESS,
    refused: [CHAT_REFUSED, REFUSED],
};
/// `/v1/completions`.
pub const COMPLETIONS: Table = Table {
    harmless: HARMLESS,
    refused: [COMPLETIONS_REFUSED, REFUSED],
};
/// `/v1/embeddings`.
pub const EMBEDDINGS: Table = Table {
    harmless: EMBEDDINGS_HARMLESS,
    refused: [EMBEDDINGS_REFUSED, &[]],
};

/// `/v1/images/generations`.
pub const IMAGES: Table = Table {
    harmless: &[IMAGES_HARMLESS, GENERATIONS_HARMLESS],
    refused: [GENERATIONS_REFUSED, IMAGES_REFUSED],
};

/// `/v1/images/edits`.
pub const IMAGE_EDITS: Table = Table {
    harmless: &[IMAGES_HARMLESS],
    refused: [EDITS_REFUSED, IMAGES_REFUSED],
};

impl Table {
    /// Names of the fields that change nothing in an answer.
    pub fn harmless(&self) -> impl Iterator<Item = &'static str> {
        let names = |names: &'static &'static str| names.split_ascii_whitespace();
        self.harmless.iter().flat_map(names)
    }

    /// Names of the refused fields, each with its rule.
    pub fn refused(&self) -> impl Iterator<Item = (&'static str, &'static Refused)> {
        let named = |rule: &'static Refused| {
            let names = rule.names.split_ascii_whitespace();
            names.map(move |name| (name, rule))
        };
        self.refused.into_iter().flatten().flat_map(named)
    }
}

/// Fields that are refused unless their value asks for nothing.
#[derive(Debug, Clone, Copy)]
pub struct Refused {
    /// Names of the fields, with blanks between them.
    names: &'static str,
    /// Values that are taken all the same.
    pub neutral: Neutral,
    /// Advice to the client.
    pub remedy: &'static str,
}

/// Values that ask for nothing.
#[derive(Debug, Clone, Copy)]
pub enum Neutral {
    /// Any value.
    Anything,
    /// `null`.
    Null,
    /// `null` or this number.
    NullOr(f64),
    /// `null` or `false`.
    False,
    /// `null`, `true` or one of these words.
    TrueOr(&'static [&'static str]),
    /// `null`, `false`, blank text, or an empty array or object.
    Empty,
    /// An empty value, or this number.
    Number(f64),
    /// An empty value, or a number up to this one.
    AtMost(f64),
    /// An empty value, or one of these words.
    Word(&'static [&'static str]),
    /// An empty value, one of these words, or an array of such values.
    Format(&'static [&'static str]),
    /// An empty value, or an array of `text`.
    TextOnly,
}

impl Neutral {
    /// True if the value asks for nothing.
    pub fn allows(self, value: &Value) -> bool {
        let one_of = |words: &[&str], value: &Value| {
            let is = |text: &str| words.iter().any(|word| word.eq_ignore_ascii_case(text));
            value.as_str().is_some_and(is)
        };
        match self {
            Self::Anything => true,
            Self::Null => value.is_null(),
            Self::NullOr(number) => value.is_null() || value.as_f64() == Some(number),
            Self::False => value.is_null() || value == false,
            Self::TrueOr(words) => value.is_null() || value == true || one_of(words, value),
            _ if is_empty(value) => true,
            Self::Empty => false,
            Self::Number(number) => value.as_f64() == Some(number),
            Self::AtMost(most) => value.as_f64().is_some_and(|number| number <= most),
            Self::Word(words) => one_of(words, value),
            Self::Format(words) => match value.as_array() {
                Some(list) => list.iter().all(|value| Self::Word(words).allows(value)),
                None => one_of(words, value),
            },
            Self::TextOnly => {
                let is_text = |list: &Vec<Value>| list.iter().all(|value| value == "text");
                value.as_array().is_some_and(is_text)
            }
        }
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

const fn refuse(names: &'static str, remedy: &'static str) -> Refused {
    unless(names, Neutral::Empty, remedy)
}

const fn unless(names: &'static str, neutral: Neutral, remedy: &'static str) -> Refused {
    Refused {
        names,
        neutral,
        remedy,
    }
}

const TEXT_ONLY: &str = "ask for text only";
const LEAVE_OUT: &str = "leave it out";
const OTHER_FORMS: &str = "use response_format, or a grammar as 'grammar'";
const OTHER_SAMPLERS: &str = "leave it out, or use temperature, top_k, top_p and min_p";
const OTHER_PENALTIES: &str =
    "use repetition_penalty, presence_penalty and frequency_penalty, which look at the whole text";
const THINKING: &str = "use chat_template_kwargs, such as {\"enable_thinking\": false}";
const NO_BEAM_SEARCH: &str = "it belongs to beam search, which is not supported";
const NO_TOOLS: &str = "tools are not supported yet; ask for text only";
const OWN_VECTORS: &str = "vectors are as the model's own files say";
const LOSE_END: &str = "texts that are too long lose their end; cut them yourself";
const OWN_TEMPLATE: &str =
    "prompts are written by the model's own template; /v1/completions takes them as they are";

const ZERO: Neutral = Neutral::Number(0.0);
const ONE: Neutral = Neutral::Number(1.0);
const TRUE: Neutral = Neutral::TrueOr(&[]);
const AUTO: Neutral = Neutral::Word(&["none", "auto"]);
const FLOATS: Neutral = Neutral::Format(&["float", "float32"]);

/// Fields that change nothing in an answer: the asker and the reason, hints on speed and caching, and
/// switches of features that do not exist here.
const HARMLESS: &[&str] = &[
    // OpenAI
    "user metadata store service_tier safety_identifier prompt_cache_key \
         prompt_cache_retention prediction parallel_tool_calls",
    // vLLM
    "priority request_id cache_salt kv_transfer_params mm_processor_kwargs \
         guided_decoding_backend guided_whitespace_pattern spaces_between_special_tokens",
    // llama.cpp
    "cache_prompt id_slot slot_id n_keep n_discard n_cache_reuse mirostat_tau \
         mirostat_eta dynatemp_exponent xtc_threshold dry_base dry_allowed_length \
         dry_penalty_last_n dry_sequence_breakers parse_tool_calls preserved_tokens \
         thinking_forced_open backend_sampling",
    // SGLang
    "rid extra_key data_parallel_rank bootstrap_host bootstrap_port bootstrap_room \
         stream_reasoning",
    // Ollama, LM Studio, text-generation-webui, TGI
    "keep_alive ttl draft_model prompt_lookup_num_tokens tool_prompt",
];
const EMBEDDINGS_HARMLESS: &[&str] = &[
    "metadata safety_identifier service_tier store priority request_id cache_salt \
         keep_alive ttl rid",
];

const IMAGES_HARMLESS: &str = "metadata safety_identifier service_tier store priority request_id keep_alive ttl rid moderation \
    disable_safety_checker save_images send_images do_not_save_samples do_not_save_grid revised_prompt";
/// They say how an image that is not there would be used.
const GENERATIONS_HARMLESS: &str = "denoising_strength strength prompt_strength";

/// Fields that both APIs that generate text refuse.
const REFUSED: &[Refused] = &[
    refuse(
        "structural_tag guideline grammar_lazy grammar_triggers format grammar_string",
        OTHER_FORMS,
    ),
    refuse("use_beam_search", "answers are sampled; leave it out"),
    unless("length_penalty", ONE, NO_BEAM_SEARCH),
    refuse("early_stopping", NO_BEAM_SEARCH),
    refuse(
        "include_stop_str_in_output no_stop_trim",
        "the stop text is not part of the answer; add it yourself",
    ),
    refuse("stop_regex", "use 'stop' with texts"),
    unless(
        "skip_special_tokens",
        TRUE,
        "control tokens are never part of the text",
    ),
    refuse(
        "allowed_token_ids bad_words bad_words_ids custom_token_bans",
        "use logit_bias",
    ),
    unless(
        "prompt_logprobs",
        Neutral::False,
        "there are log probabilities of the answer only",
    ),
    refuse("logprob_token_ids", "use logprobs"),
    refuse(
        "logits_processors custom_logit_processor custom_params return_hidden_states \
         vllm_xargs repetition_detection watermark decoder_input_details negative_prompt",
        LEAVE_OUT,
    ),
    unless(
        "truncate_prompt_tokens",
        Neutral::Null,
        "shorten the prompt yourself",
    ),
    refuse(
        "return_token_ids return_tokens_as_token_ids return_tokens",
        "use logprobs, which name each token",
    ),
    refuse("thinking_token_budget thinking_budget", THINKING),
    refuse(
        "lora_path lora adapter_id",
        "name a model that has the adapter built in",
    ),
    refuse("session_params", "send the whole conversation each time"),
    refuse("prompt_embeds", "send text or token ids"),
    refuse(
        "input_ids",
        "send text, or token ids as 'prompt' of /v1/completions",
    ),
    unless("truncation_length", ZERO, "shorten the prompt yourself"),
    unless("n_probs top_n_tokens", ZERO, "use logprobs"),
    unless("min_keep", Neutral::AtMost(1.0), OTHER_SAMPLERS),
    unless(
        "dynatemp_range xtc_probability mirostat top_a epsilon_cutoff eta_cutoff \
         smoothing_factor penalty_alpha",
        ZERO,
        OTHER_SAMPLERS,
    ),
    unless("typical_p typ_p tfs_z tfs", ONE, OTHER_SAMPLERS),
    unless(
        "top_n_sigma adaptive_target",
        Neutral::AtMost(0.0),
        OTHER_SAMPLERS,
    ),
    unless("dry_multiplier no_repeat_ngram_size", ZERO, OTHER_PENALTIES),
    refuse(
        "samplers temperature_last sampler_priority sampler_order",
        "samplers always run in one order; leave it out",
    ),
    refuse("penalize_nl", OTHER_PENALTIES),
    unless("n_indent", ZERO, LEAVE_OUT),
    unless(
        "t_max_predict_ms t_max_prompt_ms",
        Neutral::AtMost(0.0),
        "close the connection when it takes too long",
    ),
    refuse(
        "post_sampling_probs",
        "log probabilities are the model's own",
    ),
    refuse("return_progress", "a stream shows what there is"),
    refuse("timings_per_token", "the last chunk has the timings"),
    refuse("response_fields", "all fields are sent"),
    refuse(
        "image_data multimodal_data images search_parameters data_sources plugins",
        TEXT_ONLY,
    ),
    refuse(
        "options",
        "put the parameters beside 'model', under OpenAI's names",
    ),
    refuse("template", OWN_TEMPLATE),
    refuse("num_predict max_new_tokens max_length", "use max_tokens"),
    refuse("num_ctx", "set 'context' at the worker"),
    refuse("system safe_prompt", "send a message of the role system"),
    refuse("raw", "/v1/completions takes prompts as they are"),
    refuse("min_length min_new_tokens", "use min_tokens"),
    refuse("stop_sequences", "use stop"),
    unless("do_sample", TRUE, "use temperature 0"),
    unless("encoder_repetition_penalty", ONE, OTHER_PENALTIES),
    unless("guidance_scale", ONE, LEAVE_OUT),
    refuse("ban_eos_token", "use ignore_eos or min_tokens"),
    refuse("dynamic_temperature", OTHER_SAMPLERS),
];

const CHAT_REFUSED: &[Refused] = &[
    refuse("tools functions", NO_TOOLS),
    unless("tool_choice function_call", AUTO, NO_TOOLS),
    unless(
        "best_of",
        ONE,
        "leave it out, or set it to the value of 'n'",
    ),
    refuse("audio web_search_options", LEAVE_OUT),
    unless("modalities", Neutral::TextOnly, "only text is generated"),
    unless(
        "verbosity",
        Neutral::Word(&["medium"]),
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
    refuse("chat_template", OWN_TEMPLATE),
    unless(
        "reasoning_format",
        AUTO,
        "what the model thinks stays in the answer",
    ),
    unless("separate_reasoning", Neutral::Anything, ""),
    unless("include_reasoning", TRUE, THINKING),
    refuse("reasoning", "use reasoning_effort or chat_template_kwargs"),
    refuse("thinking think prompt_mode", THINKING),
    refuse("suffix", "only /v1/completions could take it"),
    refuse("prompt", "send 'messages', or POST /v1/completions"),
];

const COMPLETIONS_REFUSED: &[Refused] = &[
    refuse(
        "suffix input_prefix input_suffix",
        "put all text before the answer into 'prompt', with the model's own tokens for filling in the middle",
    ),
    refuse(
        "input_extra",
        "put all text before the answer into 'prompt'",
    ),
    unless(
        "add_special_tokens add_bos_token",
        TRUE,
        "send token ids as 'prompt'",
    ),
    refuse("messages", "POST /v1/chat/completions takes messages"),
    refuse("tools", NO_TOOLS),
    refuse(
        "chat_template_kwargs",
        "only /v1/chat/completions uses a template",
    ),
];

const EMBEDDINGS_REFUSED: &[Refused] = &[
    unless("truncate", Neutral::TrueOr(&["end", "right"]), LOSE_END),
    unless("truncation_direction", Neutral::Word(&["right"]), LOSE_END),
    unless("truncate_prompt_tokens", Neutral::NullOr(-1.0), LOSE_END),
    unless("normalize normalized", TRUE, OWN_VECTORS),
    unless("embd_normalize", Neutral::NullOr(2.0), OWN_VECTORS),
    unless(
        "add_special_tokens",
        TRUE,
        "the model's control tokens are added",
    ),
    unless(
        "embedding_types embedding_type",
        FLOATS,
        "use encoding_format",
    ),
    unless(
        "output_dtype embed_dtype",
        FLOATS,
        "vectors are 32-bit floats",
    ),
    unless(
        "endianness",
        Neutral::Word(&["native", "little"]),
        "base64 is little-endian",
    ),
    refuse("output_dimension", "use dimensions"),
    refuse("late_chunking options additional_data", LEAVE_OUT),
    refuse("task", "use input_type"),
    refuse("prompt", "use input_type, or put it before each text"),
    refuse("instruction", "put it before each text"),
    refuse(
        "messages content texts images inputs",
        "send texts as 'input'",
    ),
    refuse("pooling", OWN_VECTORS),
];

const FROM_TEXT: &str = "images are made of a text, and at /v1/images/edits of an image";
const TO_EDITS: &str = "POST /v1/images/edits takes images";
const AS_IMAGE: &str = "send one image as 'image', and its mask as 'mask'";
const PNG_ONLY: &str = "images are PNG files; leave it out";
const USE_N: &str = "use n";
const ONE_PASS: &str = "images are made in one pass; ask for the size that you want";

const GENERATIONS_REFUSED: &[Refused] = &[
    refuse("image mask", TO_EDITS),
    refuse(
        "images image_url image_urls init_image init_images input_image input_images reference_images mask_image mask_url \
         extra_images input_fidelity",
        TO_EDITS,
    ),
];
const EDITS_REFUSED: &[Refused] = &[
    refuse(
        "images image_url image_urls init_image init_images input_image input_images reference_images mask_image mask_url \
         extra_images",
        AS_IMAGE,
    ),
    refuse(
        "input_fidelity",
        "use strength: less of it keeps more of the image",
    ),
    refuse(
        "mask_blur inpainting_fill inpaint_full_res inpaint_full_res_padding inpainting_mask_invert resize_mode",
        "the mask counts as it is, and the image is scaled to fill 'size'",
    ),
];
const IMAGES_REFUSED: &[Refused] = &[
    refuse(
        "controlnet control_image controlnets ip_adapter alwayson_scripts script_name script_args",
        FROM_TEXT,
    ),
    refuse("input messages", "send the description as 'prompt'"),
    unless(
        "quality",
        Neutral::Word(&["auto", "standard", "medium"]),
        "use steps: more of them take longer and show more detail",
    ),
    unless(
        "style",
        Neutral::Word(&["vivid", "natural"]),
        "describe the style in the prompt",
    ),
    refuse("styles style_preset", "describe the style in the prompt"),
    unless(
        "background",
        Neutral::Word(&["auto", "opaque"]),
        "images have no transparent parts",
    ),
    unless("output_format", Neutral::Word(&["png"]), PNG_ONLY),
    unless(
        "output_compression output_quality",
        Neutral::Number(100.0),
        PNG_ONLY,
    ),
    unless(
        "num_images num_outputs num_images_per_prompt batch_size n_iter batch_count",
        ONE,
        USE_N,
    ),
    refuse(
        "aspect_ratio resolution image_size",
        "use size, such as \"512x768\"",
    ),
    refuse(
        "lora loras lora_weights textual_inversions embeddings hypernetwork",
        "name a model that has it built in",
    ),
    refuse(
        "vae override_settings refiner_checkpoint refiner_model refiner_switch_at",
        "name another model",
    ),
    refuse(
        "enable_hr hires_fix hr_scale hr_upscaler upscale upscaler",
        ONE_PASS,
    ),
    refuse(
        "restore_faces tiling seamless firstphase_width firstphase_height",
        LEAVE_OUT,
    ),
    unless("subseed", Neutral::AtMost(-1.0), "use seed"),
    unless(
        "subseed_strength seed_resize_from_h seed_resize_from_w",
        Neutral::AtMost(0.0),
        "use seed",
    ),
    unless(
        "clip_skip",
        Neutral::AtMost(1.0),
        "the last layer of the text encoder counts that the model was made for",
    ),
    unless(
        "eta s_churn s_tmin s_noise s_min_uncond ddim_discretize",
        ZERO,
        "use sampler \"euler_a\" for noise after each step",
    ),
    unless(
        "guidance_rescale true_cfg_scale skip_guidance slg_scale img_cfg_scale distilled_guidance",
        ZERO,
        "use guidance_scale",
    ),
    refuse(
        "timesteps sigmas custom_sigmas flow_shift",
        "use steps and scheduler",
    ),
    refuse(
        "latents prompt_embeds negative_prompt_embeds prompt_2 negative_prompt_2",
        "send texts",
    ),
    refuse(
        "enable_safety_checker safety_checker safety_tolerance",
        "images are not looked at",
    ),
    refuse(
        "webhook webhook_url sync_mode",
        "the answer comes on this connection; 'stream' shows how far it is",
    ),
];
