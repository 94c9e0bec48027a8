"""Logits of every multi-token-prediction layer against transformers' `MtpModel`.

The oracle reads the same files and runs the layers on all rows at once. It is given two things that
its own `forward` does otherwise: embedded rows as they enter the model, behind the embedding's
norm, and masks with the window of local layers (5.24 makes them wholly causal). That the published
weights want the norm is what other engines measure: they guess better with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from numpy.typing import NDArray
from parity import MAX_ERROR, Prompt, append, load, oracle_parts, picture, relative_error, speech
from random_models import REWIND, words, write
from safetensors.numpy import load_file, save_file
from transformers import InklingForConditionalGeneration
from transformers.modeling_layers import MtpModel

from duplex_engine import Engine, Session

# Layers of multi-token prediction: no more than the model has, because transformers renames the
# tensors of others as if they were layers of the model.
DEPTHS = {"dense": 3, "moe": 2, "local": 2}

Change = Callable[[dict[str, Any], dict[str, NDArray[Any]]], None]


def plain(_config: dict[str, Any], _mtp: dict[str, NDArray[Any]]) -> None:
    """As `write` makes it: local, global, local."""


def chained(config: dict[str, Any], mtp: dict[str, NDArray[Any]]) -> None:
    config["mtp_config"]["chain_hidden_post_norm"] = True
    rng = np.random.default_rng(0)
    width = config["text_config"]["hidden_size"]
    mtp["model.mtp.chain_norm.weight"] = (1 + 0.3 * rng.standard_normal(width)).astype(np.float32)


def log_scaled(config: dict[str, Any], _mtp: dict[str, NDArray[Any]]) -> None:
    config["text_config"] |= {"log_scaling_n_floor": 6, "log_scaling_alpha": 0.7}


def write_both(tmp_path: Path, model: str, change: Change) -> tuple[Path, Path]:
    """The checkpoint with the layers in a file of their own, and with all in one for the oracle."""
    apart = write(tmp_path / "apart", model, interaction=False, mtp_layers=DEPTHS[model])
    config = json.loads((apart / "config.json").read_text())
    mtp = load_file(apart / "mtp.safetensors")
    change(config, mtp)
    together = tmp_path / "together"
    together.mkdir()
    for folder in (apart, together):
        (folder / "config.json").write_text(json.dumps(config))
    save_file(mtp, apart / "mtp.safetensors")
    everything = load_file(apart / "model.safetensors") | mtp
    save_file(everything, together / "model.safetensors", {"format": "pt"})
    return apart, together


@torch.no_grad()
def expected_logits(
    model: InklingForConditionalGeneration, mtp: MtpModel, parts: Sequence[oracle.Part], token: int
) -> NDArray[np.float32]:
    """The oracle's logits of each depth behind a prompt and a token: (depths, vocabulary)."""
    rows = oracle.embed(model, [*parts, ("text", [token])])
    n = len(rows) - 1
    states = model.model(inputs_embeds=rows[None, :n], use_cache=False).last_hidden_state
    by_kind = oracle.masks(model, np.ones((n, n), np.bool_))
    masks = {"hybrid": by_kind["full_attention"], "hybrid_sliding": by_kind["sliding_attention"]}
    found = []
    for depth in range(len(mtp.layers)):
        states = mtp.layers[depth](
            rows[None, depth + 1 :][:, :n],
            states,
            position_embeddings=None,
            position_ids=None,
            cache=None,
            attention_mask=masks[mtp.config.layer_types[depth]],
            conv_mask=None,
        )
        if mtp.use_shared_post_norm:
            states = mtp.shared_post_norm(states)
        found.append(mtp._project_to_logits(states[:, -1])[0])
        guess = ("text", [int(found[-1].argmax())])
        rows = torch.cat([rows, oracle.embed(model, [guess])])
    return torch.stack(found).numpy()


class Twin:
    """A session of the engine and what the oracle knows of it."""

    def __init__(self, engine: Engine, model: InklingForConditionalGeneration) -> None:
        self.session = engine.open_session(speculate=8)
        self.model, self.mtp = model, MtpModel.from_pretrained(model)
        self.mtp.eval()
        self.parts: list[oracle.Part] = []
        self.token = -1

    def append(self, prompt: Prompt) -> None:
        append(self.session, prompt)
        if self.token >= 0:
            self.parts.append(("text", [self.token]))
        self.parts += oracle_parts(self.model, prompt)
        self.token = -1

    def decode(self, n: int) -> None:
        ids = [self.token] * (self.token >= 0) + self.session.decode(n)
        self.parts.append(("text", ids[:-1]))
        self.token = ids[-1]

    def check(self) -> None:
        expected = expected_logits(self.model, self.mtp, self.parts, self.token)
        assert expected.std(axis=-1).min() > 0.3, "a flat oracle would prove nothing"
        for depth, row in enumerate(draft_logits(self.session)):
            assert relative_error(row, expected[depth]) < MAX_ERROR, depth
        assert depth + 1 == len(expected)


def draft_logits(session: Session) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = session._core.draft_logits()
    return logits


@pytest.mark.parametrize("change", [plain, chained, log_scaled])
@pytest.mark.parametrize("model", ["dense", "moe", "local"])
def test_every_depth(tmp_path: Path, model: str, change: Change) -> None:
    apart, together = write_both(tmp_path, model, change)
    with load(apart, mtp_layers=DEPTHS[model], rewind_rows=REWIND) as engine:
        twin = Twin(engine, oracle.load(together))
        twin.append([("text", words(70)), picture(17, 9), ("audio", speech()[20_000:32_000])])
        twin.decode(1)
        twin.check()
        twin.append([("text", words(5, seed=1))])  # fewer rows than a batch of the layers has
        twin.decode(1)
        twin.check()
        twin.decode(40)  # with guesses of its own, right and wrong
        twin.check()
        child, before = twin.session.fork(), (list(twin.parts), twin.token)
        twin.decode(9)
        twin.check()
        twin.session, (twin.parts, twin.token) = child, before
        twin.append([("text", words(4, seed=2))])
        twin.decode(1)
        twin.check()


def test_rewinding(tmp_path: Path) -> None:
    apart, together = write_both(tmp_path, "dense", plain)
    with load(apart, mtp_layers=3, rewind_rows=REWIND) as engine:
        twin = Twin(engine, oracle.load(together))
        twin.append([("text", words(100))])
        twin.decode(1)
        before = twin.session.length, list(twin.parts), twin.token
        for seed in range(3):
            twin.append([("text", words(9, seed=seed))])
            twin.decode(1)
            twin.check()
        length, twin.parts, twin.token = before
        twin.session.truncate(length)
        twin.check()
        twin.append([("text", words(20, seed=9))])
        twin.decode(1)
        twin.check()


@pytest.mark.parametrize("max_batch_rows", [3, 7, 64])
def test_small_passes_and_both_places(tmp_path: Path, max_batch_rows: int) -> None:
    """Rows cut into other passes have the same bits, from a file apart or from one file."""
    found = []
    for folder in write_both(tmp_path, "dense", plain):
        for rows in (256, max_batch_rows):
            with load(folder, mtp_layers=3, max_batch_rows=rows) as engine:
                session = engine.open_session(speculate=8)
                session.append(text=words(70))
                session.decode(1)
                found.append(draft_logits(session))
    assert found[0].shape == (3, 320)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
