"""What a background worker is, what it is told, and what is known about its work.

A worker is any callable that takes a `Task`:

    async def worker(task): return "sunny"           # awaited on an event loop
    async def worker(task): yield "sun"; yield "ny"  # a result in pieces
    def worker(task): return "sunny"                 # called in a thread of its own
    def worker(task): yield "sun"; yield "ny"        # the same, in pieces

It may raise, never end, or return nonsense: the stream of the session does not notice. One that
has a number `fork_positions` above 0 finds in `task.session` a fork of the session, which shares
the conversation so far and may append that many positions.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from duplex_engine.background.transcript import Entry, transcript_text
from duplex_engine.session import Session

__all__ = ["Failure", "Job", "State", "Task", "Worker"]

State: TypeAlias = Literal["waiting", "running", "done", "failed", "cancelled", "replaced"]
Failure: TypeAlias = Literal["error", "timeout", "too_many"]


@dataclass(frozen=True, eq=False)
class Task:
    """One request, as its worker sees it.

    Attributes:
        id: of the delegation.
        text: the request, as the model wrote it; "" if the checkpoint has no tokenizer.
        token_ids: its tokens.
        transcript: the conversation until then, oldest first.
        n_dropped: older entries that the transcript no longer has.
        deadline_s: when the work is given up, on `clock`.
        clock: the seconds of now.
        session: a fork for a worker with `fork_positions`, closed when the work ends; else None.
    """

    id: int
    text: str
    token_ids: tuple[int, ...]
    transcript: tuple[Entry, ...]
    n_dropped: int
    deadline_s: float
    clock: Callable[[], float]
    _owner: Session
    session: Session | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the result any more; a worker in a thread should look often."""
        return self._cancelled.is_set() or self._owner.closed

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; 0 when it has passed."""
        return max(self.deadline_s - self.clock(), 0.0)

    @property
    def conversation(self) -> str:
        """The transcript as text, one line for each entry."""
        return transcript_text(self.transcript, self.n_dropped)

    def cancel(self) -> None:
        """Tells the worker that nobody waits any more."""
        self._cancelled.set()


@dataclass(frozen=True, slots=True)
class Job:
    """What is known about a delegation at one moment.

    Attributes:
        id: ascending, from 1.
        request: its text.
        turn: the micro-turn that completed the request; -1 if the program asked.
        state: "waiting" for a free worker, "running", "done", "failed", "cancelled" or "replaced".
        asked_s, began_s, ended_s: on the clock of `Delegations`; None where it has not happened.
        text: the result, as far as it has come.
        entered: the micro-turns in which parts of it entered the stream.
        failure: why it failed.
        error: the same for people, and what was cut from the result, if anything was.
    """

    id: int
    request: str
    turn: int
    state: State
    asked_s: float
    began_s: float | None = None
    ended_s: float | None = None
    text: str = ""
    entered: tuple[int, ...] = ()
    failure: Failure | None = None
    error: str = ""

    @property
    def is_open(self) -> bool:
        """Whether a result may still come."""
        return self.state in ("waiting", "running")


Worker: TypeAlias = Callable[[Task], str | Awaitable[str] | AsyncIterator[str] | Iterator[str]]
