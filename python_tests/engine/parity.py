"""One prompt for two readers: raw inputs for the engine, embedded parts for the oracle.

A prompt is a list of ("text", ids (n,)), ("image", uint8 pixels (h, w, 3)) and ("audio", float32
samples (n,)). The engine does its own patches and dMel bins; the oracle gets those of the NumPy
twin, which `python_tests/reference/` compares with transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray
from oracle import Part
from transformers import InklingForConditionalGeneration

import duplex_engine
from duplex_engine import Engine, Session
from duplex_engine.reference import dmel, hmlp

Prompt = list[tuple[str, Any]]
OracleCheckpoint = Callable[..., tuple[Path, InklingForConditionalGeneration]]  # see conftest.py

# Of logits, relative to the largest. The project promises 1e-4; two float32 sums of a few hundred
# products in different orders differ by about 1e-6, and a wrong epsilon or scale by more than 1e-5.
MAX_ERROR = 1e-5


@functools.cache
def speech() -> NDArray[np.float32]:
    """The recording that the package carries: (113600,) samples at 16 kHz."""
    path = Path(duplex_engine.__file__).parent / "examples" / "speech.flac"
    samples, sample_rate = soundfile.read(path, dtype="float32")
    assert sample_rate == dmel.SAMPLE_RATE_HZ
    return samples


def load(folder: Path, **options: Any) -> Engine:
    """The engine, small and on one thread."""
    return Engine.load(
        folder, **({"threads": 1, "memory": "64MiB", "max_positions": 2048} | options)
    )


def text(model: InklingForConditionalGeneration, n: int, seed: int) -> tuple[str, NDArray[Any]]:
    """A part of `n` random ids."""
    config = model.config.text_config
    n_ids = config.unpadded_vocab_size or config.vocab_size
    return "text", np.random.default_rng(seed).integers(0, n_ids, n)


def picture(height: int, width: int, seed: int = 0) -> tuple[str, NDArray[np.uint8]]:
    """A part of random pixels."""
    rng = np.random.default_rng(seed)
    return "image", rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def mixed_prompt(model: InklingForConditionalGeneration, seed: int) -> Prompt:
    """Text longer than every window and extent, then pictures of several sizes, sound and text."""
    config = model.config.text_config
    n_text = max(200, 40 + max(config.rel_extent, config.sliding_window_size))
    side = model.config.vision_config.patch_size
    start = 20_000 + 1_000 * seed
    return [
        text(model, n_text, seed),
        picture(2 * side, side, seed),  # the column of padding that a whole width ends in
        picture(1, 1, seed + 1),
        ("audio", speech()[start : start + 12_345]),
        text(model, 12, seed + 1),
        picture(2 * side + 3, 3 * side - 1, seed + 2),
        ("audio", speech()[start + 12_345 : start + 16_000]),  # looks back into the sound above
        text(model, 5, seed + 2),
    ]


def oracle_parts(model: InklingForConditionalGeneration, prompt: Prompt) -> list[Part]:
    """The prompt as `oracle.logits` takes it."""
    side = model.config.vision_config.patch_size
    heard = np.zeros(0, np.float32)
    parts: list[Part] = []
    for kind, values in prompt:
        if kind == "image":
            parts.append((kind, hmlp.patchify(values, side)))
        elif kind == "audio":
            n_frames = len(heard) // dmel.HOP
            heard = np.concatenate([heard, values, np.zeros(-len(values) % dmel.HOP, np.float32)])
            parts.append((kind, dmel.dmel_bins(heard)[n_frames:]))
        else:
            parts.append((kind, values))
    return parts


def append(session: Session, prompt: Prompt) -> NDArray[np.float32]:
    """Appends every part, each sound padded to 50 ms; the logits of all rows: (n, vocabulary)."""
    inputs: list[dict[str, Any]] = [
        {kind: values} | ({"end_of_audio": True} if kind == "audio" else {})
        for kind, values in prompt
    ]
    return np.concatenate([session.append(**given, logits="all") for given in inputs])


def logits(folder: Path, prompt: Prompt, **options: Any) -> NDArray[np.float32]:
    """The engine's logits of all rows of a prompt: (n, vocabulary)."""
    with load(folder, **options) as engine, engine.open_session() as session:
        return append(session, prompt)


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, relative to the largest expected value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def assert_greedy(tokens: list[int], choices: NDArray[np.float32]) -> None:
    """Each token is the oracle's choice after the same rows, so the continuations are the same.

    choices: (len(tokens), vocabulary), the oracle's logits where each token was chosen. Their two
    best must be further apart than two logits can err, so the tokens do not depend on the machine.
    """
    assert tokens == choices.argmax(axis=-1).tolist()
    second, best = np.sort(choices, axis=-1)[:, -2:].T
    assert (best - second).min() > 2 * MAX_ERROR * np.abs(choices).max(), (
        "a near-tie: take another seed"
    )
