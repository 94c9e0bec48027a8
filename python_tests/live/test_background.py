"""Work between turns: slices in the gaps, bounds both ways, failures that stay where they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from live_scene import Scene, drain, sound, tokens

from duplex_engine import CapacityError, Engine, InvalidArgument
from duplex_engine.live import BackgroundFailed
from duplex_engine.live.background import MAX_TASKS_PER_SESSION, Slices

pytestmark = pytest.mark.core


def work(scene: Scene, slice_us: int, n: int, done: list[int]) -> Slices:
    for i in range(n):
        scene.now_us += slice_us
        done.append(scene.now_us)
        yield
        assert i < n


def test_slices_fill_the_gaps_and_turns_are_on_time(engine: Engine) -> None:
    scene = Scene(engine, step_us=10_000)
    done: list[int] = []
    with scene.live.open() as session:
        scene.talk(session, 2)
        scene.live.background(session, work(scene, 5_000, 10_000, done))
        scene.run(200)
        drain(session)
        done.clear()
        # note: sound comes when the test pushes it, so the driver knows nothing better than 200 ms.
        out = scene.talk(session, 10, seed=1)
        n_turns_us = 10 * 10_000
        assert len(done) * 5_000 >= 0.8 * (10 * 200_000 - n_turns_us)
        assert max(o.late_us for o in out) <= 5_000
    scene.live.poll()
    assert len(scene.live._background) == 0


def test_a_slice_that_fits_no_gap_runs_once_a_second(engine: Engine) -> None:
    scene = Scene(engine)
    done: list[int] = []
    with scene.live.open() as session:
        scene.talk(session, 1)
        scene.live.background(session, work(scene, 300_000, 1000, done))
        for n in range(50):
            session.push_audio(sound(n))
            scene.run(200)
        seconds = 50 * 0.2
        assert seconds / 1.5 - 1 <= len(done) <= seconds + 1
        out = drain(session)
        assert sum(o.turn.input.merged_turns + 1 for o in out) >= 50
        assert tokens(out) == scene.tokens_again(session.id)[1:]


def test_tasks_take_turns_oldest_first(engine: Engine) -> None:
    scene = Scene(engine)
    order: list[str] = []

    def named(name: str) -> Slices:
        for _ in range(3):
            order.append(name)
            scene.now_us += 60_000
            yield

    with scene.live.open() as session:
        scene.live.background(session, named("a"))
        scene.live.background(session, named("b"))
        scene.run(1500)
        assert order[:4] == ["a", "b", "a", "b"]
        assert sorted(order) == ["a"] * 3 + ["b"] * 3


def test_a_task_that_fails_harms_nobody(engine: Engine) -> None:
    scene = Scene(engine)

    def fails() -> Slices:
        yield
        raise OSError("no such tool")

    with scene.live.open() as session, scene.live.open() as other:
        scene.live.background(session, fails())
        for n in range(3):
            session.push_audio(sound(n))
            other.push_audio(sound(n))
            scene.run(200)
        out = drain(session)
        events = [event for o in out for event in o.events]
        assert events == [BackgroundFailed("OSError: no such tool")]
        assert tokens(out) == tokens(drain(other)) == scene.tokens_again(other.id)
        assert scene.live.counters["background_failed"] == 1


def refuses_once() -> Slices:
    try:
        while True:
            yield
    except GeneratorExit:
        yield


def fails_to_clean_up() -> Slices:
    try:
        while True:
            yield
    finally:
        raise OSError("the tool's file cannot be closed")


@pytest.mark.parametrize("task", [refuses_once, fails_to_clean_up])
def test_a_task_that_does_not_end_well_harms_nobody(
    engine: Engine, task: Callable[[], Slices]
) -> None:
    scene = Scene(engine)
    session, other = scene.live.open(), scene.live.open()
    scene.live.background(session, task())
    scene.live.poll()
    session.close()
    assert len(scene.talk(other, 2)) == 2
    assert scene.live.counters["background_failed"] == 1
    scene.live.background(other, task())
    scene.live.poll()
    scene.live.close()
    assert scene.live.counters["background_failed"] == 2
    assert len(scene.live._background) == 0


def test_only_a_generator_of_a_live_session_is_a_task(engine: Engine) -> None:
    scene, elsewhere = Scene(engine), Scene(engine)
    with scene.live.open() as session, elsewhere.live.open() as strange:
        for wrong in (None, [1], iter([None]), refuses_once):
            with pytest.raises(InvalidArgument, match="background: expected a generator, found"):
                scene.live.background(session, wrong)  # type: ignore[arg-type]
        for owner in (3, None, strange):
            with pytest.raises(InvalidArgument, match="expected a session of this live engine"):
                scene.live.background(owner, work(scene, 1, 1, []))  # type: ignore[arg-type]
        assert len(scene.live._background) == 0


def test_a_session_has_a_few_tasks_and_takes_them_with_it(engine: Engine) -> None:
    scene = Scene(engine)
    ended: list[int] = []

    def waits(n: int) -> Slices:
        try:
            while True:
                scene.now_us += 1000
                yield
        finally:
            ended.append(n)

    session = scene.live.open()
    for n in range(MAX_TASKS_PER_SESSION):
        scene.live.background(session, waits(n))
    with pytest.raises(CapacityError, match="tasks of a session"):
        scene.live.background(session, waits(9))
    scene.run(20)
    session.close()
    scene.live.poll()
    assert sorted(ended) == list(range(MAX_TASKS_PER_SESSION))
