"""Checkpoints that do not fit: refused with the name of the tensor, in either spelling.

Damage to the files themselves (headers, offsets, shards) is in test_checkpoint_files.py.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from parity import OracleCheckpoint, load
from safetensors.numpy import load_file, save_file

from duplex_engine import CheckpointError

pytestmark = pytest.mark.core

# Every kind of tensor: dense and MoE, local and global, both towers.
NAME = "uneven_heads"
Array = NDArray[np.float32]
Tensors = dict[str, Array]
Refuse = Callable[[Tensors, str], str]


@pytest.fixture(scope="module", params=["published", "modules"])
def tensors(
    request: pytest.FixtureRequest,
    oracle_checkpoint: OracleCheckpoint,
    tmp_path_factory: pytest.TempPathFactory,
) -> Tensors:
    """All tensors of one checkpoint, in one of the two spellings. Change copies only."""
    folder, model = oracle_checkpoint(NAME)
    if request.param == "modules":
        folder = tmp_path_factory.mktemp("modules")
        model.save_pretrained(folder, save_original_format=False)
    return load_file(folder / "model.safetensors")


@pytest.fixture
def folder(oracle_checkpoint: OracleCheckpoint, tmp_path: Path) -> Iterator[Path]:
    """The checkpoint without its weights."""
    shutil.copy(oracle_checkpoint(NAME)[0] / "config.json", tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture
def refuse(folder: Path) -> Refuse:
    """`refuse(tensors, name)`: the checkpoint is refused with an error that names `name`."""

    def refuse(tensors: Tensors, name: str) -> str:
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"'{re.escape(name)}'") as caught:
            load(folder)
        return str(caught.value)

    return refuse


def test_the_undamaged_checkpoint_loads(tensors: Tensors, folder: Path) -> None:
    assert len(tensors) > 80
    save_file(tensors, folder / "model.safetensors")
    load(folder).close()


def test_missing(tensors: Tensors, refuse: Refuse) -> None:
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        assert "is missing" in refuse(rest, name)


def test_misshapen(tensors: Tensors, refuse: Refuse) -> None:
    for name, tensor in tensors.items():
        longer = np.concatenate([tensor, tensor[-1:]])
        for wrong in (longer, tensor[None], tensor[:0]):
            error = refuse(tensors | {name: wrong}, name)
            assert f"expected shape {tuple(tensor.shape)}".replace(",)", ")") in error
            assert f"found {tuple(wrong.shape)}".replace(",)", ")") in error


def test_not_finite(tensors: Tensors, refuse: Refuse) -> None:
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        places = {0: np.nan, tensor.size - 1: np.inf, int(rng.integers(tensor.size)): -np.inf}
        for at, value in places.items():
            damaged = tensor.copy()
            damaged.flat[at] = value
            assert "holds a NaN or infinity" in refuse(tensors | {name: damaged}, name)


def test_unused(tensors: Tensors, refuse: Refuse) -> None:
    one = np.ones(1, np.float32)
    for name in (
        "model.llm.layers.4.attn_norm.weight",  # the model has layers 0 to 3
        "model.llm.layers.0.mlp.gate.weight",  # layer 0 is dense
        "model.llm.embed.bias",
        "model.speech.norm.weight",
        "modelmtp.norm.weight",
    ):
        assert "not part of the model" in refuse(tensors | {name: one}, name)


def test_another_type(tensors: Tensors, refuse: Refuse) -> None:
    for name in list(tensors)[::10]:
        for dtype in (np.float64, np.int8, np.int64):
            error = refuse(tensors | {name: tensors[name].astype(dtype)}, name)
            assert "expected elements of F32, BF16, F16, F8_E4M3 or packed U8, found " in error


def test_both_spellings_of_one_tensor(refuse: Refuse, oracle_checkpoint: OracleCheckpoint) -> None:
    tensors = load_file(oracle_checkpoint(NAME)[0] / "model.safetensors")
    twice = "model.language_model.norm.weight"
    refuse(tensors | {twice: tensors["model.llm.norm.weight"]}, twice)
