"""Work between micro-turns: tasks that compute in slices, while no session is due.

A task is a generator: from one `yield` to the next is a slice, short enough to be waited for (one
decoded token). Owns the tasks and what their slices cost; the scheduler says which runs next. An exception ends the task, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator
from dataclasses import dataclass
from typing import TypeAlias

from duplex_engine.errors import CapacityError

__all__ = ["MAX_TASKS", "MAX_TASKS_PER_SESSION", "Background", "Slices"]

MAX_TASKS = 256
MAX_TASKS_PER_SESSION = 4
LEARN = 0.25  # weight of the newest slice

Slices: TypeAlias = Generator[None, None, None]


@dataclass(slots=True)
class _Task:
    owner: int
    slices: Slices
    waits_since_us: int
    slice_us: float = 0.0  # 0 before the first


class Background:
    """The tasks of all sessions. `run` and `keep` belong to the driver, the rest to its lock."""

    def __init__(self, now_us: Callable[[], int]) -> None:
        self._now_us = now_us
        self._tasks: dict[int, _Task] = {}
        self._next = 0
        self._forced_us = 0

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def forced_us(self) -> int:
        """End of the newest slice that made a session wait."""
        return self._forced_us

    def add(self, owner: int, slices: Slices) -> None:
        """Takes a task of session `owner`.

        Raises:
            CapacityError: the session, or all together, have too many already.
        """
        n_own = sum(task.owner == owner for task in self._tasks.values())
        if n_own >= MAX_TASKS_PER_SESSION or len(self._tasks) >= MAX_TASKS:
            raise CapacityError(
                f"background: expected at most {MAX_TASKS_PER_SESSION} tasks of a session and "
                f"{MAX_TASKS} in all, found {n_own} and {len(self._tasks)}; wait for one to end"
            )
        self._next += 1
        self._tasks[self._next] = _Task(owner, slices, self._now_us())

    def loads(self) -> list[tuple[int, int, int]]:
        """(task, waits_since_us, slice_us) for the scheduler."""
        return [(n, t.waits_since_us, int(t.slice_us)) for n, t in self._tasks.items()]

    def run(self, number: int, *, is_forced: bool) -> tuple[int, int, Exception | None]:
        """Runs a slice of a task; returns its owner, microseconds, and what it raised."""
        task = self._tasks[number]
        begin_us = self._now_us()
        failure: Exception | None = None
        try:
            next(task.slices)
        except Exception as error:
            failure = None if isinstance(error, StopIteration) else error
            del self._tasks[number]
        task.waits_since_us = self._now_us()
        us = task.waits_since_us - begin_us
        task.slice_us += (LEARN if task.slice_us else 1.0) * (us - task.slice_us)
        if is_forced:
            self._forced_us = task.waits_since_us
        return task.owner, us, failure

    def keep(self, owners: Container[int]) -> None:
        """Ends the tasks of all other sessions."""
        for number in [n for n, task in self._tasks.items() if task.owner not in owners]:
            self._tasks.pop(number).slices.close()
