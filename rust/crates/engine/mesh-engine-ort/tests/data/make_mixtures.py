"""Writes mixtures.json, shared_experts.json and gpt_oss.json: tiny mixtures of experts of every family, and the logits
that `transformers` gives for them.

Run with the Python of scripts/fetch_sentence_transformers.py: `python make_mixtures.py`, or with the names of the files to write.

The weights are not in the file: they follow from the names of the tensors by `weights`, which tests/mixtures.rs repeats.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

COMMON = dict(
    vocab_size=272, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, rope_theta=10000.0, rms_norm_eps=1e-5, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)
FAMILIES = {
    "qwen3moe": (transformers.Qwen3MoeConfig, dict(
        COMMON, head_dim=32, intermediate_size=96, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True,
    )),
    "qwen3moe, first layer dense, not normalised": (transformers.Qwen3MoeConfig, dict(
        COMMON, head_dim=16, intermediate_size=96, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2, mlp_only_layers=[0],
    )),
    "mixtral": (transformers.MixtralConfig, dict(COMMON, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2)),
    "olmoe": (transformers.OlmoeConfig, dict(COMMON, intermediate_size=32, num_experts=8, num_experts_per_tok=4)),
    "granitemoe": (transformers.GraniteMoeConfig, dict(
        COMMON, intermediate_size=32, num_local_experts=8, num_experts_per_tok=3, embedding_multiplier=12.0, residual_multiplier=0.25,
        attention_multiplier=0.0625, logits_scaling=3.0, tie_word_embeddings=True,
    )),
}
DEEPSEEK = dict(
    {key: value for key, value in COMMON.items() if key not in ("num_key_value_heads", "rope_theta")}, rms_norm_eps=1e-6,
    intermediate_size=96, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
    first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
)
DEEPSEEK_YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=16, beta_fast=4, beta_slow=1,
    mscale=0.707, mscale_all_dim=0.707,
)
SHARED = {
    "qwen2moe": (transformers.Qwen2MoeConfig, dict(
        COMMON, intermediate_size=96, moe_intermediate_size=32, shared_expert_intermediate_size=64, num_experts=8,
        num_experts_per_tok=3,
    )),
    "qwen2moe, first layer dense, normalised": (transformers.Qwen2MoeConfig, dict(
        COMMON, intermediate_size=96, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=6,
        num_experts_per_tok=2, mlp_only_layers=[0], norm_topk_prob=True,
    )),
    "granitemoeshared": (transformers.GraniteMoeSharedConfig, dict(
        FAMILIES["granitemoe"][1], shared_intermediate_size=96,
    )),
    "deepseek2": (transformers.DeepseekV2Config, DEEPSEEK),
    "deepseek2, query through a narrow row, YaRN, scaled": (transformers.DeepseekV2Config, dict(
        DEEPSEEK, q_lora_rank=48, first_k_dense_replace=0, n_shared_experts=1, routed_scaling_factor=2.5, rope_parameters=DEEPSEEK_YARN,
    )),
    "deepseek2, YaRN with two weights": (transformers.DeepseekV2Config, dict(DEEPSEEK, rope_parameters=dict(DEEPSEEK_YARN, mscale=1.5))),
}
OSS = {key: value for key, value in COMMON.items() if key != "rope_theta"} | dict(
    num_hidden_layers=3, head_dim=16, intermediate_size=32, num_local_experts=8, num_experts_per_tok=3, sliding_window=4,
    max_position_embeddings=4096, rope_parameters=dict(
        rope_type="yarn", rope_theta=150000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=1024,
    ),
)
GPT_OSS = {
    "gpt-oss": (transformers.GptOssConfig, OSS),
    "gpt-oss, experts in MXFP4": (transformers.GptOssConfig, OSS),
}
TOKENS = [11, 48, 85, 122, 159, 196, 233, 14, 51, 88, 125, 3, 3, 260]
ROWS = [0, 6, 13]


def weights(name, count):
    """`count` numbers from -1 to 1 that the name determines, the same bits everywhere."""
    state = np.uint32(2166136261)
    with np.errstate(over="ignore"):
        for byte in name.encode():
            state = (state ^ np.uint32(byte)) * np.uint32(16777619)
        i = np.arange(count, dtype=np.uint32)
        state = (i + np.uint32(1)) * np.uint32(2654435761) + state
        state = (state ^ (state >> np.uint32(15))) * np.uint32(2246822519)
        state = (state ^ (state >> np.uint32(13))) * np.uint32(3266489917)
        state = state ^ (state >> np.uint32(16))
    return (state >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)


def tensor(name, shape):
    values = weights(name, int(np.prod(shape))).reshape(shape)
    if name.endswith("gate_up_proj_bias"):
        # Some gates and ups go over the activation's bounds.
        return values * np.float32(8.0)
    if name.endswith("_blocks"):
        return ((values + np.float32(1.0)) * np.float32(128.0)).astype(np.uint8)
    if name.endswith("_scales"):
        return ((values + np.float32(1.0)) * np.float32(2.0)).astype(np.uint8) + np.uint8(121)
    return np.float32(1.0) + values * np.float32(0.25) if len(shape) == 1 else values * np.float32(0.25)


def packed(shapes):
    """The shapes of tensors whose experts are in MXFP4."""
    out = {}
    for key, shape in shapes.items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            out[key] = shape
            continue
        experts, inputs, rows = shape
        out[f"{key}_blocks"] = [experts, rows, inputs // 32, 16]
        out[f"{key}_scales"] = [experts, rows, inputs // 32]
    return out


def unpacked(tensors):
    out = {key: value for key, value in tensors.items() if not key.endswith(("_blocks", "_scales"))}
    for key in tensors:
        if key.endswith("_blocks"):
            name = key.removesuffix("_blocks")
            halves = [torch.from_numpy(tensors[f"{name}_{half}"]) for half in ("blocks", "scales")]
            out[name] = convert_moe_packed_tensors(*halves, dtype=torch.float32).contiguous().numpy()
    return out


def case(name, config_class, settings):
    config = config_class(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        shapes = {key: list(value.shape) for key, value in sorted(load_file(file).items())}
        stored = json.loads((Path(folder) / "config.json").read_text())
        if name.endswith("MXFP4"):
            shapes = packed(shapes)
            stored["quantization_config"] = {"quant_method": "mxfp4"}
        tensors = {key: tensor(key, shape) for key, shape in shapes.items()}
        save_file(unpacked(tensors), file, metadata={"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
    numbers = [float(f"{x:.7g}") for row in ROWS for x in logits[row].tolist()]
    return {"name": name, "config": stored, "tensors": shapes, "logits": numbers}


def write(file, families):
    cases = [case(name, *family) for name, family in families.items()]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    lines = ",\n".join(json.dumps(one, sort_keys=True) for one in cases)
    head = json.dumps({"versions": versions, "tokens": TOKENS, "rows": ROWS})
    Path(__file__).with_name(file).write_text(head[:-1] + ', "cases": [\n' + lines + "\n]}\n")


FILES = {"mixtures.json": FAMILIES, "shared_experts.json": SHARED, "gpt_oss.json": GPT_OSS}
for file in sys.argv[1:] or FILES:
    write(file, FILES[file])
