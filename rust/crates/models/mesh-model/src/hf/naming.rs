//! What determines the names of a folder's tensors.

/// Properties of the network that determine the names of its tensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorNaming {
    /// The embedding is also the output matrix, even if the files hold another.
    pub(super) tied: bool,
    /// GGUF's name of `post_attention_layernorm` is its own, too: it is a norm behind attention (Gemma), or
    /// GGUF has its name all the same (gpt-oss). For other networks it is that of the norm before feed-forward.
    pub(super) post_attention_norms: bool,
    /// The model has a vision part, which is left out.
    pub(super) sees: bool,
    /// Names of the tensors of a mixture of experts.
    pub(super) experts: ExpertNaming,
}

/// The names that a class of `transformers` has for the tensors of a mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExpertNaming {
    /// Qwen and OLMoE: `mlp.experts.0.gate_proj`, and `mlp.shared_expert.gate_proj`.
    Qwen,
    /// Mixtral: `block_sparse_moe.experts.0.w1`.
    Mixtral,
    /// DeepSeek-V2: as Qwen, but for the shared experts: `mlp.shared_experts.gate_proj`.
    Deepseek,
    /// Granite: all experts in one tensor, gate and up in another (see experts.rs).
    Granite,
    /// gpt-oss: all experts in one tensor, gate and up in turns in another, with biases.
    GptOss,
}
