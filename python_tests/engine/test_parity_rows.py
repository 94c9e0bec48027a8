"""The rows that text, sound and pictures become, against transformers' embedding and towers."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray
from parity import OracleCheckpoint, Prompt, load, oracle_parts, picture, speech, text

# A row is a root-mean-square norm away from its sums, so its values are about 1 and two float32
# computations of it differ by few roundings.
MAX_ERROR = 1e-5


def assert_rows(
    name: str, oracle_checkpoint: OracleCheckpoint, prompt: Prompt
) -> NDArray[np.float32]:
    folder, model = oracle_checkpoint(name)
    with load(folder) as engine:
        found = np.concatenate([engine._core.embed(*part) for part in prompt])
    expected = oracle.embed(model, oracle_parts(model, prompt)).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=MAX_ERROR, atol=MAX_ERROR)
    return found


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_pictures_of_many_sizes(name: str, oracle_checkpoint: OracleCheckpoint) -> None:
    side = oracle.CONFIGS[name]["vision_config"]["patch_size"]
    sizes = [(1, 1), (side, side), (side, side - 1), (side + 1, 3 * side), (3 * side - 1, 5)]
    for seed, size in enumerate(sizes):
        rows = assert_rows(name, oracle_checkpoint, [picture(*size, seed)])
        assert len(rows) == -(-size[0] // side) * (size[1] // side + 1)


@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_pictures(level: int, oracle_checkpoint: OracleCheckpoint) -> None:
    assert_rows("stock_patches", oracle_checkpoint, [("image", np.full((50, 90, 3), level, "u1"))])


def test_a_picture_of_many_patches(oracle_checkpoint: OracleCheckpoint) -> None:
    """More of them than the encoder takes at a time."""
    rows = assert_rows("dense_mixed", oracle_checkpoint, [picture(150, 240)])
    assert len(rows) == 19 * 31


@pytest.mark.parametrize("name", ["dense_global", "odd_sizes", "odd_sizes_moe", "bigger"])
def test_sound(name: str, oracle_checkpoint: OracleCheckpoint) -> None:
    assert_rows(name, oracle_checkpoint, [("audio", speech()[10_000:60_001])])


@pytest.mark.parametrize("name", ["dense_global", "odd_sizes", "padded_vocab", "bigger"])
def test_text(name: str, oracle_checkpoint: OracleCheckpoint) -> None:
    _, model = oracle_checkpoint(name)
    every_id = ("text", np.arange(model.config.text_config.vocab_size))  # padding ids as well
    assert_rows(name, oracle_checkpoint, [every_id, text(model, 50, seed=0)])
