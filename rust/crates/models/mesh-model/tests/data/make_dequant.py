"""Writes dequant.gguf: for every type at least two blocks of random bits, and the values that ggml's Python reference gives.

Run in a virtual environment with `pip install gguf==0.19.0`: `python make_dequant.py`.
"""

from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

# Where the f16 scales of a block lie: random bits there would mostly be absurd or not a number.
SCALES = {
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "Q2_K": [80, 82], "Q3_K": [108], "IQ1_S": [0], "IQ1_M": [], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0],
    "IQ3_XXS": [0], "IQ3_S": [0], "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64], "MXFP4": [],
}
TYPES = ["F32", "F16", "BF16", *[name for name in SCALES if name != "F16"]]

random = np.random.default_rng(17)
writer = GGUFWriter(Path(__file__).with_name("dequant.gguf"), "test")
for name in TYPES:
    kind = GGMLQuantizationType[name]
    elements, size = GGML_QUANT_SIZES[kind]
    blocks = max(2, 64 // elements)
    if name == "F32":
        raw = random.normal(size=blocks).astype(np.float32).view(np.uint8)
    elif name == "BF16":
        raw = (random.normal(size=blocks).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        raw = random.integers(0, 256, (blocks, size), dtype=np.uint8)
        for at in SCALES[name]:
            raw[:, at : at + 2] = random.normal(size=(blocks, 1)).astype(np.float16).view(np.uint8)
        if name == "IQ1_M":
            # The upper nibbles of four words: exponent bits that are neither all zero nor all one.
            raw[:, 55] = raw[:, 55] & 0x8F | 0x30
        if name == "MXFP4":
            # An exponent below the normal numbers, and a common one.
            raw[:, 0] = [1, 125][:blocks]
        raw = raw.reshape(-1)
    values = dequantize(raw.view(np.float32) if name == "F32" else raw.view(np.float16) if name == "F16" else raw, kind)
    stored = {"F32": np.float32, "F16": np.float16}.get(name)
    if stored:
        writer.add_tensor(name, raw.view(stored))
    else:
        writer.add_tensor(name, raw, raw_shape=(raw.size,), raw_dtype=kind)
    writer.add_tensor(f"{name}.expected", values.astype(np.float32).reshape(-1))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
