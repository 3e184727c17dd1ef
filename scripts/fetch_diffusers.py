#!/usr/bin/env python3
"""Installs diffusers, the reference for images, into the cache: .cache/diffusers is a virtual environment.

torch is that of scripts/fetch_sentence_transformers.py. About 600 MB are fetched and 1.3 GB stay; a second run does nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fetch_sentence_transformers import environment  # noqa: E402

# accelerate loads weights without a second copy of them.
PLAIN = ["diffusers==0.35.2", "accelerate"]
NEEDS = [
    "transformers==4.57.3", "tokenizers==0.22.1", "huggingface-hub==0.36.0", "numpy==2.4.6", "safetensors", "Pillow", "importlib_metadata",
    "regex", "requests", "filelock", "sympy", "networkx", "jinja2", "setuptools", "psutil", "pyyaml",
]  # fmt: skip
IMPORTS = "from diffusers import UNet2DConditionModel; from transformers import CLIPTextModel"

if __name__ == "__main__":
    sys.exit(environment("diffusers", PLAIN, NEEDS, IMPORTS))
