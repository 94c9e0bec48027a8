"""A session's outputs on their way to whoever reads them.

Owns the bounded queue between the driver, which never waits, and a reader in any thread or event
loop. When the reader falls `MAX_WAITING` micro-turns behind, the oldest output is dropped and the
next one read says how many (`OutputLost`); nothing else notices.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import deque
from contextlib import suppress

from duplex_engine.live.types import LiveTurn, OutputLost

__all__ = ["MAX_WAITING", "Outbox"]

MAX_WAITING = 64  # micro-turns: 13 seconds


class Outbox:
    """One session's queue of `LiveTurn`."""

    def __init__(self) -> None:
        self._turns: deque[LiveTurn] = deque()
        self._n_lost = 0
        self._closed = False
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def put(self, turn: LiveTurn) -> int:
        """Adds one output; returns how many were dropped for it."""
        with self._changed:
            n_dropped = 0
            while len(self._turns) >= MAX_WAITING:
                self._turns.popleft()
                n_dropped += 1
            self._n_lost += n_dropped
            self._turns.append(turn)
            self._notify()
            return n_dropped

    def drop_before(self, epoch: int) -> None:
        """Takes back what is of an older epoch and was not read."""
        with self._changed:
            self._turns = deque(turn for turn in self._turns if turn.epoch >= epoch)

    def close(self) -> None:
        """Lets readers finish what is there, and end."""
        with self._changed:
            self._closed = True
            self._notify()

    def get(self, timeout_s: float | None = None) -> LiveTurn | None:
        """The next output; None after `timeout_s`, or when there will be none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._turns or self._closed, timeout_s)
            return self._next()

    async def get_async(self) -> LiveTurn | None:
        """As `get`, awaited."""
        ready = asyncio.Event()
        waiter = (asyncio.get_running_loop(), ready)
        while True:
            with self._changed:
                if self._turns or self._closed:
                    return self._next()
                ready.clear()
                self._waiters.append(waiter)
            try:
                await ready.wait()
            finally:
                with self._changed:
                    if waiter in self._waiters:
                        self._waiters.remove(waiter)

    def _next(self) -> LiveTurn | None:
        if not self._turns:
            return None
        turn = self._turns.popleft()
        if self._n_lost:
            turn = dataclasses.replace(turn, events=(OutputLost(self._n_lost), *turn.events))
            self._n_lost = 0
        return turn

    def _notify(self) -> None:
        self._changed.notify_all()
        for loop, ready in self._waiters:
            with suppress(RuntimeError):  # the loop was closed, and its reader is gone
                loop.call_soon_threadsafe(ready.set)
        self._waiters.clear()
