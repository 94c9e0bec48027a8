"""The same model however it is stored: the same bytes of logits as from the plain checkpoint.

The plain checkpoint is `save_pretrained`'s single float32 file in the published spelling, which
test_parity_logits.py compares with transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from parity import (
    MAX_ERROR,
    OracleCheckpoint,
    Prompt,
    logits,
    mixed_prompt,
    oracle_parts,
    relative_error,
    text,
)
from safetensors.torch import load_file, save_file

from duplex_engine import CheckpointError

NAMES = ["uneven_heads", "odd_sizes_moe", "padded_vocab"]
Tensors = dict[str, torch.Tensor]


def rewrite(
    folder: Path,
    to: Path,
    change: Callable[[Tensors], Tensors] = dict,
    config: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Path:
    """A copy of a single-file checkpoint with other tensors or another config.json."""
    to.mkdir(exist_ok=True)
    save_file(change(load_file(folder / "model.safetensors")), to / "model.safetensors")
    values = config(json.loads((folder / "config.json").read_text()))
    (to / "config.json").write_text(json.dumps(values))
    return to


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_spellings_and_shards(
    name: str, dtype: str, oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    folder, model = oracle_checkpoint(name)
    prompt = mixed_prompt(model, seed=1)
    expected = logits(folder, prompt, dtype=dtype)
    for original in (True, False):
        for size in ("1GB", "60KB"):
            to = tmp_path / f"{original}-{size}"
            model.save_pretrained(to, save_original_format=original, max_shard_size=size)
            assert (to / "model.safetensors.index.json").exists() == (size == "60KB")
            np.testing.assert_array_equal(logits(to, prompt, dtype=dtype), expected, to.name)


def test_the_other_spelling_is_another(oracle_checkpoint: OracleCheckpoint, tmp_path: Path) -> None:
    """Guards the test above against a `save_pretrained` that ignores the option."""
    folder, model = oracle_checkpoint("uneven_heads")
    model.save_pretrained(tmp_path, save_original_format=False)
    published = load_file(folder / "model.safetensors").keys()
    modules = load_file(tmp_path / "model.safetensors").keys()
    assert len(published & modules) < 10
    assert "model.llm.layers.0.mlp.w13_dn.weight" in published
    assert "model.language_model.layers.0.mlp.gate_proj.weight" in modules


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_in_bfloat16(
    name: str, original: bool, oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    folder, model = oracle_checkpoint(name, dtype="bfloat16")
    prompt = mixed_prompt(model, seed=1)
    stored = oracle.load(folder, torch.bfloat16)
    stored.save_pretrained(tmp_path, save_original_format=original)
    expected = oracle.logits(model, oracle_parts(model, prompt))
    assert relative_error(logits(tmp_path, prompt, dtype="float32"), expected) < MAX_ERROR


@pytest.mark.parametrize("name", NAMES)
def test_both_types_in_one_file(
    name: str, oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    def every_second_in_bfloat16(tensors: Tensors) -> Tensors:
        return {
            name: tensor.bfloat16() if i % 2 else tensor
            for i, (name, tensor) in enumerate(sorted(tensors.items()))
        }

    folder, _ = oracle_checkpoint(name)
    rewrite(folder, tmp_path, every_second_in_bfloat16)
    model = oracle.load(tmp_path)
    prompt = mixed_prompt(model, seed=1)
    expected = oracle.logits(model, oracle_parts(model, prompt))
    assert relative_error(logits(tmp_path, prompt, dtype="float32"), expected) < MAX_ERROR


def test_multi_token_prediction_is_left_out(
    oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    extra = {
        "model.mtp.norm.weight": torch.full((64,), torch.nan),
        "model.mtp.layers.0.attn.wq_du.weight": torch.ones(3, 5),
    }
    folder, model = oracle_checkpoint("uneven_heads")
    rewrite(folder, tmp_path, lambda tensors: tensors | extra)
    prompt = mixed_prompt(model, seed=1)
    np.testing.assert_array_equal(logits(tmp_path, prompt), logits(folder, prompt))


def test_a_head_without_the_padding_of_the_vocabulary(
    oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    head = "model.llm.unembed.weight"
    folder, model = oracle_checkpoint("padded_vocab")
    rewrite(folder, tmp_path, lambda tensors: tensors | {head: tensors[head][:101].clone()})
    prompt = mixed_prompt(model, seed=1)
    np.testing.assert_array_equal(logits(tmp_path, prompt), logits(folder, prompt))


def without_towers(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if name.startswith("model.llm.")}


def flat(config: dict[str, Any]) -> dict[str, Any]:
    return config["text_config"] | {"model_type": "inkling_text"}


def nested(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("model_type", "text_config", "dtype")}


@pytest.mark.parametrize("config", [flat, nested])
def test_text_only(
    config: Callable[[dict[str, Any]], dict[str, Any]],
    oracle_checkpoint: OracleCheckpoint,
    tmp_path: Path,
) -> None:
    folder, model = oracle_checkpoint("moe_mixed")
    rewrite(folder, tmp_path, without_towers, config)
    prompt: Prompt = [text(model, 100, seed=1)]
    np.testing.assert_array_equal(logits(tmp_path, prompt), logits(folder, prompt))
    with pytest.raises(CheckpointError, match=r"not part of the model: 'model\.audio\.encoder"):
        logits(rewrite(folder, tmp_path / "towers", config=config), prompt)


@pytest.mark.parametrize("original", [True, False])
def test_a_text_model_of_transformers(original: bool, tmp_path: Path) -> None:
    """`InklingForCausalLM` is the decoder alone; its tensors lack the level `language_model`."""
    model = oracle.build_text_model("moe_mixed", tmp_path, save_original_format=original)
    ids = np.random.default_rng(0).integers(0, 128, 100)
    expected = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    assert relative_error(logits(tmp_path, [("text", ids)]), expected) < MAX_ERROR
