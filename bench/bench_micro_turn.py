"""What a micro-turn costs: appends, decode steps and whole turns, at several contexts.

Every measurement begins at the same context: the session is cut back before it, untimed. Compare
figures of one run only; machines are shared. `extra_info` holds what `compare.py` goes by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import GETTER
from bench.shapes import Shape
from duplex_engine import Session

ROUNDS = {"S": 30}
ROUNDS_OF_LARGE = 9
SPARE_ROWS = 64

pytestmark = pytest.mark.timeout(900)  # a long context takes minutes to read


def ids(n: int, seed: int = 0) -> list[int]:
    """n token ids that every vocabulary has."""
    drawn: list[int] = np.random.default_rng(seed).integers(300, 4096, n).tolist()
    return drawn


@pytest.fixture(scope="module")
def session(get_engine: GETTER, shape: Shape, bits: str, context: int) -> Iterator[Session]:
    """A session that has read `context` rows."""
    engine = get_engine(shape, bits, context + SPARE_ROWS)
    with engine.open_session() as opened:
        opened.append(text=ids(context))
        yield opened


def run(
    benchmark: BenchmarkFixture,
    session: Session,
    task: str,
    case: tuple[Shape, str, int],
    work: Callable[[], Any],
    *,
    is_mid_turn: bool,
) -> None:
    """Measures `work` from the context; mid-turn a newest token waits to be fed."""
    shape, bits, context = case
    benchmark.extra_info.update(
        engine="duplex", shape=shape.name, bits=bits, context=context, task=task
    )

    def cut_back() -> None:
        session.truncate(context)
        if is_mid_turn:
            session.decode(1)

    rounds = ROUNDS.get(shape.name, ROUNDS_OF_LARGE)
    pedantic: Callable[..., Any] = benchmark.pedantic
    pedantic(work, setup=cut_back, rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("n_rows", [5, 20])
def test_append(
    benchmark: BenchmarkFixture,
    session: Session,
    shape: Shape,
    bits: str,
    context: int,
    n_rows: int,
) -> None:
    rows = ids(n_rows)
    case = (shape, bits, context)
    run(
        benchmark,
        session,
        f"append {n_rows}",
        case,
        lambda: session.append(text=rows, logits="last"),
        is_mid_turn=False,
    )


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_decode(
    benchmark: BenchmarkFixture,
    session: Session,
    shape: Shape,
    bits: str,
    context: int,
    n_tokens: int,
) -> None:
    case = (shape, bits, context)
    run(
        benchmark,
        session,
        f"decode {n_tokens}",
        case,
        lambda: session.decode(n_tokens),
        is_mid_turn=True,
    )


def test_turn(
    benchmark: BenchmarkFixture, session: Session, shape: Shape, bits: str, context: int
) -> None:
    rows = ids(20)

    def turn() -> None:
        session.append(text=rows)
        session.decode(5)

    run(benchmark, session, "turn 20+5", (shape, bits, context), turn, is_mid_turn=True)
