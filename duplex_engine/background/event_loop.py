"""Where the coroutines of background workers run: the caller's event loop, or one in a thread.

Owns that thread: it starts with the first coroutine and ends with the last, so a program that does
not close what it opened leaves no idle thread behind.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeAlias

__all__ = ["EventLoop", "Running"]

OnEnd: TypeAlias = Callable[[], None]


class Running:
    """A coroutine that was given to a loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._task: asyncio.Task[None] | None = None

    def start(self, coroutine: Coroutine[Any, Any, None], on_end: OnEnd) -> None:
        """Called in the loop; `on_end` comes however the coroutine ends, even before it began."""
        self._task = self._loop.create_task(coroutine)
        self._task.add_done_callback(lambda _: on_end())

    def cancel(self) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop is closed: the task ended before it
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())


class EventLoop:
    """The loop that runs where this is made, or else a thread's own, while there is work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_running = 0
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
            self._is_own = False
        except RuntimeError:
            self._loop = None
            self._is_own = True

    @property
    def is_here(self) -> bool:
        """Whether the caller runs in the loop, and so must not wait for it."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def submit(self, coroutine: Coroutine[Any, Any, None], on_end: OnEnd) -> Running:
        """Runs a coroutine, from any thread.

        Raises:
            RuntimeError: the caller's loop was closed, or no thread or loop can be made; the
                coroutine is closed too.
        """

        def ended() -> None:
            on_end()
            self._leave()

        with self._lock:
            try:
                loop = self._loop or self._start()
                running = Running(loop)
                loop.call_soon_threadsafe(running.start, coroutine, ended)
            except RuntimeError:
                coroutine.close()
                raise
            self._n_running += 1
        return running

    def join(self, timeout_s: float) -> None:
        """Waits for the thread to end; it does when nothing runs."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _leave(self) -> None:
        with self._lock:
            self._n_running -= 1
            if self._is_own and self._n_running == 0 and self._stop is not None:
                self._stop.set()
                self._loop = self._stop = None

    def _start(self) -> asyncio.AbstractEventLoop:
        ready: Future[asyncio.AbstractEventLoop] = Future()

        async def serve() -> None:
            self._stop = stop = asyncio.Event()
            ready.set_result(asyncio.get_running_loop())
            await stop.wait()

        def run() -> None:
            try:
                with asyncio.Runner() as runner:
                    runner.run(serve())
            except BaseException as error:
                if ready.done():
                    raise
                ready.set_exception(error)  # a loop takes file descriptors, which may be used up

        self._thread = threading.Thread(target=run, name="duplex_engine background", daemon=True)
        self._thread.start()
        if (error := ready.exception()) is not None:
            raise RuntimeError(f"no event loop can be made: {error}") from error
        self._loop = ready.result()
        return self._loop
