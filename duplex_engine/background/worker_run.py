"""One worker at work on one task: in a thread where it is a plain function, else on a loop.

Owns how the four kinds of worker (see `task.py`) are called, read and stopped, and that nothing
they raise gets out of here. Does not own what is done with their text.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import Any

from duplex_engine.background.event_loop import EventLoop, Running
from duplex_engine.background.task import Task, Worker

__all__ = ["Sink", "WorkerRun"]

WATCH_S = 0.1  # between looks whether the session was closed, while a coroutine works


@dataclass(frozen=True, slots=True)
class Sink:
    """Where a worker's text goes; called from the thread or the loop where it works.

    Attributes:
        take: a piece of text, whatever it is; False: no more is wanted.
        finish: after the last piece; with the error that ended it, if one did.
        end: after everything, once, however it ended.
    """

    take: Callable[[object], bool]
    finish: Callable[[BaseException | None], None]
    end: Callable[[], None]


class WorkerRun:
    """Starts at once."""

    def __init__(self, worker: Worker, task: Task, loop: EventLoop, sink: Sink) -> None:
        self._task, self._loop, self._sink = task, loop, sink
        self._running: Running | None = None
        try:
            is_asynchronous = _is_asynchronous(worker)
        except Exception as error:  # of the worker's own properties
            sink.finish(error)
            sink.end()
            return
        if is_asynchronous:
            self._submit(worker)
        else:
            name = f"duplex_engine worker {task.id}"
            try:
                threading.Thread(target=self._call, args=(worker,), name=name, daemon=True).start()
            except RuntimeError as error:  # the system gives no more threads
                sink.finish(error)
                sink.end()

    def cancel(self) -> None:
        """Ends a coroutine where it waits, and tells a plain function that it may end."""
        self._task.cancel()
        if self._running is not None:
            self._running.cancel()

    def _call(self, worker: Worker) -> None:
        """A plain function, in its thread."""
        try:
            value: Any = worker(self._task)
            if inspect.isawaitable(value) or hasattr(value, "__aiter__"):
                self._submit(lambda _: value, getattr(value, "close", None))  # disguised till now
                return
            if isinstance(value, Iterator):
                with ExitStack() as stack:
                    if hasattr(value, "close"):
                        stack.callback(value.close)
                    for piece in value:
                        if not self._sink.take(piece):
                            break
            else:
                self._sink.take(value)
        except BaseException as error:  # a worker's SystemExit ends the worker alone
            self._sink.finish(error)
        else:
            self._sink.finish(None)
        self._sink.end()

    def _submit(
        self, worker: Callable[[Task], Any], close: Callable[[], None] | None = None
    ) -> None:
        """Runs a worker on the loop; `close` ends a coroutine that was never begun."""

        def end() -> None:
            if close is not None:
                close()
            self._sink.end()

        try:
            self._running = self._loop.submit(self._await(worker), end)
        except RuntimeError as error:  # the program's event loop is closed, or no thread is left
            self._sink.finish(error)
            end()
        else:
            if self._task.cancelled:  # meanwhile
                self._running.cancel()

    async def _await(self, worker: Callable[[Task], Any]) -> None:
        """A coroutine or an asynchronous generator, on the loop."""
        watch = asyncio.create_task(self._watch(asyncio.current_task()))
        try:
            value = worker(self._task)
            if inspect.isawaitable(value):
                value = await value
            if hasattr(value, "__aiter__"):
                async with AsyncExitStack() as stack:
                    if hasattr(value, "aclose"):
                        stack.push_async_callback(value.aclose)
                    async for piece in value:
                        if not self._sink.take(piece):
                            break
            else:
                self._sink.take(value)
        except asyncio.CancelledError as error:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            self._sink.finish(error)  # the worker raised it by itself
        except BaseException as error:
            self._sink.finish(error)
        else:
            self._sink.finish(None)
        finally:
            watch.cancel()

    async def _watch(self, work: asyncio.Task[Any] | None) -> None:
        while not self._task.cancelled:
            await asyncio.sleep(WATCH_S)
        if work is not None:
            work.cancel()


def _is_asynchronous(worker: Worker) -> bool:
    function: Any = worker
    while isinstance(function, functools.partial):
        function = function.func
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    call = getattr(function, "__call__", None)  # noqa: B004  # of an object
    return any(kind(function) or kind(call) for kind in kinds)
