"""Work between micro-turns: tasks that compute in slices, while no session is due.

A task is a generator: from one `yield` to the next is a slice, short enough to be waited for, as
one decoded token. Owns the tasks and what their slices cost; the scheduler says which runs next. An
exception ends the task, and nothing else.

Under a live engine's own thread, slices run in a second one, so that those on the background lane
(`Session.fork(background=True)`) stand still in the middle when a session is due, and go on behind
it. Under `poll` alone they run inside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Generator
from dataclasses import dataclass
from typing import TypeAlias

from duplex_engine.arguments import found
from duplex_engine.errors import CapacityError, InvalidArgument
from duplex_engine.live.worker import Worker

__all__ = ["MAX_TASKS", "MAX_TASKS_PER_SESSION", "Background", "Slices"]

MAX_TASKS = 256
MAX_TASKS_PER_SESSION = 4
LEARN = 0.25  # weight of the newest slice
QUANTUM_US = 5_000  # nobody waits for slices that give way: so many are run at once

Slices: TypeAlias = Generator[None, None, None]
Done: TypeAlias = Callable[[int, int, BaseException | None], None]


@dataclass(slots=True)
class _Task:
    owner: int
    slices: Slices
    gives_way: bool
    waits_since_us: int
    slice_us: float = 0.0  # 0 before the first


class Background:
    """The tasks of all sessions. `run` and `keep` belong to the driver."""

    def __init__(self, now_us: Callable[[], int], done: Done) -> None:
        """`done` is told of every slice, and of an end that failed: owner, µs, what it raised."""
        self._now_us = now_us
        self._done = done
        self._lock = threading.Lock()
        self._tasks: dict[int, _Task] = {}
        self._next = 0
        self._forced_us = 0
        self._worker = Worker("duplex_background")
        self._lent: int | None = None  # the task in the worker's hands

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def forced_us(self) -> int:
        """End of the newest slice that made a session wait."""
        return self._forced_us

    def start(self) -> None:
        """From here on slices run in a thread of their own."""
        self._worker.start()

    def add(self, owner: int, slices: Slices, *, gives_way: bool = False) -> None:
        """Takes a task of session `owner`. `gives_way`: all that computes is on the other lane.

        Raises:
            CapacityError: the session, or all together, have too many already.
            InvalidArgument: not a generator, which alone can be ended with its session.
        """
        if not isinstance(slices, Generator):
            raise InvalidArgument(
                f"background: expected a generator, found {found(slices)}; call a function that "
                "yields, and give what it returns"
            )
        with self._lock:
            n_own = sum(task.owner == owner for task in self._tasks.values())
            if n_own >= MAX_TASKS_PER_SESSION or len(self._tasks) >= MAX_TASKS:
                raise CapacityError(
                    f"background: expected at most {MAX_TASKS_PER_SESSION} tasks of a session and "
                    f"{MAX_TASKS} in all, found {n_own} and {len(self._tasks)}; wait for one to end"
                )
            self._next += 1
            self._tasks[self._next] = _Task(owner, slices, gives_way, self._now_us())

    def loads(self) -> list[tuple[int, int, int]]:
        """(task, waits_since_us, slice_us) for the scheduler; none while a slice is at work."""
        with self._lock:
            if self._lent is not None:
                return []
            return [
                (number, task.waits_since_us, 0 if self._is_free(task) else int(task.slice_us))
                for number, task in self._tasks.items()
            ]

    def run(self, number: int, *, is_forced: bool) -> None:
        """Runs a slice of a task, or hands it to the worker."""
        self._lent = number
        self._worker.run(self._slice, number, is_forced)

    def keep(self, owners: Container[int]) -> None:
        """Ends the tasks of all other sessions."""
        with self._lock:
            gone = [
                number
                for number, task in self._tasks.items()
                if task.owner not in owners and number != self._lent
            ]
            tasks = [self._tasks.pop(number) for number in gone]
        for task in tasks:
            self._end(task)

    def close(self) -> None:
        """Waits for the slice at work, and ends all tasks."""
        self._worker.close()
        self.keep(())

    def _end(self, task: _Task) -> None:
        """Lets a task clean up. That is its own code: whatever it does, the driver goes on."""
        begin_us = self._now_us()
        try:
            task.slices.close()
        except BaseException as error:  # of its cleanup, or because it refuses to end
            self._done(task.owner, self._now_us() - begin_us, error)

    def _is_free(self, task: _Task) -> bool:
        return task.gives_way and self._worker.is_there

    def _slice(self, number: int, is_forced: bool) -> None:
        task = self._tasks[number]
        begin_us = self._now_us()
        failure: BaseException | None = None
        is_over = False
        quantum_us = QUANTUM_US if self._is_free(task) else 0
        try:
            next(task.slices)
            while self._now_us() - begin_us < quantum_us:
                next(task.slices)
        except BaseException as error:
            failure = None if isinstance(error, StopIteration) else error
            is_over = True
        end_us = self._now_us()
        us = end_us - begin_us
        with self._lock:
            self._lent = None
            if is_over:
                del self._tasks[number]
            task.waits_since_us = end_us
            task.slice_us += (LEARN if task.slice_us else 1.0) * (us - task.slice_us)
            if is_forced and not self._is_free(task):
                self._forced_us = end_us
        self._done(task.owner, us, failure)
