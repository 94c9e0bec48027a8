"""Very small random models, and the kinds of input that the tests of this folder feed to them.

`write` makes a checkpoint of a few hundred kilobytes, `load` an engine that needs little memory.
What is tested with them is the engine, so nothing here needs torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

from duplex_engine import BackendUnavailable, Engine
from duplex_engine.models import PRESETS, write_random_checkpoint
from duplex_engine.models.random import Preset

HOP = 800  # samples of one frame of sound
TURN = 4 * HOP  # samples of a micro-turn
BLOCK = 64  # positions that `forget` rounds to
REWIND = 32  # rows that `truncate` can always take back
FIRST_WORD = 264  # token ids from here on are neither control tokens nor bytes

# Sizes that are no multiple of a vector, so that padding is everywhere; windows and extents that a
# short test leaves behind.
_DENSE: dict[str, Any] = {
    "vocab_size": 320,
    "d_model": 40,
    "d_ff": 52,
    "layers": "ld gd ld",
    "heads": (4, 2),
    "local_heads": (2, 2),
    "d_head": 12,
    "d_rel": 3,
    "rel_extent": 40,
    "window": 24,
    "patch_size": 8,
    "vision_layers": 2,
}
_MOE = {"n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28}
MODELS = {
    # A page of the global layer holds two blocks, so a block can be forgotten without its page.
    "dense": Preset(**_DENSE),
    "moe": Preset(**_DENSE | {"layers": "lm gm", "moe": _MOE}),
    # No layer sees further than its window.
    "local": Preset(**_DENSE | {"layers": "ld lm", "moe": _MOE}),
}


def write(
    folder: Path,
    model: str,
    *,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    interaction: bool = True,
    mtp_layers: int = 0,
) -> Path:
    """Writes the random checkpoint of `MODELS[model]` into `folder`."""
    with mock.patch.dict(PRESETS, MODELS):
        return write_random_checkpoint(
            folder,
            model,
            seed=seed,
            dtype=dtype,
            interaction=interaction,
            mtp_layers=mtp_layers,
        )


def load(path: Path, **options: Any) -> Engine:
    """Loads with one thread and little memory, unless told otherwise, on the device of this run.

    A GPU has pages of 2 MiB, so it needs more: a session has five of them at least.
    """
    device = options.get("device", os.environ.get("DUPLEX_TEST_DEVICE", "cpu"))
    defaults: dict[str, Any] = {
        "device": device,
        "threads": 1,
        "memory": "16MiB" if device == "cpu" else "256MiB",
        "max_positions": 2048,
        "rewind_rows": REWIND,
    }
    return Engine.load(path, **defaults | options)


def counts(engine: Engine) -> dict[str, int]:
    """Its stats but for what a GPU was asked to do: to look at something is asking, too."""
    asked = ("launches", "waits")
    return {name: value for name, value in engine.stats.items() if name not in asked}


def instruction_sets(path: Path) -> list[str]:
    """The names of `isa` that work on this machine's CPU."""
    names = []
    for isa in ("portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512"):
        try:
            load(path, isa=isa).close()
        except BackendUnavailable:
            continue
        names.append(isa)
    return names


def examples(n: int, **options: Any) -> settings:
    """Settings of a test that draws `n` examples, and more or fewer as a profile does."""
    factor = settings().max_examples / settings.get_profile("default").max_examples
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=max(round(n * factor), 1),
        deadline=None,
        suppress_health_check=checks,
        **options,
    )


def words(n: int, seed: int = 0) -> list[int]:
    """Token ids of text."""
    ids = np.random.default_rng(seed).integers(FIRST_WORD, MODELS["dense"].vocab_size, n)
    return [int(i) for i in ids]


def sound(n: int, seed: int = 0) -> NDArray[np.float32]:
    """(n,) samples of noise, its loudness changing every 20 ms."""
    rng = np.random.default_rng(seed)
    loudness = np.repeat(rng.uniform(0.003, 0.5, n // 320 + 1), 320)[:n]
    return (loudness * rng.standard_normal(n)).astype(np.float32)


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """(height, width, 3) random pixels."""
    shape = (height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def same_bytes(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays have the same shape, type and bytes."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
