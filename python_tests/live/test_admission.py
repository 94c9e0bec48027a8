"""Time: what a step costs, who is let in, who is told what would fit."""

from __future__ import annotations

import numpy as np
import pytest
from live_scene import Scene, sound

from duplex_engine import CapacityError, Engine, Session
from duplex_engine.live import CostModel

pytestmark = pytest.mark.core

# The smallest model: 6 passes and 10 rows a micro-turn, so 6 * 2 + n * 10 * 2 ms within 100 ms.
COST = {"pass_us": 2000, "row_us": 2000}


def test_a_session_that_could_not_be_served_in_time_is_refused(engine: Engine) -> None:
    scene = Scene(engine, cost=CostModel(**COST, learn=False))
    sessions = [scene.live.open() for _ in range(4)]
    with pytest.raises(CapacityError, match=r"5 sessions .* 112\.0 ms, .* 100 ms.* 4 would fit"):
        scene.live.open()
    assert engine.stats["sessions"] == 4  # nothing was kept of the refused one
    assert scene.live.counters["refused_time"] == 1
    token = sessions[0].detach()
    sessions.append(scene.live.open())  # one that is away needs no time
    with pytest.raises(CapacityError):
        scene.live.resume(token)
    sessions[1].close()
    assert scene.live.resume(token).attached
    for session in sessions:
        session.close()


def test_memory_is_refused_by_the_pool_with_what_would_fit(engine: Engine) -> None:
    scene = Scene(engine)
    with pytest.raises(CapacityError, match="fit"):
        scene.live.open(max_positions=10**7)
    assert scene.live.sessions == []


def test_a_forked_session_that_is_refused_is_left_as_it_is(engine: Engine) -> None:
    scene = Scene(engine, cost=CostModel(pass_us=2000, row_us=8000, learn=False))
    with scene.live.open() as session:
        scene.talk(session, 1)
        future = session.at_boundary(lambda inner: inner.fork())
        scene.run(0)
        with future.result(0) as fork:
            given: list[Session] = []
            for make in (None, given.append):
                with pytest.raises(CapacityError):
                    scene.live.adopt(fork, delegations=make)  # type: ignore[arg-type]
            assert not given  # no delegations are made for it
            assert not fork.closed


def test_the_cost_of_passes_and_rows_is_learned() -> None:
    cost = CostModel()
    rng = np.random.default_rng(0)
    for _ in range(300):
        n_passes, n_rows = int(rng.integers(1, 8)), int(rng.integers(5, 60))
        noise = 1 + 0.05 * rng.standard_normal()
        cost.observe(n_passes, n_rows, noise * (900 * n_passes + 70 * n_rows))
    assert cost.pass_us == pytest.approx(900, rel=0.1)
    assert cost.row_us == pytest.approx(70, rel=0.1)
    cost.observe(1, 5, 5e6)  # the machine slept
    assert cost.pass_us + 5 * cost.row_us < 2 * (900 + 5 * 70)


def test_steps_that_are_all_alike_are_taken_for_passes() -> None:
    cost = CostModel()
    for _ in range(20):
        cost.observe(1, 5, 1000)
    assert (cost.pass_us, cost.row_us) == (pytest.approx(1000), 0)


def test_a_real_engine_is_measured_before_the_first_session(engine: Engine) -> None:
    scene = Scene(engine, cost=None)
    assert scene.live.cost.pass_us + scene.live.cost.row_us > 0
    assert engine.stats["sessions"] == 0
    with scene.live.open() as session:
        session.push_audio(sound(0))
        before = scene.live.cost.pass_us, scene.live.cost.row_us
        scene.run(0)
        assert (scene.live.cost.pass_us, scene.live.cost.row_us) != before


def test_a_slow_hour_that_is_over_refuses_nobody(engine: Engine) -> None:
    """The last client left in the middle of it: no step has told since that it is over."""
    scene = Scene(engine, cost=None)
    with scene.live.open():
        for _ in range(500):
            scene.live.cost.observe(6, 10, 1e6)
        with pytest.raises(CapacityError):
            scene.live.open()
    with scene.live.open() as session:
        assert len(scene.talk(session, 2)) == 2
    assert engine.stats["sessions"] == 0
