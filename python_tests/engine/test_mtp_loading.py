"""Multi-token-prediction layers of a checkpoint: loaded when asked for, refused when they do not
fit, and without a trace when they are not asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from random_models import counts, load, words, write
from safetensors.numpy import load_file, save_file

from duplex_engine import CheckpointError, InvalidArgument
from duplex_engine.convert import convert

pytestmark = pytest.mark.core

Tensors = dict[str, NDArray[Any]]
FIRST = "model.mtp.layers.0."


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def replaced(name: str, values: NDArray[Any]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: values.astype(np.float32)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(FIRST + "hidden_norm.weight"), "'model.mtp.layers.0.hidden_norm.weight' is miss"),
        (without(FIRST + "input_proj.weight"), "'model.mtp.layers.0.input_proj.weight' is missing"),
        (
            without(FIRST + "transformer_block.mlp.w13_dn.weight"),
            "'model.mtp.layers.0.transformer_block.mlp.w13_dn.weight' is missing",
        ),
        (
            replaced(FIRST + "input_proj.weight", np.ones((40, 40))),
            r"input_proj.weight': expected shape \(40, 80\) from config.json, found \(40, 40\)",
        ),
        (
            # Depth 0 is local, so the extent of its bias is the window.
            replaced(FIRST + "transformer_block.attn.rel_logits_proj.proj", np.ones((3, 40))),
            r"expected shape \(3, 24\) from config.json, found \(3, 40\)",
        ),
        (replaced(FIRST + "embed_norm.weight", np.full(40, np.nan)), "embed_norm.weight.*NaN"),
        (Tensors.clear, "'model.mtp.layers.0.hidden_norm.weight' is missing"),
    ],
)
def test_damaged_tensors(tmp_path: Path, damage: Callable[[Tensors], object], message: str) -> None:
    write(tmp_path, "dense", mtp_layers=2)
    tensors = load_file(tmp_path / "mtp.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "mtp.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, mtp_layers=2)
    load(tmp_path).close()  # nobody asked for them


def test_more_layers_than_the_config_names(tmp_path: Path) -> None:
    write(tmp_path, "dense", mtp_layers=2)
    with pytest.raises(CheckpointError, match=r"mtp_config: expected 3 or more .* found 2; ask"):
        load(tmp_path, mtp_layers=3)
    load(tmp_path, mtp_layers=1).close()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["mtp_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mtp_config: expected 1 or more .* found 0; ask"):
        load(tmp_path, mtp_layers=1)
    load(tmp_path).close()


def test_a_config_without_the_file(tmp_path: Path) -> None:
    write(tmp_path, "dense", mtp_layers=2)
    (tmp_path / "mtp.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"hidden_norm.weight' is missing"):
        load(tmp_path, mtp_layers=2)
    load(tmp_path).close()


@pytest.mark.parametrize("is_named", [True, False])
def test_beside_shards(tmp_path: Path, is_named: bool) -> None:
    """An index may name the file or leave it out; it need not be there."""
    write(tmp_path, "dense", mtp_layers=1)
    (tmp_path / "model.safetensors").rename(tmp_path / "shard-1.safetensors")
    files = ["shard-1.safetensors"] + ["mtp.safetensors"] * is_named
    weight_map = {name: file for file in files for name in load_file(tmp_path / file)}
    index = json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with load(tmp_path, mtp_layers=1) as engine, engine.open_session(speculate=1) as session:
        session.append(text=words(5))
        session.decode(8)
        assert engine.stats["drafted"] > 0
    (tmp_path / "mtp.safetensors").unlink()
    load(tmp_path).close()
    with pytest.raises(CheckpointError, match=r"hidden_norm.weight' is missing"):
        load(tmp_path, mtp_layers=1)


@pytest.mark.parametrize("mtp_layers", [-1, 1.5, "1", None, True])
def test_bad_numbers(tmp_path: Path, mtp_layers: Any) -> None:
    with pytest.raises(InvalidArgument, match="mtp_layers"):
        load(write(tmp_path, "dense", mtp_layers=1), mtp_layers=mtp_layers)


@pytest.mark.cpu  # no other device has packed files
def test_packed_weights_hold_the_layers_that_were_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "dense", mtp_layers=2)
    packed = convert(source, tmp_path / "packed", weights="int8", mtp_layers=2)
    found = []
    for folder, weights in ((source, "int8"), (packed, "auto"), (source, "int8"), (source, "int8")):
        options = {"cache": tmp_path / "cache"} if found else {}
        with (
            load(folder, mtp_layers=2, weights=weights, **options) as engine,
            engine.open_session(speculate=2) as session,
        ):
            session.append(text=words(30))
            session.decode(1)
            found.append(session._core.draft_logits())
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    with pytest.raises(CheckpointError, match="the mtp_layers that its weights were packed for"):
        load(packed, mtp_layers=1)


def test_nothing_is_spent_on_layers_that_are_not_loaded(tmp_path: Path) -> None:
    """Nor, where they are loaded, on a session that does not guess."""
    found = []
    for name, written, loaded in (("without", 0, 0), ("with", 2, 0), ("loaded", 2, 2)):
        folder = write(tmp_path / name, "dense", mtp_layers=written)
        with load(folder, mtp_layers=loaded) as engine, engine.open_session() as session:
            session.append(text=words(99))
            session.decode(9)
            stats, plan = counts(engine), dict(engine.memory_plan)
            found.append((session.memory, session._core.digests(), stats, plan))
    assert found[0] == found[1]
    assert found[2][:3] == found[0][:3]
    assert found[2][3]["weights"] > found[0][3]["weights"]


def test_drafting_layers_are_admitted_with_their_session(tmp_path: Path) -> None:
    """What they may need is promised: no session is opened that could not go on."""
    with load(write(tmp_path, "dense", mtp_layers=2), mtp_layers=2) as engine:
        plain = engine.open_session()
        one = engine.stats["pages_promised"]
        plain.close()
        guessing = engine.open_session(speculate=2)
        assert engine.stats["pages_promised"] > one
        guessing.close()
        assert engine.stats["pages_promised"] == engine.stats["pages_used"] == 0
