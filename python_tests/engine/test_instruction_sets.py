"""Instruction sets that fuse products and sums give the same bits, however wide their vectors are.

Those of BF16 (`avx512`) take two products at once where rows are bfloat16, which rounds otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from random_models import HOP, instruction_sets, load, picture, sound, words, write

pytestmark = [pytest.mark.core, pytest.mark.cpu]


def run(folder: Path, isa: str, options: dict[str, Any]) -> tuple[bytes, list[Any]]:
    """Logits and memory of 220 rows, as bytes and hashes."""
    with load(folder, isa=isa, **options) as engine, engine.open_session() as session:
        logits = [
            session.append(text=words(150), logits="all"),
            session.append(image=picture(20, 30), logits="all"),
            session.append(audio=sound(58 * HOP), logits="all"),
        ]
        return b"".join(rows.tobytes() for rows in logits), session._core.digests()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "weights": "int8", "kv_dtype": "int8"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "weights": "int8"},
        {"dtype": "bfloat16", "weights": "int4", "kv_dtype": "int8"},
    ],
    ids=lambda options: " ".join(options.values()),
)
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_they_agree(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, model)
    others = {"portable"} | ({"avx512"} if options["dtype"] == "bfloat16" else set())
    alike = [isa for isa in instruction_sets(folder) if isa not in others]
    if len(alike) < 2:
        pytest.skip(f"this machine has of those that agree {alike} alone")
    expected = run(folder, alike[0], options)
    for isa in alike[1:]:
        assert run(folder, isa, options) == expected, isa
