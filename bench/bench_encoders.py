"""What it costs to turn sound and pictures into rows: dMel of a chunk, hMLP of a picture.

Encoders have no entry of their own in Python, so each is measured inside an `append`, and the same
number of text rows beside it: the difference is the encoder. The model is one layer thin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.shapes import M, Shape
from duplex_engine import Engine, Session

SAMPLES = 3200  # of a micro-turn: four frames
ROUNDS = 50
THIN = Shape("THIN", replace(M.preset, vocab_size=4096, layers="gd", d_ff=64))
PICTURES = {"80x80": (80, 80), "320x240": (240, 320)}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """An empty session of the thin model."""
    path = THIN.checkpoint(tmp_path_factory.mktemp("models"))
    with Engine.load(path, dtype="bfloat16") as engine, engine.open_session() as opened:
        opened.append(text=[300])
        yield opened


def run(benchmark: BenchmarkFixture, session: Session, task: str, **inputs: Any) -> None:
    """Measures an append of the inputs, always from one row."""
    benchmark.extra_info.update(engine="duplex", shape=THIN.name, bits="bf16", task=task)
    pedantic: Callable[..., Any] = benchmark.pedantic
    pedantic(
        session.append,
        kwargs=inputs,
        setup=lambda: session.truncate(1),
        rounds=ROUNDS,
        warmup_rounds=3,
    )


def test_sound_of_one_micro_turn(benchmark: BenchmarkFixture, session: Session) -> None:
    sound = np.random.default_rng(0).normal(0, 0.1, SAMPLES).astype(np.float32)
    run(benchmark, session, "dMel, 200 ms", audio=sound)


def test_text_of_as_many_rows(benchmark: BenchmarkFixture, session: Session) -> None:
    run(benchmark, session, "4 rows of text", text=[300, 301, 302, 303])


@pytest.mark.parametrize("size", PICTURES)
def test_picture(benchmark: BenchmarkFixture, session: Session, size: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*PICTURES[size], 3), dtype=np.uint8)
    run(benchmark, session, f"hMLP, {size}", image=pixels)


@pytest.mark.parametrize("size", PICTURES)
def test_text_of_as_many_rows_as_patches(
    benchmark: BenchmarkFixture, session: Session, size: str
) -> None:
    height, width = PICTURES[size]
    n_patches = -(-height // 40) * (width // 40 + 1)
    run(benchmark, session, f"{n_patches} rows of text", text=[300] * n_patches)
