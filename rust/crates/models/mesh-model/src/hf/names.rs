//! Hugging Face's names of tensors as GGUF's, and back.

use super::naming::{ExpertNaming, TensorNaming};
use crate::gguf::expert_name;

/// The tensors of a layer: the name after `model.layers.N.`, and the one after `blk.N.`.
const LAYER: [(&str, &str); 24] = [
    ("input_layernorm.weight", "attn_norm.weight"),
    ("self_attn.q_proj.weight", "attn_q.weight"),
    ("self_attn.k_proj.weight", "attn_k.weight"),
    ("self_attn.v_proj.weight", "attn_v.weight"),
    ("self_attn.o_proj.weight", "attn_output.weight"),
    ("self_attn.q_proj.bias", "attn_q.bias"),
    ("self_attn.k_proj.bias", "attn_k.bias"),
    ("self_attn.v_proj.bias", "attn_v.bias"),
    ("self_attn.o_proj.bias", "attn_output.bias"),
    ("self_attn.sinks", "attn_sinks.weight"),
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    ("self_attn.q_a_proj.weight", "attn_q_a.weight"),
    ("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight"),
    ("self_attn.q_b_proj.weight", "attn_q_b.weight"),
    (
        "self_attn.kv_a_proj_with_mqa.weight",
        "attn_kv_a_mqa.weight",
    ),
    ("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight"),
    ("self_attn.kv_b_proj.weight", "attn_kv_b.weight"),
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.up_proj.weight", "ffn_up.weight"),
    ("mlp.down_proj.weight", "ffn_down.weight"),
    ("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
    // What this one is depends on whether a layer has four norms: see `layer`.
    (POST_ATTENTION, "ffn_norm.weight"),
];

const ROUTER: &str = "ffn_gate_inp.weight";

impl ExpertNaming {
    /// Name of the router's tensor, after `model.layers.N.`.
    fn router(self) -> &'static str {
        match self {
            ExpertNaming::Qwen | ExpertNaming::Deepseek => "mlp.gate.weight",
            ExpertNaming::Mixtral => "block_sparse_moe.gate.weight",
            ExpertNaming::Granite => "block_sparse_moe.router.layer.weight",
            ExpertNaming::GptOss => "mlp.router.weight",
        }
    }

    /// What stands before an expert's number.
    fn prefix(self) -> &'static str {
        match self {
            ExpertNaming::Qwen | ExpertNaming::Deepseek | ExpertNaming::GptOss => "mlp.experts.",
            ExpertNaming::Mixtral | ExpertNaming::Granite => "block_sparse_moe.experts.",
        }
    }

    /// The names of an expert's matrices, with GGUF's.
    fn matrices(self) -> [(&'static str, &'static str); 3] {
        let theirs = match self {
            ExpertNaming::Qwen | ExpertNaming::Deepseek | ExpertNaming::GptOss => {
                ["gate_proj", "up_proj", "down_proj"]
            }
            ExpertNaming::Mixtral | ExpertNaming::Granite => ["w1", "w3", "w2"],
        };
        let ours = ["ffn_gate", "ffn_up", "ffn_down"];
        std::array::from_fn(|i| (theirs[i], ours[i]))
    }

    /// The names of the shared expert's tensors and of biases, with GGUF's. Gate and up can be one tensor.
    fn others(self) -> &'static [(&'static str, &'static str)] {
        match self {
            ExpertNaming::Qwen => &[
                (
                    "mlp.shared_expert.gate_proj.weight",
                    "ffn_gate_shexp.weight",
                ),
                ("mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight"),
                (
                    "mlp.shared_expert.down_proj.weight",
                    "ffn_down_shexp.weight",
                ),
                ("mlp.shared_expert_gate.weight", SHARED_GATE),
            ],
            ExpertNaming::Deepseek => &[
                (
                    "mlp.shared_experts.gate_proj.weight",
                    "ffn_gate_shexp.weight",
                ),
                ("mlp.shared_experts.up_proj.weight", "ffn_up_shexp.weight"),
                (
                    "mlp.shared_experts.down_proj.weight",
                    "ffn_down_shexp.weight",
                ),
            ],
            ExpertNaming::Granite => &[
                (GRANITE_SHARED, "ffn_gate_shexp.weight"),
                (GRANITE_SHARED, "ffn_up_shexp.weight"),
                ("shared_mlp.output_linear.weight", "ffn_down_shexp.weight"),
            ],
            ExpertNaming::GptOss => &[
                ("mlp.router.bias", "ffn_gate_inp.bias"),
                (GPT_OSS_GATE_UP_BIAS, "ffn_gate_exps.bias"),
                (GPT_OSS_GATE_UP_BIAS, "ffn_up_exps.bias"),
                ("mlp.experts.down_proj_bias", "ffn_down_exps.bias"),
            ],
            ExpertNaming::Mixtral => &[],
        }
    }

    /// GGUF's name, after `blk.N.`, of the tensor `suffix`.
    fn gguf_name(self, suffix: &str) -> Option<String> {
        if suffix == self.router() {
            return Some(ROUTER.into());
        }
        if let Some((_, ours)) = self.others().iter().find(|(theirs, _)| *theirs == suffix) {
            return Some((*ours).into());
        }
        if self == ExpertNaming::GptOss {
            // It has no tensors of single experts.
            return None;
        }
        let rest = suffix.strip_prefix(self.prefix())?;
        let (expert, matrix) = rest.strip_suffix(".weight")?.split_once('.')?;
        let ours = self
            .matrices()
            .iter()
            .find(|(theirs, _)| *theirs == matrix)?
            .1;
        is_number(expert).then(|| format!("{ours}.{expert}.weight"))
    }

    /// The folder's name of the tensor that GGUF calls `suffix` after `blk.N.`; of a stack its first expert's.
    fn their_name(self, suffix: &str) -> Option<String> {
        if suffix == ROUTER {
            return Some(self.router().into());
        }
        if let Some((theirs, _)) = self.others().iter().find(|(_, ours)| *ours == suffix) {
            return Some((*theirs).into());
        }
        let name = suffix.strip_suffix(".weight")?;
        let (ours, expert) = match name.strip_suffix("_exps") {
            Some(ours) => (ours, "0"),
            None => name.split_once('.')?,
        };
        let theirs = self.matrices().iter().find(|(_, known)| *known == ours)?.0;
        Some(match (self, theirs) {
            (ExpertNaming::Granite, "w2") => GRANITE_DOWN.to_owned(),
            (ExpertNaming::Granite, _) => GRANITE_GATE_UP.to_owned(),
            (ExpertNaming::GptOss, "down_proj") => GPT_OSS_DOWN.to_owned(),
            (ExpertNaming::GptOss, _) => GPT_OSS_GATE_UP.to_owned(),
            _ => format!("{}{expert}.{theirs}.weight", self.prefix()),
        })
    }
}

const GRANITE_GATE_UP: &str = "block_sparse_moe.input_linear.weight";
const GRANITE_DOWN: &str = "block_sparse_moe.output_linear.weight";
const GRANITE_SHARED: &str = "shared_mlp.input_linear.weight";
const GPT_OSS_GATE_UP: &str = "mlp.experts.gate_up_proj";
const GPT_OSS_DOWN: &str = "mlp.experts.down_proj";
const GPT_OSS_GATE_UP_BIAS: &str = "mlp.experts.gate_up_proj_bias";
const SHARED_GATE: &str = "ffn_gate_inp_shexp.weight";

/// The dimensions of the tensor with GGUF's name `name`: the vector of a shared expert's gate is a matrix of
/// one row in a folder.
pub(super) fn dims(name: &str, shape: &[u64]) -> Vec<u64> {
    match shape {
        [1, width] if name.ends_with(SHARED_GATE) => vec![*width],
        _ => shape.iter().rev().copied().collect(),
    }
}

/// A tensor that holds one or several matrices of each expert or of the shared one, or a part of them.
pub(super) struct FusedExperts {
    /// `blk.N`.
    layer: String,
    /// GGUF's names of an expert's matrices, in the order of its rows.
    matrices: &'static [&'static str],
    pub(super) form: FusedForm,
}

/// The order of the elements of fused experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FusedForm {
    /// `[experts, matrices * outputs, inputs]`, matrix by matrix.
    Rows,
    /// `[experts, inputs, outputs * matrices]`: inputs and outputs exchanged, the matrices in turns.
    Columns,
    /// Biases `[experts, outputs * matrices]`, the matrices in turns.
    Biases,
    /// MXFP4 codes `[experts, outputs * matrices, blocks, 16]`, the matrices in turns.
    Codes,
    /// The scales of those codes, `[experts, outputs * matrices, blocks]`.
    Scales,
}

impl FusedExperts {
    /// What the tensor `name` holds; `None` if it is no such tensor.
    pub(super) fn of(name: &str, network: &TensorNaming) -> Option<Self> {
        let rest = PREFIXES
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix)?.strip_prefix("layers."))?;
        let (number, suffix) = rest.split_once('.')?;
        let (matrices, form) = match network.experts {
            ExpertNaming::Granite => match suffix {
                GRANITE_GATE_UP => (GATE_UP, FusedForm::Rows),
                GRANITE_DOWN => (DOWN, FusedForm::Rows),
                GRANITE_SHARED => (SHARED_GATE_UP, FusedForm::Rows),
                _ => return None,
            },
            ExpertNaming::GptOss => match suffix {
                GPT_OSS_GATE_UP_BIAS => (GATE_UP, FusedForm::Biases),
                _ => match suffix.strip_prefix(GPT_OSS_GATE_UP) {
                    Some(rest) => (GATE_UP, FusedForm::of_ending(rest)?),
                    None => (
                        DOWN,
                        FusedForm::of_ending(suffix.strip_prefix(GPT_OSS_DOWN)?)?,
                    ),
                },
            },
            _ => return None,
        };
        let layer = format!("blk.{number}");
        is_number(number).then_some(FusedExperts {
            layer,
            matrices,
            form,
        })
    }

    /// GGUF's name of the stack of biases of a matrix.
    pub(super) fn bias_name(&self, matrix: usize) -> String {
        format!("{}.{}_exps.bias", self.layer, self.matrices[matrix])
    }

    /// True if the tensor has no dimension for experts: there is one.
    pub(super) fn is_shared(&self) -> bool {
        self.matrices[0].ends_with("_shexp")
    }

    /// Matrices of one expert.
    pub(super) fn matrices(&self) -> usize {
        self.matrices.len()
    }

    /// GGUF's name of an expert's matrix.
    pub(super) fn name(&self, expert: usize, matrix: usize) -> String {
        let name = format!("{}.{}", self.layer, self.matrices[matrix]);
        match self.is_shared() {
            true => format!("{name}.weight"),
            false => expert_name(&name, expert),
        }
    }
}

const GATE_UP: &[&str] = &["ffn_gate", "ffn_up"];
const DOWN: &[&str] = &["ffn_down"];
const SHARED_GATE_UP: &[&str] = &["ffn_gate_shexp", "ffn_up_shexp"];

impl FusedForm {
    /// The form of gpt-oss's matrices by the end of the tensor's name.
    fn of_ending(rest: &str) -> Option<Self> {
        match rest {
            "" => Some(FusedForm::Columns),
            "_blocks" => Some(FusedForm::Codes),
            "_scales" => Some(FusedForm::Scales),
            _ => None,
        }
    }
}

/// True for a number without leading zeros: with one way of writing it only, two tensors cannot have one name
/// by it.
fn is_number(text: &str) -> bool {
    let plain = !text.starts_with('0') || text == "0";
    plain && !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

const POST_ATTENTION: &str = "post_attention_layernorm.weight";

const GLOBAL: [(&str, &str); 2] = [
    ("embed_tokens.weight", "token_embd.weight"),
    ("norm.weight", "output_norm.weight"),
];

/// Prefixes of tensor names: of models saved with and without their head, and of the text part of multimodal
/// models.
const PREFIXES: [&str; 4] = [
    "model.language_model.",
    "language_model.model.",
    "model.",
    "",
];

/// Prefixes of tensors outside the text part of multimodal models; these are not used.
const NOT_TEXT: [&str; 4] = [
    "vision_tower.",
    "model.vision_tower.",
    "multi_modal_projector.",
    "model.multi_modal_projector.",
];

/// GGUF's name of a tensor; `None` for one that is not needed. Unknown names stay as they are: the check of
/// shapes then rejects them.
pub(super) fn gguf_name(name: &str, network: &TensorNaming) -> Option<String> {
    if network.sees && NOT_TEXT.iter().any(|prefix| name.starts_with(prefix)) {
        return None;
    }
    // Written out by old converters; it follows from the configuration.
    if name.ends_with(".rotary_emb.inv_freq") {
        return None;
    }
    if matches!(name, "lm_head.weight" | "language_model.lm_head.weight") {
        return (!network.tied).then(|| "output.weight".to_owned());
    }
    let known = PREFIXES.iter().find_map(|prefix| {
        let rest = name.strip_prefix(prefix)?;
        let global = GLOBAL.iter().find(|(known, _)| *known == rest);
        match global {
            Some((_, ours)) => Some((*ours).to_owned()),
            None => layer(rest.strip_prefix("layers.")?, network),
        }
    });
    Some(known.unwrap_or_else(|| name.to_owned()))
}

fn layer(rest: &str, network: &TensorNaming) -> Option<String> {
    let (number, suffix) = rest.split_once('.')?;
    if !is_number(number) {
        return None;
    }
    if let Some(ours) = network.experts.gguf_name(suffix) {
        return Some(format!("blk.{number}.{ours}"));
    }
    let ours = match suffix {
        POST_ATTENTION if network.post_attention_norms => "post_attention_norm.weight",
        _ => LAYER.iter().find(|(known, _)| *known == suffix)?.1,
    };
    Some(format!("blk.{number}.{ours}"))
}

/// The folder's name for a tensor of GGUF's name; `None` if it has no such tensor.
pub(crate) fn their_name(name: &str, experts: ExpertNaming) -> Option<String> {
    if name == "output.weight" {
        return Some("lm_head.weight".into());
    }
    if let Some((theirs, _)) = GLOBAL.iter().find(|(_, ours)| *ours == name) {
        return Some(format!("model.{theirs}"));
    }
    let (layer, suffix) = name.strip_prefix("blk.")?.split_once('.')?;
    if let Some(theirs) = experts.their_name(suffix) {
        return Some(format!("model.layers.{layer}.{theirs}"));
    }
    let theirs = match suffix {
        "post_attention_norm.weight" => POST_ATTENTION,
        // Of llama's two names the last, which all families except Gemma use.
        _ => LAYER.iter().rev().find(|(_, ours)| *ours == suffix)?.0,
    };
    Some(format!("model.layers.{layer}.{theirs}"))
}
