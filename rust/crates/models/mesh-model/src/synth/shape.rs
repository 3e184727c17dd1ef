//! Shapes of networks to make.

use crate::config::Architecture;

/// The shape of a network to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Family of the network.
    pub architecture: Architecture,
    /// Number of transformer layers.
    pub layers: u32,
    /// Width of a hidden row.
    pub hidden: u32,
    /// Query heads per layer.
    pub heads: u32,
    /// Key/value heads per layer.
    pub kv_heads: u32,
    /// Width of one head.
    pub head_dim: u32,
    /// Width of the feed-forward layer.
    pub ffn: u32,
    /// Rows of the embedding, and tokens in the list.
    pub vocab: u32,
    /// Maximum context in tokens.
    pub context: u32,
    /// Base of the rotary embedding.
    pub rope_base: f32,
    /// True if the embedding is also the output matrix.
    pub tied_embeddings: bool,
    /// Layers that see only a window, if there are any.
    pub window: Option<Window>,
    /// The mixture of experts in place of dense feed-forward layers, if there is one.
    pub mixture: Option<Experts>,
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// Experts of a layer.
    pub count: u32,
    /// Experts that compute a row.
    pub used: u32,
    /// Width of one expert.
    pub ffn: u32,
    /// So many layers at the beginning are dense.
    pub leading_dense: u32,
}

/// The sliding window of some layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Positions that a row sees, its own among them.
    pub size: u32,
    /// All layers have the window except every `period`th; 0 means all.
    pub period: u32,
}

impl Shape {
    /// Qwen2 and Qwen2.5 1.5B.
    pub fn qwen2_1_5b() -> Self {
        Shape {
            architecture: Architecture::Qwen2,
            layers: 28,
            hidden: 1536,
            heads: 12,
            kv_heads: 2,
            head_dim: 128,
            ffn: 8960,
            vocab: 151_936,
            context: 32_768,
            rope_base: 1_000_000.0,
            tied_embeddings: true,
            window: None,
            mixture: None,
        }
    }

    /// SmolLM2-135M.
    pub fn smollm2_135m() -> Self {
        Shape {
            architecture: Architecture::Llama,
            layers: 30,
            hidden: 576,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ffn: 1536,
            vocab: 49_152,
            context: 8192,
            rope_base: 100_000.0,
            tied_embeddings: true,
            window: None,
            mixture: None,
        }
    }

    /// Qwen3-30B-A3B with `layers` of its 48 layers.
    pub fn qwen3_30b_a3b(layers: u32) -> Self {
        Shape {
            architecture: Architecture::Qwen3Moe,
            layers,
            hidden: 2048,
            heads: 32,
            kv_heads: 4,
            head_dim: 128,
            ffn: 6144,
            vocab: 151_936,
            context: 40_960,
            rope_base: 1_000_000.0,
            tied_embeddings: false,
            window: None,
            mixture: Some(Experts {
                count: 128,
                used: 8,
                ffn: 768,
                leading_dense: 0,
            }),
        }
    }

    /// gpt-oss-20b with `layers` of its 24 layers.
    pub fn gpt_oss_20b(layers: u32) -> Self {
        Shape {
            architecture: Architecture::GptOss,
            layers,
            hidden: 2880,
            heads: 64,
            kv_heads: 8,
            head_dim: 64,
            ffn: 2880,
            vocab: 201_088,
            context: 131_072,
            rope_base: 150_000.0,
            tied_embeddings: false,
            window: Some(Window {
                size: 128,
                period: 2,
            }),
            mixture: Some(Experts {
                count: 32,
                used: 4,
                ffn: 2880,
                leading_dense: 0,
            }),
        }
    }

    /// A network of `architecture` of a few hundred thousand weights, for tests. All widths are multiples of
    /// 256, so that every type fits. The first layer of Gemma and gpt-oss sees 12 positions, the second all. A
    /// mixture chooses 3 of 8 experts.
    pub fn tiny(architecture: Architecture) -> Self {
        Shape {
            architecture,
            layers: 2,
            hidden: 256,
            heads: 4,
            kv_heads: 2,
            head_dim: 64,
            ffn: match architecture {
                // All their layers have experts, of which this is the width.
                Architecture::Olmoe | Architecture::GraniteMoe | Architecture::GptOss => {
                    TINY_EXPERTS.ffn
                }
                _ => 512,
            },
            vocab: 300,
            context: 512,
            rope_base: 10_000.0,
            tied_embeddings: ![Architecture::Llama, Architecture::GptOss].contains(&architecture),
            window: [Architecture::Gemma3, Architecture::GptOss]
                .contains(&architecture)
                .then_some(Window {
                    size: 12,
                    period: 2,
                }),
            mixture: architecture.is_mixture().then_some(TINY_EXPERTS),
        }
    }

    /// As [`Shape::tiny`], a Mixtral: a llama with experts.
    pub fn tiny_mixtral() -> Self {
        Shape {
            ffn: TINY_EXPERTS.ffn,
            mixture: Some(TINY_EXPERTS),
            ..Shape::tiny(Architecture::Llama)
        }
    }

    /// Names and dimensions of all tensors, inputs first.
    pub fn tensors(&self) -> Vec<(String, Vec<u64>)> {
        let [hidden, ffn, vocab, head_dim] =
            [self.hidden, self.ffn, self.vocab, self.head_dim].map(u64::from);
        let (q, kv) = (
            u64::from(self.heads) * head_dim,
            u64::from(self.kv_heads) * head_dim,
        );
        let mut tensors = vec![
            ("token_embd.weight".to_owned(), vec![hidden, vocab]),
            ("output_norm.weight".to_owned(), vec![hidden]),
        ];
        if !self.tied_embeddings {
            tensors.push(("output.weight".to_owned(), vec![hidden, vocab]));
        }
        for layer in 0..self.layers {
            let mut add = |name: &str, dims: &[u64]| {
                tensors.push((format!("blk.{layer}.{name}"), dims.to_vec()))
            };
            add("attn_norm.weight", &[hidden]);
            add("attn_q.weight", &[hidden, q]);
            add("attn_k.weight", &[hidden, kv]);
            add("attn_v.weight", &[hidden, kv]);
            add("attn_output.weight", &[q, hidden]);
            let gpt_oss = self.architecture == Architecture::GptOss;
            add(
                match gpt_oss {
                    true => "post_attention_norm.weight",
                    false => "ffn_norm.weight",
                },
                &[hidden],
            );
            match self
                .mixture
                .filter(|mixture| layer >= mixture.leading_dense)
            {
                None => {
                    add("ffn_gate.weight", &[hidden, ffn]);
                    add("ffn_up.weight", &[hidden, ffn]);
                    add("ffn_down.weight", &[ffn, hidden]);
                }
                Some(mixture) => {
                    let (count, ffn) = (mixture.count.into(), mixture.ffn.into());
                    add(ROUTER, &[hidden, count]);
                    add("ffn_gate_exps.weight", &[hidden, ffn, count]);
                    add("ffn_up_exps.weight", &[hidden, ffn, count]);
                    add("ffn_down_exps.weight", &[ffn, hidden, count]);
                    if gpt_oss {
                        add("ffn_gate_inp.bias", &[count]);
                        add("ffn_gate_exps.bias", &[ffn, count]);
                        add("ffn_up_exps.bias", &[ffn, count]);
                        add("ffn_down_exps.bias", &[hidden, count]);
                    }
                }
            }
            if gpt_oss {
                add("attn_output.bias", &[hidden]);
                add("attn_sinks.weight", &[self.heads.into()]);
            }
            if gpt_oss || self.architecture == Architecture::Qwen2 {
                add("attn_q.bias", &[q]);
                add("attn_k.bias", &[kv]);
                add("attn_v.bias", &[kv]);
            }
            match self.architecture {
                Architecture::Qwen3 | Architecture::Qwen3Moe | Architecture::Gemma3 => {
                    add("attn_q_norm.weight", &[head_dim]);
                    add("attn_k_norm.weight", &[head_dim]);
                }
                Architecture::Olmoe => {
                    add("attn_q_norm.weight", &[q]);
                    add("attn_k_norm.weight", &[kv]);
                }
                _ => {}
            }
            if self.architecture == Architecture::Gemma3 {
                add("post_attention_norm.weight", &[hidden]);
                add("post_ffw_norm.weight", &[hidden]);
            }
        }
        tensors
    }
}

/// The router's tensor, after `blk.N.`. It is F32 in all files.
pub(super) const ROUTER: &str = "ffn_gate_inp.weight";

const TINY_EXPERTS: Experts = Experts {
    count: 8,
    used: 3,
    ffn: 256,
    leading_dense: 0,
};
