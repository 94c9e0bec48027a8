"""Forgotten ranges against transformers with the same attention mask."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray
from parity import (
    MAX_ERROR,
    OracleCheckpoint,
    Prompt,
    append,
    assert_greedy,
    load,
    oracle_parts,
    picture,
    relative_error,
    speech,
    text,
)

BLOCK = 64  # positions; what is forgotten is rounded inward to these


def visible(n: int, forgotten: list[tuple[int, int, int]]) -> NDArray[np.bool_]:
    """(n, n) mask: rows from `at` on do not see rows begin <= j < end, per (at, begin, end)."""
    mask = np.ones((n, n), bool)
    for at, begin, end in forgotten:
        mask[at:, begin:end] = False
    return mask


@pytest.mark.parametrize(
    "name", ["dense_global", "moe_mixed", "log_scaling", "short_extent", "long_extent"]
)
def test_logits_after_forgetting(name: str, oracle_checkpoint: OracleCheckpoint) -> None:
    folder, model = oracle_checkpoint(name)
    sound = ("audio", speech()[30_000:40_000])
    steps: list[tuple[Prompt, tuple[int, int], tuple[int, int]]] = [
        # what is appended, then what is asked to be forgotten, then what that is in whole blocks
        ([text(model, 300, 1), picture(20, 30), sound], (60, 150), (64, 128)),
        ([text(model, 150, 2), picture(9, 9)], (200, 330), (256, 320)),
        ([text(model, 50, 3)], (128, 256), (128, 256)),  # joins the two
        ([text(model, 20, 4)], (1, 63), (64, 64)),  # less than a block: nothing
    ]
    rows: list[NDArray[np.float32]] = []
    forgotten: list[tuple[int, int, int]] = []
    with load(folder) as engine, engine.open_session() as session:
        for prompt, asked, hidden in steps:
            rows.append(append(session, prompt))
            assert session.forget(*asked) == hidden
            forgotten.append((session.length, *hidden))
        tokens = session.decode(BLOCK)
    found = np.concatenate(rows)
    parts = [*oracle_parts(model, [part for prompt, _, _ in steps for part in prompt])]
    parts.append(("text", tokens))
    expected = oracle.logits(model, parts, visible(len(found) + len(tokens), forgotten))
    assert relative_error(found, expected[: len(found)]) < MAX_ERROR
    assert_greedy(tokens, expected[len(found) - 1 : -1])
    kept, at = oracle.logits(model, parts), forgotten[0][0]
    assert relative_error(expected[at:], kept[at:]) > 1e-3, "what was forgotten must matter"


@pytest.mark.parametrize("name", ["dense_local", "moe_local"])
def test_sliding_windows_never_saw_what_was_forgotten(
    name: str, oracle_checkpoint: OracleCheckpoint
) -> None:
    folder, model = oracle_checkpoint(name)
    prompt = [text(model, 300, 1), text(model, 100, 2)]
    with load(folder) as engine, engine.open_session() as session:
        found = [append(session, prompt[:1])]
        assert session.forget(0, 3 * BLOCK) == (0, 3 * BLOCK)
        found.append(append(session, prompt[1:]))
    expected = oracle.logits(model, oracle_parts(model, prompt))
    assert relative_error(np.concatenate(found), expected) < MAX_ERROR
