"""Writes grids.bin: the grids of ggml's IQ types, from its Python reference.

Run in a virtual environment with `pip install gguf==0.19.0`: `python make_grids.py`. One grid after the other lies in
the file in the order of GRIDS, an entry in two bytes, little-endian: the numbers of its values in the type's list of
magnitudes, the first one lowest, 2 bits each for eight values, 3 bits each for four.
"""

from pathlib import Path

import numpy as np
from gguf import quants

GRIDS = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"]

out = b""
for name in GRIDS:
    kind = getattr(quants, name)
    kind.init_grid()
    values = kind.grid.reshape(kind.grid_shape)
    numbers = np.searchsorted(np.array(kind.grid_map, dtype=np.float32), values).astype(np.uint16)
    bits = 16 // values.shape[1] if values.shape[1] == 8 else 3
    shifts = np.arange(values.shape[1], dtype=np.uint16) * bits
    out += np.bitwise_or.reduce(numbers << shifts, axis=1).astype("<u2").tobytes()
Path(__file__).with_name("grids.bin").write_bytes(out)
