"""The engine for asyncio: steps that wait together run together, and nothing else is shared."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from duplex_engine import (
    AsyncEngine,
    AsyncSession,
    CapacityError,
    Engine,
    InvalidArgument,
    MicroTurn,
    SessionBusy,
    SessionClosed,
)
from duplex_engine.models import write_random_checkpoint

pytestmark = pytest.mark.core

TURN = 3200  # samples of a micro-turn
N_TURNS = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=2)


def sound(seed: int) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(TURN).astype(np.float32) * 0.1 for _ in range(N_TURNS)]


class Passes:
    """Counts the sessions of each `step_many`, and can hold it up."""

    def __init__(self, engine: Engine) -> None:
        self.sizes: list[int] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self._step_many = engine.step_many
        engine.step_many = self  # type: ignore[method-assign, assignment]

    def __call__(self, requests: Any) -> Any:
        self.sizes.append(len(requests))
        self.begun.set()
        assert self.go_on.wait(30)
        return self._step_many(requests)


@asynccontextmanager
async def opened(checkpoint: Path) -> AsyncIterator[AsyncEngine]:
    async with await AsyncEngine.load(checkpoint, memory="128MiB", threads=1) as engine:
        yield engine


def with_engine(checkpoint: Path, test: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        async with opened(checkpoint) as engine:
            await test(engine)

    asyncio.run(main())


def test_sessions_that_wait_together_step_together(checkpoint: Path) -> None:
    expected: list[list[tuple[int, ...]]] = []
    with Engine.load(checkpoint, memory="64MiB", threads=1) as engine:
        for seed in range(3):
            with engine.open_session() as session:
                expected.append([session.step(piece).token_ids for piece in sound(seed)])

    async def test(engine: AsyncEngine) -> None:
        passes = Passes(engine.engine)

        async def talk(seed: int) -> list[tuple[int, ...]]:
            async with await engine.open_session() as session:
                return [(await session.step(piece)).token_ids for piece in sound(seed)]

        assert await asyncio.gather(*(talk(seed) for seed in range(3))) == expected
        assert sum(passes.sizes) == 3 * N_TURNS
        assert max(passes.sizes) == 3

    with_engine(checkpoint, test)


def test_an_error_reaches_its_caller_only(checkpoint: Path) -> None:
    async def test(engine: AsyncEngine) -> None:
        good, bad = await engine.open_session(), await engine.open_session()
        full = await engine.open_session(max_positions=8)
        answers = await asyncio.gather(
            good.step(sound(0)[0]),
            bad.step(sound(0)[0], text=[10**6]),
            full.step(sound(0)[0], text=[100] * 50),
            return_exceptions=True,
        )
        assert isinstance(answers[0], MicroTurn)
        assert isinstance(answers[1], InvalidArgument)
        assert isinstance(answers[2], CapacityError)
        assert isinstance(await bad.step(sound(0)[0]), MicroTurn)

    with_engine(checkpoint, test)


def test_cancelled_steps(checkpoint: Path) -> None:
    async def test(engine: AsyncEngine) -> None:
        session = await engine.open_session()
        piece = sound(0)[0]
        # Cancelled before its pass: nothing was fed, nothing happens.
        task = asyncio.create_task(session.step(piece))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        turn = await session.step(piece)
        assert (turn.index, turn.input.merged_turns) == (0, 0)
        # Cancelled at any time: the session goes on, and the others do not notice.
        other = await engine.open_session()
        for delay_s in (0, 0.0005, 0.002, 0.005):
            task = asyncio.create_task(session.step(piece))
            kept = asyncio.create_task(other.step(piece))
            await asyncio.sleep(delay_s)
            task.cancel()
            assert isinstance(await kept, MicroTurn)
            assert isinstance(await session.step(piece), MicroTurn)

    with_engine(checkpoint, test)


def test_a_step_cancelled_behind_another_call(checkpoint: Path) -> None:
    async def test(engine: AsyncEngine) -> None:
        session = await engine.open_session()
        piece = sound(0)[0]
        go_on = threading.Event()
        held = asyncio.create_task(engine.run(go_on.wait, 30))
        task = asyncio.create_task(session.step(piece))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        assert await held
        turn = await session.step(piece)
        assert (turn.index, turn.input.merged_turns) == (0, 0)

    with_engine(checkpoint, test)


def test_calls_of_background_sessions_wait_for_each_other(checkpoint: Path, tmp_path: Path) -> None:
    """Also those that read the whole session; no step of another session waits for them."""

    async def test(engine: AsyncEngine) -> None:
        session = await engine.open_session(background=True)
        other = await engine.open_session()
        begun, go_on = threading.Event(), threading.Event()

        def work() -> None:
            with session.sync._exclusive:
                begun.set()
                assert go_on.wait(30)

        held = asyncio.create_task(engine.run_background(work))
        assert await asyncio.to_thread(begun.wait, 30)
        written = asyncio.create_task(session.snapshot(tmp_path / "a"))
        moved = asyncio.create_task(session.migrate(engine))
        await other.step(sound(0)[0])
        assert not written.done()
        go_on.set()
        await asyncio.gather(held, written)
        assert isinstance(await (await moved).step(sound(0)[0]), MicroTurn)

    with_engine(checkpoint, test)


def test_what_is_no_engine_no_session_and_no_call(checkpoint: Path) -> None:
    async def test(engine: AsyncEngine) -> None:
        session = await engine.open_session()
        with pytest.raises(InvalidArgument, match="migrate: expected an AsyncEngine, found"):
            await session.migrate(engine.engine)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="migrate: expected an Engine, found"):
            session.sync.migrate(engine)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="AsyncEngine: expected an Engine, found"):
            AsyncEngine("reference")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match=r"step: expected a Session, as .*, found <"):
            await engine.step(session, {})  # type: ignore[arg-type]
        for run in (engine.run, engine.run_background):
            with pytest.raises(InvalidArgument, match="run: expected a callable, found 4"):
                await run(4)  # type: ignore[arg-type]
        await session.step(sound(0)[0])

    with_engine(checkpoint, test)


def test_one_step_of_a_session_waits(checkpoint: Path) -> None:
    async def test(engine: AsyncEngine) -> None:
        session = await engine.open_session()
        first = asyncio.create_task(session.step(sound(0)[0]))
        await asyncio.sleep(0)
        with pytest.raises(SessionBusy):
            await session.step(sound(0)[0])
        assert isinstance(await first, MicroTurn)

    with_engine(checkpoint, test)


def test_the_other_calls(checkpoint: Path) -> None:
    async def test(engine: AsyncEngine) -> None:
        async with await engine.open_session() as session:
            session.feed(sound(0)[0])
            await session.step()
            length = session.length
            fork = await session.fork()
            await fork.step(sound(1)[0])
            await session.step(sound(2)[0])
            await session.truncate(length)
            assert session.length == length
            logits = await engine.run(session.sync.append, text=[5], logits="last")
            assert logits is not None
            await engine.run(session.sync.append, text=list(range(200, 600)))
            begin, end = await session.forget(0, 150)
            assert end - begin >= 64
            await fork.close()
        assert session.sync.closed
        await session.close()

    with_engine(checkpoint, test)


def test_closing_refuses_what_waits(checkpoint: Path) -> None:
    async def main() -> None:
        engine = await AsyncEngine.load(checkpoint, memory="128MiB", threads=1)
        sessions: list[AsyncSession] = [await engine.open_session() for _ in range(3)]
        tasks = [asyncio.create_task(s.step(sound(0)[0])) for s in sessions]
        await asyncio.sleep(0)
        await engine.close()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(answer, MicroTurn | SessionClosed)
        with pytest.raises(SessionClosed):
            await sessions[0].step(sound(0)[0])
        with pytest.raises(SessionClosed):
            await engine.open_session()
        await sessions[0].close()
        await engine.close()
        assert engine.closed

    asyncio.run(main())


def test_an_engine_that_was_never_used_closes(checkpoint: Path) -> None:
    async def test(engine: AsyncEngine) -> None:
        assert not engine.closed

    with_engine(checkpoint, test)


def test_closing_goes_on_when_its_caller_is_cancelled(checkpoint: Path) -> None:
    async def main() -> None:
        engine = await AsyncEngine.load(checkpoint, memory="128MiB", threads=1)
        passes = Passes(engine.engine)
        passes.go_on.clear()
        session, late = await engine.open_session(), await engine.open_session()
        step = asyncio.create_task(session.step(sound(0)[0]))
        assert await asyncio.to_thread(passes.begun.wait, 30)
        waiting = asyncio.create_task(late.step(sound(0)[0]))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.close(), 0.01)
        again = asyncio.create_task(engine.close())
        await asyncio.sleep(0.01)
        assert not again.done()  # the engine is not closed yet
        passes.go_on.set()
        await asyncio.wait_for(again, 30)
        assert step.done()
        assert isinstance(step.result(), MicroTurn)
        with pytest.raises(SessionClosed):
            await asyncio.wait_for(waiting, 30)
        with pytest.raises(SessionClosed):
            engine.engine.open_session()

    asyncio.run(main())


def test_steps_belong_to_one_event_loop(checkpoint: Path) -> None:
    engine = AsyncEngine(Engine.load(checkpoint, memory="128MiB", threads=1))

    async def one() -> MicroTurn:
        async with await engine.open_session() as session:
            return await asyncio.wait_for(session.step(sound(0)[0]), 30)

    with asyncio.Runner() as first:
        assert isinstance(first.run(one()), MicroTurn)
        with asyncio.Runner() as second:
            for call in (one, engine.close):
                with pytest.raises(InvalidArgument, match=r"found another; .*one asyncio\.run"):
                    second.run(call())
        assert not engine.closed
    # What waited is gone with its loop: any other can close the engine.
    for _ in range(2):
        asyncio.run(asyncio.wait_for(engine.close(), 30))
    with pytest.raises(SessionClosed):
        engine.engine.open_session()


def test_nobody_waits_for_a_dispatcher_that_was_cancelled(checkpoint: Path) -> None:
    async def test(engine: AsyncEngine) -> None:
        passes = Passes(engine.engine)
        passes.go_on.clear()
        sessions = [await engine.open_session() for _ in range(2)]
        step = asyncio.create_task(sessions[0].step(sound(0)[0]))
        assert await asyncio.to_thread(passes.begun.wait, 30)
        waiting = asyncio.create_task(sessions[1].step(sound(0)[0]))
        await asyncio.sleep(0)
        assert engine._dispatcher is not None
        engine._dispatcher.cancel()
        for task in (step, waiting):
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 30)
        passes.go_on.set()
        assert isinstance(await asyncio.wait_for(sessions[1].step(sound(0)[0]), 30), MicroTurn)

    with_engine(checkpoint, test)


class Evil(Sequence[int]):
    """Token ids whose reading fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        raise self._error

    def __iter__(self) -> Iterator[int]:
        raise self._error


@pytest.mark.parametrize("error", [RuntimeError("gone"), StopIteration(), MemoryError()], ids=repr)
def test_input_whose_own_code_raises_harms_nobody(checkpoint: Path, error: Exception) -> None:
    async def test(engine: AsyncEngine) -> None:
        good, bad = await engine.open_session(), await engine.open_session()
        piece = sound(0)[0]
        answers = await asyncio.wait_for(
            asyncio.gather(
                good.step(piece), bad.step(piece, text=Evil(error)), return_exceptions=True
            ),
            30,
        )
        assert isinstance(answers[0], MicroTurn)
        assert isinstance(answers[1], InvalidArgument)
        assert answers[1].__cause__ is error
        turn = await good.step(piece)
        assert (turn.index, turn.input.merged_turns) == (1, 0)
        assert (await bad.step(piece)).index == 0

    with_engine(checkpoint, test)


@pytest.mark.parametrize("error", [RuntimeError("gone"), StopIteration(), MemoryError()], ids=repr)
def test_whatever_feeding_raises_is_that_session_s_answer(
    checkpoint: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    async def test(engine: AsyncEngine) -> None:
        good, bad = await engine.open_session(), await engine.open_session()
        piece = sound(0)[0]
        monkeypatch.setattr(bad.sync, "feed", fails)
        answers = await asyncio.wait_for(
            asyncio.gather(good.step(piece), bad.step(piece), return_exceptions=True), 30
        )
        assert isinstance(answers[0], MicroTurn)
        assert answers[1] is error or answers[1].__cause__ is error
        assert engine.engine.step_many({bad.sync: {}}) == [error]
        with pytest.raises(type(error)):
            bad.sync.step()
        with pytest.raises((type(error), RuntimeError)):
            await asyncio.wait_for(engine.run(fails), 30)
        assert (await good.step(piece)).index == 1

    with_engine(checkpoint, test)
