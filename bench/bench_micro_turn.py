"""What a micro-turn costs: small appends, decode steps and whole turns, at several contexts.

Run with `make bench`. The model has random weights in the shape of FACTS' "S" (d 512, 8 layers of
which 2 global, 8/4 heads of 64, MLP 1408, vocabulary 4096): time does not depend on the values.
Compare figures of one run only; the machines are shared.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from duplex_engine import Engine, Session
from duplex_engine.models.random import write_random_checkpoint

CONTEXTS = [1024, 4096]
ROUNDS = 30


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """The small model in one dtype."""
    path = write_random_checkpoint(tmp_path_factory.mktemp("small"), "small")
    with Engine.load(path, dtype=request.param, memory="2GiB") as loaded:
        yield loaded


def ids(n: int, seed: int = 0) -> list[int]:
    """n token ids of the small vocabulary."""
    return np.random.default_rng(seed).integers(0, 4096, n).tolist()


def session_at(engine: Engine, context: int) -> Session:
    """A session that has read `context` rows."""
    session = engine.open_session()
    session.append(text=ids(context))
    return session


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("n_rows", [1, 5, 20])
def test_append(benchmark: BenchmarkFixture, engine: Engine, context: int, n_rows: int) -> None:
    with session_at(engine, context) as session:
        benchmark.pedantic(
            session.append, kwargs={"text": ids(n_rows)}, rounds=ROUNDS, warmup_rounds=3
        )


@pytest.mark.parametrize("context", CONTEXTS)
def test_turn_of_20_rows_and_5_tokens(
    benchmark: BenchmarkFixture, engine: Engine, context: int
) -> None:
    rows = ids(20)
    with session_at(engine, context) as session:

        def turn() -> None:
            session.append(text=rows)
            session.decode(5)

        benchmark.pedantic(turn, rounds=ROUNDS, warmup_rounds=3)


def test_silent_micro_turn(benchmark: BenchmarkFixture, engine: Engine) -> None:
    sound = np.zeros(3200, dtype=np.float32)
    with engine.open_session() as session:
        benchmark.pedantic(
            session.step, kwargs={"audio": sound, "max_tokens": 1}, rounds=ROUNDS, warmup_rounds=3
        )


@pytest.mark.parametrize("n_sessions", [1, 2, 4, 8])
def test_sessions_in_one_step(benchmark: BenchmarkFixture, engine: Engine, n_sessions: int) -> None:
    sessions = [engine.open_session(max_positions=4096) for _ in range(n_sessions)]
    sound = np.zeros(3200, dtype=np.float32)

    def step() -> None:
        engine.step_many([(s, {"audio": sound, "max_tokens": 1}) for s in sessions])

    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=3)
    for session in sessions:
        session.close()
