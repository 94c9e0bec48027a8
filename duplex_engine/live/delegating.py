"""Background workers of a live session: what they find waits with its other input.

Owns the seam to `duplex_engine.background`: `Delegations` is called at every micro-turn boundary,
by the driver, and sees the session through `Stream`, whose `feed` queues where clients' results do,
before them, as it enters the micro-turn at hand. So a result is journalled, and taken back after an
interruption, like all input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from duplex_engine.arguments import check_callable, found
from duplex_engine.background import Delegations
from duplex_engine.errors import CapacityError, InvalidArgument
from duplex_engine.session import Session
from duplex_engine.types import MicroTurn, StepInput

if TYPE_CHECKING:
    from duplex_engine.live.session import LiveSession

__all__ = [
    "MakeDelegations",
    "after_step",
    "before_step",
    "begin",
    "note_request",
    "note_result",
]

MakeDelegations: TypeAlias = Callable[[Session], Delegations]


class Stream:
    """A live session's `Session`, but for what is fed to it."""

    def __init__(self, session: LiveSession) -> None:
        self._live_session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._live_session._inner, name)

    def feed(self, *, result: list[int]) -> None:
        """Lets a result enter next; raises CapacityError where too many wait."""
        session = self._live_session
        with session._live._lock:
            if not session._mailbox.push_next(result):
                raise CapacityError("feed: too many results wait already; step the session")
            note_result(session)


def begin(session: LiveSession, make: MakeDelegations) -> Delegations:
    """The delegations of a session that was just opened.

    Raises:
        InvalidArgument: `make` makes none.
    """
    check_callable(make, "delegations")
    made = make(cast(Session, Stream(session)))
    if not isinstance(made, Delegations):
        raise InvalidArgument(
            "delegations: expected a function that returns Delegations, found one that returns "
            f"{found(made)}"
        )
    return made


def before_step(session: LiveSession) -> None:
    """Lets a result that is due into the mailbox, unless a client's waits there."""
    if session.delegations is not None:
        waiting = {"result": True} if session._mailbox.has_result else None
        session.delegations.before_step(waiting)
        if (job := session.delegations.entering) is not None:
            with session._live._lock:
                session._mailbox.asked(job.turn)


def after_step(session: LiveSession, turn: MicroTurn, inputs: StepInput) -> None:
    """Starts what the micro-turn delegates."""
    if session.delegations is not None:
        given = dict(inputs)
        if session.delegations.entering is not None:
            given["result"] = None  # its own, which it knows
        session.delegations.after_step(turn, given)


def note_request(session: LiveSession) -> None:
    """For the trace: the model has delegated something."""
    live = session._live
    live._count("delegations")
    key = f"{session.id}-{live.counters['delegations']}"
    session._requests.append(key)
    live.trace.delegation(session.id, key, live.now_us(), begins=True)


def note_result(session: LiveSession) -> None:
    """For the trace: a result has come, of the oldest that is open."""
    live = session._live
    if session._requests:
        key = session._requests.popleft()
        live.trace.delegation(session.id, key, live.now_us(), begins=False)
