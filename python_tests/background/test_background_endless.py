"""Results and forks of sessions that are older than what they hold."""

from __future__ import annotations

from typing import Any

import pytest
from delegating import SILENCE, Stream

from duplex_engine import Engine, Session, Window
from duplex_engine.background import Delegations, ForkWorker
from duplex_engine.background.positions import fork_limit

pytestmark = pytest.mark.usefixtures("nothing_is_left")

WINDOWS: list[Any] = ["auto", Window(100, 450)]


def old_session(engine: Engine, endless: Any = "auto") -> Session:
    """One that has lived for three times what it holds."""
    session = engine.open_session(max_positions=1024, endless=endless)
    while session.length < 3000:
        session.append(text=[300 + session.length % 50] * 200)
    session.step(SILENCE)
    assert session.forgotten
    return session


@pytest.mark.parametrize("endless", WINDOWS, ids=["auto", "window"])
def test_a_result_enters_an_old_session(tiny: Engine, endless: Any) -> None:
    with (
        old_session(tiny, endless) as session,
        Delegations(session, lambda _: "a b c d " * 100, max_result_tokens=64) as background,
    ):
        stream = Stream(session, background)
        for _ in range(10):  # also where it has just not forgotten yet
            stream.step("weather")
            assert background.wait(10)
            turn = stream.step()
            job = background.jobs[-1]
            assert (job.entered, "no room" in job.error) == ((turn.index,), False)


def test_what_was_forgotten_by_hand_is_room(tiny: Engine) -> None:
    with (
        tiny.open_session(max_positions=1024, endless=None) as session,
        Delegations(session, lambda _: "a b c d") as background,
    ):
        session.append(text=[300] * 1000)
        assert background._jobs._results.room() == 0
        begin, end = session.forget(0, 640)
        assert 0 < background._jobs._results.room() < end - begin


def test_a_model_without_global_layers_has_room_for_ever(reference: Engine) -> None:
    for endless in ("auto", None):
        with (
            reference.open_session(max_positions=512, endless=endless) as session,
            Delegations(session, lambda _: "sunny") as background,
        ):
            for _ in range(3):
                session.append(text=[20] * 300)
            stream = Stream(session, background)
            stream.step("weather")
            assert background.wait(10)
            stream.step()
            assert stream.told == [(1, "sunny")]


@pytest.mark.parametrize("endless", WINDOWS, ids=["auto", "window"])
def test_a_fork_of_an_old_session_is_no_dearer_and_sees_as_much(tiny: Engine, endless: Any) -> None:
    seen: list[list[tuple[int, int]]] = []

    class Fork(ForkWorker):
        def __call__(self, task: Any) -> Any:
            seen.append(task.session.forgotten)
            task.session.append(text=[300])
            seen.append(task.session.forgotten)
            return "ba"

    with old_session(tiny, endless) as session:
        before = tiny.stats["pages_promised"]
        with session.fork(background=True):
            whole = tiny.stats["pages_promised"] - before
        assert session.length > 2 * session.max_positions
        with Delegations(session, Fork("hi", fork_positions=64)) as background:
            background.ask("weather")
            promised = tiny.stats["pages_promised"] - before
            assert background.wait(10)
            assert background.jobs[0].state == "done", background.jobs[0].error
        assert promised <= whole
        assert seen[1] == seen[0] == session.forgotten


@pytest.mark.parametrize("window", [Window(100, 600), Window(128, 512)])  # the automatic one's too
def test_a_young_session_with_a_large_window_is_forked(tiny: Engine, window: Window) -> None:
    with (
        tiny.open_session(max_positions=1024, endless=window) as session,
        Delegations(session, ForkWorker("hi", fork_positions=64, max_tokens=2)) as background,
    ):
        session.step(SILENCE)
        background.ask("weather")
        assert background.wait(10)
        assert background.jobs[0].error == ""


@pytest.mark.parametrize(
    ("options", "hole", "n", "limit"),
    [
        ({"endless": None}, None, 500, 564),
        ({"endless": None}, (0, 1280), 2000, 2064),
        ({}, None, 500, 564),
        ({}, (0, 1280), 2000, 2048),  # as after a summary
        ({}, (0, 640), 5000, 4424),
        ({}, (1280, 1792), 2000, 2064),
        ({}, None, 9000, 8192),
        ({"endless": Window(100, 1000)}, None, 9000, 2216),
        ({"endless": Window(100, 1000)}, None, 500, 1292),
    ],
)
def test_what_a_fork_pays_for(
    tiny: Engine, options: Any, hole: tuple[int, int] | None, n: int, limit: int
) -> None:
    with tiny.open_session(max_positions=8192, **options) as session:
        while session.length < n:
            session.append(text=[300] * min(n - session.length, 500))
        if hole is not None:
            session.forget(*hole)
        found = fork_limit(session, 64)
        assert found == limit
        with session.fork(found, background=True) as fork:
            fork.append(text=[300] * 64)
            assert fork.forgotten == session.forgotten
