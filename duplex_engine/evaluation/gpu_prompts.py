"""Does a GPU leave the same memory of a prompt whether it comes at once or in pieces?

Owns the comparison of `duplex-engine gpu-check` that needs a wide matrix: products of more than 64
rows with one have kernels of their own (docs/GPU.md), which no model of the other comparisons
reaches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from duplex_engine.engine import Engine
from duplex_engine.evaluation.gpu_check import Check
from duplex_engine.models.random import PRESETS, write_random_checkpoint

__all__ = ["prompt_checks"]

# Gates and ups make 144 squares of 64 outputs and 72 of 128: with 100 rows enough for the smaller
# ones, with 256 for the larger.
WIDE = replace(PRESETS["tiny"], d_model=288, d_ff=4608, layers="gd")
N_ROWS = (100, 256)
PIECE = 32


def prompt_checks(device: str) -> Iterator[Check]:
    """Compares prompts at once with the same in pieces, rows in bfloat16, on the device."""
    with TemporaryDirectory() as folder:
        path = write_random_checkpoint(Path(folder), WIDE)
        with Engine.load(path, device=device, dtype="bfloat16") as engine:
            for n_rows in N_ROWS:
                ids = np.random.default_rng(0).integers(8, engine.config.text.n_logits, n_rows)
                found = []
                for piece in (n_rows, PIECE):
                    with engine.open_session() as session:
                        for begin in range(0, n_rows, piece):
                            session.append(text=ids[begin : begin + piece].tolist())
                        found.append(list(session._core.digests()))
                name = f"bfloat16: a prompt of {n_rows} rows, in pieces"
                yield Check(name, found[0] == found[1], f"{len(found[0])} blocks")
