"""The NumPy decoder against transformers, on random models of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

from duplex_engine.reference import hmlp, inkling


def _rows(parts, weights, config):
    """The rows of a prompt as the NumPy twin embeds them."""
    rows = []
    for kind, values in parts:
        if kind == "text":
            rows.append(inkling.embed_text(values, weights, config["text_config"]))
        elif kind == "audio":
            rows.append(inkling.embed_audio(values, weights))
        else:
            rows.append(hmlp.encode(values, weights, config["vision_config"]))
    return np.concatenate(rows)


def _relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_logits_of_mixed_prompts(name: str, tmp_path: Path) -> None:
    model = oracle.build(name, tmp_path, seed=1)
    parts = oracle.random_parts(model, seed=2)
    weights, config = inkling.load(tmp_path)
    rows = _rows(parts, weights, config)
    assert _relative_error(rows, oracle.embed(model, parts).numpy()) < 1e-5
    found = inkling.forward(rows, weights, config["text_config"])
    expected = oracle.logits(model, parts)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert _relative_error(found, expected) < 1e-4
    assert expected.std(axis=-1).min() > 0.5, "a flat oracle would prove nothing"


@pytest.mark.parametrize("name", ["dense_mixed", "moe_mixed", "log_scaling"])
def test_forgotten_ranges(name: str, tmp_path: Path) -> None:
    model = oracle.build(name, tmp_path, seed=3)
    parts = oracle.random_parts(model, seed=4, n_text=40)
    n = sum(len(values) for _, values in parts)
    visible = np.ones((n, n), bool)
    visible[30:, 4:12] = False  # rows 4..11 were forgotten before row 30 came
    visible[44:, 12:20] = False
    weights, config = inkling.load(tmp_path)
    rows = _rows(parts, weights, config)
    found = inkling.forward(rows, weights, config["text_config"], visible)
    assert _relative_error(found, oracle.logits(model, parts, visible)) < 1e-4
    whole = inkling.forward(rows, weights, config["text_config"])
    assert _relative_error(found[:30], whole[:30]) < 1e-5
    assert _relative_error(found[30:], whole[30:]) > 1e-3


def test_float64_is_the_sharper_reference(tmp_path: Path) -> None:
    model = oracle.build("moe_mixed", tmp_path, seed=5)
    parts = oracle.random_parts(model, seed=6)
    weights, config = inkling.load(tmp_path, np.float64)
    rows = _rows(parts, weights, config)
    found = inkling.forward(rows, weights, config["text_config"])
    assert found.dtype == np.float64
    expected = oracle.logits(model.double(), parts)
    assert _relative_error(found, expected) < 1e-6


def test_bfloat16_checkpoint_reads_as_saved(tmp_path: Path) -> None:
    model = oracle.build("dense_mixed", tmp_path, seed=7, dtype=torch.bfloat16)
    parts = oracle.random_parts(model, seed=8)
    weights, config = inkling.load(tmp_path)
    found = inkling.forward(_rows(parts, weights, config), weights, config["text_config"])
    assert _relative_error(found, oracle.logits(model, parts)) < 1e-4
    assert _relative_error(found, oracle.logits(oracle.load(tmp_path), parts)) < 1e-4


def test_greedy_follows_the_whole_sequence_logits(tmp_path: Path) -> None:
    model = oracle.build("moe_mixed", tmp_path, seed=9)
    parts = oracle.random_parts(model, seed=10)
    tokens = oracle.greedy(model, parts, 12)
    whole = oracle.logits(model, [*parts, ("text", tokens[:-1])])
    assert tokens == [int(t) for t in whole[-12:].argmax(axis=-1)]


def test_layer_kinds_without_a_list() -> None:
    assert [inkling.is_sliding({}, i) for i in range(7)] == [True] * 5 + [False, True]
    assert [inkling.is_sliding({"local_layer_ids": [1]}, i) for i in range(2)] == [False, True]


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="safetensors"):
        inkling.load(tmp_path)
