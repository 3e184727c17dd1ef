//! Families of networks.

/// A family of networks that the engines can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM2, TinyLlama, Mistral; and Mixtral, which is a llama with experts.
    Llama,
    /// Qwen2 and Qwen2.5: biases on query, key and value.
    Qwen2,
    /// Qwen3: norms on query and key.
    Qwen3,
    /// Gemma 3, text only: most layers see a window only, norms before and after each half layer.
    Gemma3,
    /// Qwen3 with a mixture of experts.
    Qwen3Moe,
    /// OLMoE: a mixture of experts, and norms over all heads of query and key at once.
    Olmoe,
    /// Granite 3 with a mixture of experts: factors on embedding, residual stream, scores and logits.
    GraniteMoe,
    /// Qwen1.5 and Qwen2 with a mixture of experts, and a shared expert behind a gate.
    Qwen2Moe,
    /// DeepSeek-V2-Lite: multi-head latent attention, shared experts.
    Deepseek2,
    /// gpt-oss: a mixture of experts with biases, attention sinks, and a window in every second layer.
    GptOss,
}

impl Architecture {
    /// The name in `general.architecture` and before the architecture's own keys.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Gemma3 => "gemma3",
            Architecture::Qwen3Moe => "qwen3moe",
            Architecture::Olmoe => "olmoe",
            Architecture::GraniteMoe => "granitemoe",
            Architecture::Qwen2Moe => "qwen2moe",
            Architecture::Deepseek2 => "deepseek2",
            Architecture::GptOss => "gpt-oss",
        }
    }

    /// All families that the engines can run.
    pub const ALL: [Architecture; 10] = [
        Architecture::Llama,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Gemma3,
        Architecture::Qwen3Moe,
        Architecture::Olmoe,
        Architecture::GraniteMoe,
        Architecture::Qwen2Moe,
        Architecture::Deepseek2,
        Architecture::GptOss,
    ];

    /// True if every network of the family is a mixture of experts.
    pub fn is_mixture(self) -> bool {
        matches!(
            self,
            Architecture::Qwen3Moe
                | Architecture::Olmoe
                | Architecture::GraniteMoe
                | Architecture::Qwen2Moe
                | Architecture::Deepseek2
                | Architecture::GptOss
        )
    }

    /// True if a network of the family can be a mixture of experts.
    pub(super) fn may_be_mixture(self) -> bool {
        self == Architecture::Llama || self.is_mixture()
    }

    /// True if the first layers of a mixture can be dense.
    pub(super) fn may_lead_dense(self) -> bool {
        matches!(
            self,
            Architecture::Qwen3Moe | Architecture::Qwen2Moe | Architecture::Deepseek2
        )
    }

    /// True if queries, keys and values have biases in every network of the family.
    pub(super) fn has_qkv_bias(self) -> bool {
        matches!(
            self,
            Architecture::Qwen2 | Architecture::Qwen2Moe | Architecture::GptOss
        )
    }

    /// True if query and key heads are normed.
    pub(super) fn has_qk_norm(self) -> bool {
        matches!(
            self,
            Architecture::Qwen3
                | Architecture::Gemma3
                | Architecture::Qwen3Moe
                | Architecture::Olmoe
        )
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Architecture::ALL
            .into_iter()
            .find(|architecture| architecture.name() == name)
    }
}
