//! The handling of every field that a well-known server has.
//!
//! The fields that are read are listed here. [`mesh_api::fields`] has those that change nothing, and those
//! that are refused unless their value asks for nothing. A field that stands in no table is ignored, and named
//! in the answer's headers.

use std::collections::{HashMap, HashSet};

use mesh_api::fields::{CHAT, COMPLETIONS, EMBEDDINGS, IMAGE_EDITS, IMAGES, Table};

use super::reader::Fields;
use crate::api::invalid::Invalid;

/// The API that a request came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Api {
    Chat,
    Completions,
    Embeddings,
    Images,
    ImageEdits,
}

impl Api {
    /// Names of the fields that are read, with blanks between them, and the table of the others.
    fn fields(self) -> ([&'static str; 3], Table) {
        match self {
            Self::Chat => ([GENERATION_READ, CHAT_READ, ""], CHAT),
            Self::Completions => ([GENERATION_READ, COMPLETIONS_READ, ""], COMPLETIONS),
            Self::Embeddings => ([EMBEDDINGS_READ, "", ""], EMBEDDINGS),
            Self::Images => ([IMAGES_READ, IMAGES_ALSO_READ, ""], IMAGES),
            Self::ImageEdits => ([IMAGES_READ, IMAGES_ALSO_READ, EDITS_READ], IMAGE_EDITS),
        }
    }
}

/// Refuses fields that change the meaning of the answer and are not supported; to ignore them would give a
/// wrong answer. Returns the names of unknown fields.
///
/// # Errors
/// [`Invalid`] names the first field of them and what to do instead.
pub(crate) fn check<'a>(api: Api, fields: Fields<'a>) -> Result<Vec<&'a str>, Invalid> {
    let (read, table) = api.fields();
    // Split once: a body may have very many fields.
    let taken: HashSet<&str> = names(read).chain(table.harmless()).collect();
    let refused: HashMap<&str, _> = table.refused().collect();
    let mut unknown = Vec::new();
    for name in fields.names() {
        if taken.contains(name) {
            continue;
        }
        let Some(rule) = refused.get(name) else {
            // Speculative decoding, by whatever means, changes the speed alone.
            if !name.starts_with("speculative") {
                unknown.push(name);
            }
            continue;
        };
        if let Some(value) = fields.get(name)
            && !rule.neutral.allows(value)
        {
            return Err(Invalid::unsupported(name, rule.remedy));
        }
    }
    Ok(unknown)
}

fn names(lists: [&'static str; 3]) -> impl Iterator<Item = &'static str> {
    lists.into_iter().flat_map(str::split_ascii_whitespace)
}

/// Fields that both APIs that generate text act upon.
const GENERATION_READ: &str = "model temperature top_p top_k min_p repetition_penalty repeat_penalty presence_penalty \
    frequency_penalty seed random_seed sampling_seed stop logit_bias ignore_eos stop_token_ids \
    min_tokens max_tokens n_predict n stream stream_options logprobs repeat_last_n response_format structured_outputs \
    guided_json guided_json_object guided_regex guided_choice guided_grammar grammar json_schema regex ebnf";
const CHAT_READ: &str = "messages max_completion_tokens top_logprobs continue_final_message add_generation_prompt \
    chat_template_kwargs enable_thinking reasoning_effort";
const COMPLETIONS_READ: &str = "prompt echo best_of";
const EMBEDDINGS_READ: &str = "model input encoding_format dimensions user input_type prompt_name";
const IMAGES_READ: &str = "model prompt negative_prompt n size width height steps guidance_scale seed sampler scheduler \
    response_format stream progress partial_images user";
/// The names that other servers give to those.
const IMAGES_ALSO_READ: &str = "num_inference_steps inference_steps sample_steps guidance cfg_scale random_seed sampling_seed \
    sampler_name sample_method sampling_method schedule";
const EDITS_READ: &str = "image mask strength denoising_strength prompt_strength";

#[cfg(test)]
mod tests;
