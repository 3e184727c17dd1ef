//! Families of networks.

/// A family of networks that the engines can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM2, TinyLlama, Mistral.
    Llama,
    /// Qwen2 and Qwen2.5: biases on query, key and value.
    Qwen2,
    /// Qwen3: norms on query and key.
    Qwen3,
    /// Gemma 3, text only: most layers see a window only, norms before and after each half layer.
    Gemma3,
}

impl Architecture {
    /// The name in `general.architecture` and before the architecture's own keys.
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Gemma3 => "gemma3",
        }
    }

    /// All families that the engines can run.
    pub const ALL: [Architecture; 4] = [
        Architecture::Llama,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Gemma3,
    ];

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Architecture::ALL
            .into_iter()
            .find(|architecture| architecture.name() == name)
    }
}
