"""The engine for asyncio: many sessions awaiting their micro-turns, one pass for all of them.

Owns the dispatcher: steps that wait at the same time run as one `Engine.step_many` in a worker
thread. A session has at most one step waiting, so the queue is bounded by the open sessions. Calls
of background sessions run one by one in a thread of their own. Does not own any arithmetic: a
session gets the same bits as it would from `Session.step`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from duplex_engine.arguments import check_callable, found
from duplex_engine.engine import Engine
from duplex_engine.errors import InvalidArgument, SessionBusy, SessionClosed
from duplex_engine.session import Session
from duplex_engine.step import step_input
from duplex_engine.types import MicroTurn, StepInput

__all__ = ["AsyncEngine", "AsyncSession"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False, slots=True)
class _Request:
    session: Session
    inputs: StepInput
    answer: asyncio.Future[MicroTurn]


class AsyncEngine:
    """An `Engine` whose calls are awaited. Belongs to the event loop of its first step.

    Use it as an asynchronous context manager, or await `close`.
    """

    def __init__(self, engine: Engine) -> None:
        """Takes over `engine`: `close` closes it."""
        if not isinstance(engine, Engine):
            raise InvalidArgument(f"AsyncEngine: expected an Engine, found {found(engine)}")
        self.engine = engine
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="duplex_engine")
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="duplex_background")
        self._waiting: dict[Session, _Request] = {}
        self._wake = asyncio.Event()
        self._dispatcher: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # in which steps wait
        self._closing: Future[None] | None = None  # `Engine.close`, behind the pass at work

    @classmethod
    async def load(cls, path: str | Path, **options: Any) -> Self:
        """Loads a checkpoint in a thread; the arguments are those of `Engine.load`."""
        return cls(await asyncio.to_thread(Engine.load, path, **options))

    async def open_session(self, **options: Any) -> AsyncSession:
        """Opens a session; the arguments are those of `Engine.open_session`."""
        return AsyncSession(self, await self.run(self.engine.open_session, **options))

    async def restore(self, path: str | Path, *, max_positions: int | None = None) -> AsyncSession:
        """Goes on from a snapshot; see `Engine.restore`."""
        restore = self.engine.restore
        return AsyncSession(self, await self.run(restore, path, max_positions=max_positions))

    async def run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Calls `function` in the worker thread, where it never meets a step at work.

        For the calls of `Session` that have no asynchronous twin:
        `await engine.run(session.sync.append, text=ids)`. A caller that is cancelled does not stop
        a call that began.
        """
        return await self._run(self._worker, function, *args, **kwargs)

    async def run_background(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Calls `function` in the thread of background sessions, which no step waits for:
        `await engine.run_background(fork.sync.decode, 8)`."""
        return await self._run(self._background, function, *args, **kwargs)

    async def _run(
        self, thread: ThreadPoolExecutor, function: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        self._check_open()
        check_callable(function, "run")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(thread, _call, function, args, kwargs)

    async def step(self, session: Session, inputs: StepInput) -> MicroTurn:
        """Runs one micro-turn of `session`, together with all others that wait.

        Raises:
            InvalidArgument: the first step ran in another event loop.
        """
        self._check_open()
        if not isinstance(session, Session):
            raise InvalidArgument(
                f"step: expected a Session, as `AsyncSession.sync`, found {found(session)}"
            )
        if session.background:
            return await self.run_background(session.step, **inputs)
        self._check_loop()
        if session in self._waiting:
            raise SessionBusy(
                "step: expected one step at a time, found another one of this session waiting; "
                "await that one first"
            )
        loop = self._loop = asyncio.get_running_loop()
        if self._dispatcher is None or self._dispatcher.done():  # done: someone cancelled it
            self._dispatcher = loop.create_task(self._dispatch())
        request = _Request(session, inputs, loop.create_future())
        self._waiting[session] = request
        self._wake.set()
        try:
            return await request.answer
        finally:
            # Cancelled while waiting: nothing is fed. Cancelled during the pass: it is finished.
            if self._waiting.get(session) is request:
                del self._waiting[session]

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing is not None

    async def close(self) -> None:
        """Lets the pass at work finish, refuses the steps that wait, and closes the engine.

        A caller that is cancelled does not stop it; the next one waits for the same end.

        Raises:
            InvalidArgument: steps belong to another event loop, and it still is there.
        """
        is_left = self._loop is not None and self._loop.is_closed()  # with all that waited in it
        if not is_left:
            self._check_loop()
        if self._closing is None:
            self._closing = self._worker.submit(self.engine.close)
            self._worker.shutdown(wait=False)
            self._background.shutdown(wait=False)
            if not is_left:
                self._wake.set()
        await asyncio.shield(asyncio.wrap_future(self._closing))
        if self._dispatcher is not None and not is_left and not self._dispatcher.done():
            await asyncio.wait([self._dispatcher])  # until it has handed out the last answers

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise SessionClosed("engine: expected an open engine, found a closed one; load another")

    def _check_loop(self) -> None:
        if self._loop not in (None, asyncio.get_running_loop()):
            raise InvalidArgument(
                "engine: expected the event loop of its first step, found another; await all of "
                "it in one asyncio.run, or load an engine in each"
            )

    async def _dispatch(self) -> None:
        """Takes whatever waits, runs it as one pass, hands the answers out, and again."""
        loop = asyncio.get_running_loop()
        batch: list[_Request] = []
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                batch = [r for r in self._waiting.values() if not r.answer.done()]  # not cancelled
                self._waiting.clear()
                if self.closed:
                    break
                answers = await loop.run_in_executor(self._worker, self._step_all, batch)
                for request, answer in zip(batch, answers, strict=True):
                    if request.answer.done():
                        continue  # its caller was cancelled meanwhile
                    if isinstance(answer, Exception):
                        request.answer.set_exception(_legal(answer))
                    else:
                        request.answer.set_result(answer)
                await asyncio.sleep(0)  # callers that step again at once join the next pass
        except asyncio.CancelledError:  # with its loop, or by hand: nobody else answers these
            for request in [*batch, *self._waiting.values()]:
                request.answer.cancel()
            raise
        for request in batch:
            request.answer.set_exception(
                SessionClosed("step: the engine was closed before this step began")
            )

    def _step_all(self, batch: list[_Request]) -> Sequence[MicroTurn | Exception]:
        batch[:] = [r for r in batch if not r.answer.done()]  # cancelled behind a call of `run`
        try:
            return self.engine.step_many([(request.session, request.inputs) for request in batch])
        except Exception as error:  # nothing that one session did: all callers should know
            return [error] * len(batch)


class AsyncSession:
    """A `Session` whose calls are awaited; use it as an asynchronous context manager."""

    def __init__(self, engine: AsyncEngine, session: Session) -> None:
        self._engine = engine
        self.sync = session  # the session itself, for `AsyncEngine.run`

    async def step(
        self,
        audio: object = None,
        image: object = None,
        text: object = None,
        *,
        result: object = None,
        sample_rate: int | None = None,
        max_tokens: int | None = None,
    ) -> MicroTurn:
        """Runs one micro-turn; the arguments are those of `Session.step`.

        Cancelled before its pass began, it has no effect; later, the micro-turn is finished and its
        output dropped.

        Raises:
            SessionBusy: another step of this session is being awaited.
        """
        inputs = step_input(audio, image, text, result, sample_rate, max_tokens)
        return await self._engine.step(self.sync, inputs)

    def feed(
        self,
        audio: object = None,
        image: object = None,
        text: object = None,
        *,
        result: object = None,
        sample_rate: int | None = None,
    ) -> None:
        """Queues input for the next micro-turn; see `Session.feed`."""
        self.sync.feed(audio, image, text, result=result, sample_rate=sample_rate)

    async def truncate(self, length: int) -> None:
        """Drops the newest positions; see `Session.truncate`."""
        await self._run(self.sync.truncate, length)

    def interrupt(self) -> None:
        """Raises the epoch, and ends output in progress; see `Session.interrupt`."""
        self.sync.interrupt()

    async def fork(
        self, max_positions: int | None = None, *, background: bool = False
    ) -> AsyncSession:
        """A second session that goes on from the same point; see `Session.fork`."""
        fork = await self._run(self.sync.fork, max_positions, background=background)
        return AsyncSession(self._engine, fork)

    async def forget(self, begin: int, end: int) -> tuple[int, int]:
        """Hides a range of the past; see `Session.forget`."""
        return await self._run(self.sync.forget, begin, end)

    async def snapshot(self, path: str | Path) -> None:
        """Writes the session to a file; see `Session.snapshot`. Steps of its lane wait."""
        await self._run(self.sync.snapshot, path)

    async def migrate(self, engine: AsyncEngine) -> AsyncSession:
        """Moves the session to another engine; see `Session.migrate`."""
        if not isinstance(engine, AsyncEngine):
            raise InvalidArgument(f"migrate: expected an AsyncEngine, found {found(engine)}")
        return AsyncSession(engine, await self._run(self.sync.migrate, engine.engine))

    @property
    def length(self) -> int:
        """Positions in the sequence."""
        return self.sync.length

    async def close(self) -> None:
        """Gives the session's memory back, after a step at work; a second call does nothing."""
        if not self._engine.closed:
            await self._run(self.sync.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Calls a function of this session in the thread of its lane."""
        run = self._engine.run_background if self.sync.background else self._engine.run
        return await run(function, *args, **kwargs)


def _call(function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    try:
        return function(*args, **kwargs)
    except StopIteration as error:
        raise _legal(error) from error


def _legal(error: Exception) -> Exception:
    """The exception as a future may have it: asyncio refuses StopIteration, and nobody is told."""
    if not isinstance(error, StopIteration):
        return error
    legal = RuntimeError(f"the call raised {error!r}")
    legal.__cause__ = error
    return legal
