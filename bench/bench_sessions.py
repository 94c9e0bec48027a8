"""Several sessions in one step: what a step costs, and how many are held at the deadline.

Every session reads 4 frames of silence and writes one token, in one pass over the weights; then how
many sessions one step holds within the 200 ms of a micro-turn. The model is the preset "small", an
interaction checkpoint, because only those step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import psutil
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from duplex_engine import Engine, Session
from duplex_engine.errors import CapacityError
from duplex_engine.models.random import write_random_checkpoint

SAMPLES = 3200
DEADLINE_MS = 200
MAX_SESSIONS = 512
POSITIONS = 1024
BATCH_ROWS = 512  # a session is promised windows for so many rows
ROUNDS = 20
SOUND = np.zeros(SAMPLES, dtype=np.float32)


@pytest.fixture(scope="module")
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """The small interaction model in the first of `--bits`."""
    bits = request.config.getoption("--bits").split(",")[0]
    options: dict[str, Any] = {} if bits == "bf16" else {"weights": bits}
    path = write_random_checkpoint(tmp_path_factory.mktemp("small"), "small", dtype="bfloat16")
    with Engine.load(
        path,
        dtype="bfloat16",
        memory=psutil.virtual_memory().available // 2,
        max_batch_rows=BATCH_ROWS,
        **options,
    ) as loaded:
        yield loaded


def step(engine: Engine, sessions: list[Session]) -> None:
    """One micro-turn of all sessions."""
    engine.step_many([(s, {"audio": SOUND, "max_tokens": 1}) for s in sessions])


@pytest.mark.parametrize("n_sessions", [1, 2, 4, 8])
def test_sessions_in_one_step(benchmark: BenchmarkFixture, engine: Engine, n_sessions: int) -> None:
    benchmark.extra_info.update(engine="duplex", shape="small", task=f"step of {n_sessions}")
    with ExitStack() as stack:
        sessions = [
            stack.enter_context(engine.open_session(max_positions=POSITIONS))
            for _ in range(n_sessions)
        ]
        pedantic: Callable[..., Any] = benchmark.pedantic
        pedantic(step, args=(engine, sessions), rounds=ROUNDS, warmup_rounds=3)


def slowest_of(engine: Engine, sessions: list[Session], n_steps: int = 5) -> float:
    """Milliseconds of the slowest of a few steps, the first of which does not count."""
    times = []
    for _ in range(1 + n_steps):
        start = time.perf_counter()
        step(engine, sessions)
        times.append(1e3 * (time.perf_counter() - start))
    return max(times[1:])


def test_sessions_held_at_the_deadline(engine: Engine, note: Callable[..., None]) -> None:
    """Doubles the sessions until a step misses the deadline, then halves the interval."""
    with ExitStack() as stack:
        sessions: list[Session] = []

        def is_held(n: int) -> bool:
            while len(sessions) < n:
                try:
                    opened = engine.open_session(max_positions=POSITIONS)
                except CapacityError:
                    return False
                sessions.append(stack.enter_context(opened))
            return slowest_of(engine, sessions[:n]) <= DEADLINE_MS

        held, missed = 0, MAX_SESSIONS + 1
        n = 8
        while n < missed and n <= MAX_SESSIONS:
            held, missed = (n, missed) if is_held(n) else (held, n)
            n = 2 * held if missed > MAX_SESSIONS else (held + missed) // 2
            if n == held:
                break
        assert held > 0, (
            f"expected a step of 8 sessions within {DEADLINE_MS} ms, found a slower one"
        )
    why = "no memory for more" if len(sessions) < missed else f"{missed} too many"
    note("sessions at the deadline", f"{DEADLINE_MS} ms", f"{held} held, {why}")
