"""Random checkpoints: the layout of the published ones, the sizes they promise, the same bytes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import oracle
import pytest

from duplex_engine.checkpoint import Checkpoint
from duplex_engine.errors import InvalidArgument
from duplex_engine.models import PRESETS, write_random_checkpoint
from duplex_engine.reference import inkling


@pytest.mark.parametrize(("preset", "low", "high"), [("tiny", 1.0e6, 1.5e6), ("moe", 2.0e6, 2.5e6)])
def test_sizes(tmp_path: Path, preset: str, low: float, high: float) -> None:
    with Checkpoint.open(write_random_checkpoint(tmp_path, preset)) as checkpoint:
        assert low < sum(math.prod(tensor.shape) for tensor in checkpoint.tensors) < high
        assert checkpoint.config.interaction is not None
        assert checkpoint.config.audio is not None
        assert checkpoint.config.vision is not None
        assert checkpoint.tokenizer_path is not None


@pytest.mark.parametrize("preset", ["tiny", "moe"])
def test_transformers_computes_the_same_logits(tmp_path: Path, preset: str) -> None:
    folder = write_random_checkpoint(tmp_path, preset)
    ids = [100, 20, 300, 8, 1]
    bins = np.random.default_rng(0).integers(0, 16, (4, 80), dtype=np.uint8)
    expected = oracle.logits(oracle.load(folder), [("text", ids), ("audio", bins)])

    weights, config = inkling.load(folder)
    rows = [inkling.embed_text(ids, weights, inkling_text(config))]
    rows.append(inkling.embed_audio(bins, weights))
    found = inkling.forward(np.concatenate(rows), weights, inkling_text(config))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    # The random model is worth running: its choices vary and silence is one of them.
    assert len(set(found.argmax(axis=1))) > 1


def inkling_text(config: inkling.Config) -> inkling.Config:
    """The text block with the defaults that its file leaves out."""
    return {"rms_norm_eps": 1e-6, "conv_kernel_size": 4} | config["text_config"]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first, second, third = (
        write_random_checkpoint(tmp_path / str(i), seed=seed) for i, seed in enumerate([5, 5, 6])
    )
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "model.safetensors").read_bytes() != (third / "model.safetensors").read_bytes()


def test_bfloat16_rounds_to_nearest(tmp_path: Path) -> None:
    exact, _ = inkling.load(write_random_checkpoint(tmp_path / "a"))
    rounded, _ = inkling.load(write_random_checkpoint(tmp_path / "b", dtype="bfloat16"))
    assert exact.keys() == rounded.keys()
    for name, values in exact.items():
        assert np.all(np.abs(rounded[name] - values) <= np.abs(values) * 2**-8), name
        if values.size > 1000:
            assert np.any(rounded[name] != values), name


def test_without_interaction(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path, interaction=False)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.config.interaction is None


def test_unknown_presets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=f"preset: expected one of {', '.join(PRESETS)}"):
        write_random_checkpoint(tmp_path, "huge")
