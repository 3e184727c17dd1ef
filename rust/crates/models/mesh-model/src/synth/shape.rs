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
    /// Width of one head; with latent attention that of its key.
    pub head_dim: u32,
    /// Latent attention, in the families that have it.
    pub latent: Option<Latent>,
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
    /// Width of the shared expert; 0 means that there is none. DeepSeek's is a multiple of `ffn`.
    pub shared: u32,
}

/// Latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latent {
    /// Width of the row that keys and values are made of.
    pub rank: u32,
    /// Width of the row that queries are made of, if it is not the input itself.
    pub query_rank: Option<u32>,
    /// Width of the rotated part of a head.
    pub rotated: u32,
    /// Width of a head's value.
    pub value: u32,
    /// The matrix behind the latent row is in two stacks, as newer files have it.
    pub split: bool,
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
            latent: None,
            ffn: 8960,
            vocab: 151_936,
            context: 32_768,
            rope_base: 1_000_000.0,
            tied_embeddings: true,
            window: None,
            mixture: None,
        }
    }

    /// Qwen2 and Qwen2.5 7B.
    pub fn qwen2_7b() -> Self {
        Shape {
            hidden: 3584,
            heads: 28,
            kv_heads: 4,
            ffn: 18_944,
            vocab: 152_064,
            tied_embeddings: false,
            ..Shape::qwen2_1_5b()
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
            latent: None,
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
            latent: None,
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
                shared: 0,
            }),
        }
    }

    /// DeepSeek-V2-Lite with `layers` of its 27 layers, without YaRN.
    pub fn deepseek_v2_lite(layers: u32) -> Self {
        Shape {
            architecture: Architecture::Deepseek2,
            layers,
            hidden: 2048,
            heads: 16,
            kv_heads: 16,
            head_dim: 192,
            latent: Some(Latent {
                rank: 512,
                query_rank: None,
                rotated: 64,
                value: 128,
                split: false,
            }),
            ffn: 10_944,
            vocab: 102_400,
            context: 4096,
            rope_base: 10_000.0,
            tied_embeddings: false,
            window: None,
            mixture: Some(Experts {
                count: 64,
                used: 6,
                ffn: 1408,
                leading_dense: 1,
                shared: 2816,
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
            latent: None,
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
                shared: 0,
            }),
        }
    }

    /// A network of `architecture` of a few hundred thousand weights, for tests. All widths are multiples of
    /// 256, so that every type fits. The first layer of Gemma and gpt-oss sees 12 positions, the second all. A
    /// mixture chooses 3 of 8 experts; the first layer of DeepSeek's is dense.
    pub fn tiny(architecture: Architecture) -> Self {
        let deepseek = architecture == Architecture::Deepseek2;
        Shape {
            architecture,
            layers: 2,
            hidden: 256,
            heads: 4,
            kv_heads: if deepseek { 4 } else { 2 },
            head_dim: if deepseek { 96 } else { 64 },
            latent: deepseek.then_some(TINY_LATENT),
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
            tied_embeddings: !matches!(
                architecture,
                Architecture::Llama | Architecture::Qwen2Moe | Architecture::GptOss
            ),
            window: matches!(architecture, Architecture::Gemma3 | Architecture::GptOss).then_some(
                Window {
                    size: 12,
                    period: 2,
                },
            ),
            mixture: architecture.is_mixture().then_some(Experts {
                leading_dense: u32::from(deepseek),
                shared: match architecture {
                    Architecture::Qwen2Moe | Architecture::Deepseek2 => 512,
                    _ => 0,
                },
                ..TINY_EXPERTS
            }),
        }
    }

    /// As [`Shape::tiny`], a Granite with a shared expert.
    pub fn tiny_granite_shared() -> Self {
        Shape {
            mixture: Some(Experts {
                shared: 512,
                ..TINY_EXPERTS
            }),
            ..Shape::tiny(Architecture::GraniteMoe)
        }
    }

    /// As [`Shape::tiny`], a DeepSeek with these fields of [`Latent`].
    pub fn tiny_deepseek(query_rank: Option<u32>, split: bool) -> Self {
        Shape {
            latent: Some(Latent {
                query_rank,
                split,
                ..TINY_LATENT
            }),
            ..Shape::tiny(Architecture::Deepseek2)
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
        let [hidden, ffn, vocab] = [self.hidden, self.ffn, self.vocab].map(u64::from);
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
            match self.latent {
                None => self.add_attention(&mut add),
                Some(latent) => self.add_latent_attention(latent, &mut add),
            }
            add(
                match self.architecture {
                    Architecture::GptOss => "post_attention_norm.weight",
                    _ => "ffn_norm.weight",
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
                    if self.architecture == Architecture::GptOss {
                        add("ffn_gate_inp.bias", &[count]);
                        add("ffn_gate_exps.bias", &[ffn, count]);
                        add("ffn_up_exps.bias", &[ffn, count]);
                        add("ffn_down_exps.bias", &[hidden, count]);
                    }
                    if mixture.shared > 0 {
                        self.add_shared(mixture.shared.into(), &mut add);
                    }
                }
            }
            self.add_attention_vectors(&mut add);
            if self.architecture == Architecture::Gemma3 {
                add("post_attention_norm.weight", &[hidden]);
                add("post_ffw_norm.weight", &[hidden]);
            }
        }
        tensors
    }

    fn add_attention(&self, add: &mut impl FnMut(&str, &[u64])) {
        let [hidden, heads, kv_heads, head_dim] =
            [self.hidden, self.heads, self.kv_heads, self.head_dim].map(u64::from);
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        add("attn_q.weight", &[hidden, q]);
        add("attn_k.weight", &[hidden, kv]);
        add("attn_v.weight", &[hidden, kv]);
        add("attn_output.weight", &[q, hidden]);
    }

    /// Biases, sinks, and norms of queries and keys.
    fn add_attention_vectors(&self, add: &mut impl FnMut(&str, &[u64])) {
        let [heads, kv_heads, head_dim] = [self.heads, self.kv_heads, self.head_dim].map(u64::from);
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        if self.architecture == Architecture::GptOss {
            add("attn_output.bias", &[self.hidden.into()]);
            add("attn_sinks.weight", &[heads]);
        }
        match self.architecture {
            Architecture::Qwen2 | Architecture::Qwen2Moe | Architecture::GptOss => {
                add("attn_q.bias", &[q]);
                add("attn_k.bias", &[kv]);
                add("attn_v.bias", &[kv]);
            }
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
    }

    fn add_latent_attention(&self, latent: Latent, add: &mut impl FnMut(&str, &[u64])) {
        let [hidden, heads, key] = [self.hidden, self.heads, self.head_dim].map(u64::from);
        let [rank, rotated, value] = [latent.rank, latent.rotated, latent.value].map(u64::from);
        match latent.query_rank.map(u64::from) {
            None => add("attn_q.weight", &[hidden, heads * key]),
            Some(rank) => {
                add("attn_q_a.weight", &[hidden, rank]);
                add("attn_q_a_norm.weight", &[rank]);
                add("attn_q_b.weight", &[rank, heads * key]);
            }
        }
        add("attn_kv_a_mqa.weight", &[hidden, rank + rotated]);
        add("attn_kv_a_norm.weight", &[rank]);
        let plain = key - rotated;
        match latent.split {
            false => add("attn_kv_b.weight", &[rank, heads * (plain + value)]),
            true => {
                add("attn_k_b.weight", &[plain, rank, heads]);
                add("attn_v_b.weight", &[rank, value, heads]);
            }
        }
        add("attn_output.weight", &[heads * value, hidden]);
    }

    fn add_shared(&self, ffn: u64, add: &mut impl FnMut(&str, &[u64])) {
        let hidden = u64::from(self.hidden);
        add("ffn_gate_shexp.weight", &[hidden, ffn]);
        add("ffn_up_shexp.weight", &[hidden, ffn]);
        add("ffn_down_shexp.weight", &[ffn, hidden]);
        if self.architecture == Architecture::Qwen2Moe {
            add("ffn_gate_inp_shexp.weight", &[hidden]);
        }
    }
}

/// The router's tensor, after `blk.N.`. It is F32 in all files.
pub(super) const ROUTER: &str = "ffn_gate_inp.weight";

const TINY_EXPERTS: Experts = Experts {
    count: 8,
    used: 3,
    ffn: 256,
    leading_dense: 0,
    shared: 0,
};

const TINY_LATENT: Latent = Latent {
    rank: 256,
    query_rank: None,
    rotated: 32,
    value: 64,
    split: false,
};
