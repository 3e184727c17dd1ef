#!/usr/bin/env python3
"""sentence-transformers as the anchor of our embeddings. Run it with the Python of scripts/fetch_sentence_transformers.py.

    embed_anchor.py MODEL_FOLDER vectors TEXTS.json     one line per text: its vector as f16, little-endian, in base64
    embed_anchor.py MODEL_FOLDER exact TEXTS.json       the same in f32
    embed_anchor.py MODEL_FOLDER speed TEXTS.json       for each line "N" on stdin: encodes all texts with N threads in batches of 32,
                                                        and prints the seconds that took

TEXTS.json is a list of strings. `rust/crates/engine/mesh-engine-ort/tests/data/minilm.base64` is the output of `vectors` for the texts beside it.
"""

import base64
import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402


def main(folder, what, texts):
    with open(texts, encoding="utf-8") as file:
        texts = json.load(file)
    model = SentenceTransformer(folder, device="cpu")
    if what in ("vectors", "exact"):
        width = "<f2" if what == "vectors" else "<f4"
        for vector in model.encode(texts, batch_size=32, show_progress_bar=False):
            print(base64.b64encode(vector.astype(width).tobytes()).decode())
        return
    model.encode(texts[:32], batch_size=32, show_progress_bar=False)
    print("ready", flush=True)
    for line in sys.stdin:
        torch.set_num_threads(int(line))
        started = time.perf_counter()
        model.encode(texts, batch_size=32, show_progress_bar=False)
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[2] not in ("vectors", "exact", "speed"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
