//! Classes of `transformers` whose weights the engines can run.

use serde_json::Value;

use super::object::Object;
use crate::hf::HfError;
use crate::hf::naming::ExpertNaming;

/// A class of networks, text part only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma3,
    Mixtral,
    Qwen3Moe,
    Olmoe,
    GraniteMoe,
    Qwen2Moe,
    DeepseekV2,
    GptOss,
}

impl Class {
    /// The class that `architectures`, or else `model_type`, names; true if it also takes images.
    pub(super) fn of(root: &Object<'_>) -> Result<(Self, bool), HfError> {
        let class = match root.map.get("architectures") {
            Some(Value::Array(classes)) => classes.first().and_then(Value::as_str),
            _ => None,
        };
        let found = match class {
            Some(class) => class,
            None => root.string("model_type")?.unwrap_or("none"),
        };
        Ok(match found {
            "LlamaForCausalLM" | "llama" => (Class::Llama, false),
            "MistralForCausalLM" | "mistral" => (Class::Mistral, false),
            "Qwen2ForCausalLM" | "qwen2" => (Class::Qwen2, false),
            "Qwen3ForCausalLM" | "qwen3" => (Class::Qwen3, false),
            "MixtralForCausalLM" | "mixtral" => (Class::Mixtral, false),
            "Qwen3MoeForCausalLM" | "qwen3_moe" => (Class::Qwen3Moe, false),
            "OlmoeForCausalLM" | "olmoe" => (Class::Olmoe, false),
            "GraniteMoeForCausalLM" | "granitemoe" => (Class::GraniteMoe, false),
            // The same with a shared expert, whose width is a key more.
            "GraniteMoeSharedForCausalLM" | "granitemoeshared" => (Class::GraniteMoe, false),
            "Qwen2MoeForCausalLM" | "qwen2_moe" => (Class::Qwen2Moe, false),
            "DeepseekV2ForCausalLM" | "deepseek_v2" => (Class::DeepseekV2, false),
            "GptOssForCausalLM" | "gpt_oss" => (Class::GptOss, false),
            "Gemma3ForCausalLM" | "gemma3_text" => (Class::Gemma3, false),
            "Gemma3ForConditionalGeneration" | "gemma3" => (Class::Gemma3, true),
            other => {
                return Err(HfError::Architecture {
                    found: other.into(),
                });
            }
        })
    }

    /// GGUF's name. Mistral and Mixtral are llamas there.
    pub(super) fn name(self) -> &'static str {
        match self {
            Class::Llama | Class::Mistral | Class::Mixtral => "llama",
            Class::Qwen2 => "qwen2",
            Class::Qwen3 => "qwen3",
            Class::Gemma3 => "gemma3",
            Class::Qwen3Moe => "qwen3moe",
            Class::Olmoe => "olmoe",
            Class::GraniteMoe => "granitemoe",
            Class::Qwen2Moe => "qwen2moe",
            Class::DeepseekV2 => "deepseek2",
            Class::GptOss => "gpt-oss",
        }
    }

    /// The names that the class has for the tensors of its mixture of experts.
    pub(super) fn expert_naming(self) -> ExpertNaming {
        match self {
            Class::Mixtral => ExpertNaming::Mixtral,
            Class::GraniteMoe => ExpertNaming::Granite,
            Class::DeepseekV2 => ExpertNaming::Deepseek,
            Class::GptOss => ExpertNaming::GptOss,
            _ => ExpertNaming::Qwen,
        }
    }
}
