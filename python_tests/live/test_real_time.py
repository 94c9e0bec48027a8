"""The driver in its thread, by the real clock: readers of every kind, and the background lane.

Not marked `core`: under AddressSanitizer nothing is as fast as these clocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import pytest
from live_scene import sound

from duplex_engine import Engine, Session, SessionClosed
from duplex_engine.live import CostModel, LiveEngine, LiveTurn, Summarised, Summary
from duplex_engine.live.background import Slices


@pytest.fixture
def live(engine: Engine) -> Iterator[LiveEngine]:
    with LiveEngine(engine, cost=CostModel(learn=False)) as live:
        yield live


def test_readers_of_every_kind_get_the_same(engine: Engine, live: LiveEngine) -> None:
    with engine.open_session() as offline:
        expected = [offline.step(sound(n)).token_ids for n in range(4)]
    called: list[LiveTurn] = []
    with live.open() as one, live.open() as two, live.open() as three:
        thread = three.on_turn(called.append)

        async def read() -> list[tuple[int, ...]]:
            turns = []
            async for out in two:
                turns.append(out.turn.token_ids)
                if len(turns) == 4:
                    break
            return turns

        def push() -> None:
            for n in range(4):
                for session in (one, two, three):
                    session.push_audio(sound(n))
                # the next is pushed when all have answered, so that no turns are merged
                while min(len(called), len(seen)) <= n:
                    time.sleep(0.001)

        seen: list[tuple[int, ...]] = []
        pusher = threading.Thread(target=push)
        pusher.start()
        for out in one:
            seen.append(out.turn.token_ids)
            if len(seen) == 4:
                break
        assert asyncio.run(read()) == expected
        pusher.join()
        assert seen == expected
    thread.join(5)
    assert [out.turn.token_ids for out in called] == expected


def test_an_awaiting_reader_ends_with_its_session(live: LiveEngine) -> None:
    session = live.open()

    async def read() -> int:
        asyncio.get_running_loop().call_later(0.05, session.close)
        n = 0
        async for _ in session:
            n += 1
        return n

    assert asyncio.run(asyncio.wait_for(read(), 10)) == 0


def test_a_reader_that_is_cancelled_leaves_nothing_behind(live: LiveEngine) -> None:
    async def read() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(session.get_async(), 0.01)

    with live.open() as session:
        asyncio.run(read())
        assert session._outbox._waiters == []


def test_a_reader_whose_loop_is_closed_harms_nobody(live: LiveEngine) -> None:
    with live.open() as session:
        loop = asyncio.new_event_loop()
        loop.close()
        session._outbox._waiters.append((loop, asyncio.Event()))
        session.push_audio(sound(0))
        assert session.get(5) is not None
    assert live.error is None


def test_slices_run_in_the_background_and_turns_go_on(live: LiveEngine) -> None:
    threads: set[str] = set()
    stop = threading.Event()

    def slices(fork: Session) -> Slices:
        with fork:
            while not stop.is_set():
                threads.add(threading.current_thread().name)
                fork.decode(1)
                fork.truncate(length)
                yield

    with live.open() as session:
        session.push_audio(sound(0))
        assert session.get(5) is not None
        fork = session.at_boundary(lambda inner: inner.fork(background=True)).result(5)
        length = fork.length
        live.background(session, slices(fork), gives_way=True)
        for n in range(1, 4):
            session.push_audio(sound(n))
            assert session.get(5) is not None
        stop.set()
    live.close()  # waits for the slice at work
    assert threads == {"duplex_background_0"}
    assert live.counters["background_failed"] == 0
    assert live.counters["background_us"] > 0


def test_a_session_that_ends_during_a_slice(live: LiveEngine) -> None:
    at_work, go_on = threading.Event(), threading.Event()

    def slices() -> Slices:
        at_work.set()
        go_on.wait(10)
        yield
        raise AssertionError("it has ended")

    with live.open() as other:
        session = live.open()
        live.background(session, slices())
        assert at_work.wait(5)
        session.close()
        other.push_audio(sound(0))
        assert other.get(5) is not None  # the driver goes on, and asks for no second slice
        worker = live._background._worker._pool
        assert worker is not None
        assert worker._work_queue.qsize() == 0
        go_on.set()
        other.push_audio(sound(1))
        assert other.get(5) is not None
    assert live.error is None
    assert live.counters["background_failed"] == 0


def test_a_summary_is_written_beside_the_turns(engine: Engine) -> None:
    policy = Summary(at=480, prompt=[300, 301], max_tokens=4)
    clock = lambda: 200 * time.monotonic()  # noqa: E731  sound may come 200 times as fast
    with (
        LiveEngine(engine, clock=clock, cost=CostModel(learn=False)) as live,
        live.open(summary=policy) as session,
    ):
        events = []
        for n in range(400):
            session.push_audio(sound(n))
            out = session.get(5)
            assert out is not None
            events += [event for event in out.events if isinstance(event, Summarised)]
            if len(events) == 2:
                break
            time.sleep(0.0005)
        assert len(events) == 2


def test_a_driver_that_fails_ends_its_sessions(engine: Engine) -> None:
    def broken(_: int) -> NoReturn:
        raise RuntimeError("the scheduler is broken")

    with LiveEngine(engine, cost=CostModel(learn=False)) as live:
        session = live.open()
        live._next_action = broken  # type: ignore[method-assign]
        with contextlib.suppress(SessionClosed):  # the driver may have looked before
            session.push_audio(sound(0))
        assert session.get(5) is None
        assert session.ended == "error"
        assert str(session.error) == str(live.error) == "the scheduler is broken"
        with pytest.raises(SessionClosed):
            live.open()
