"""One micro-turn of several sessions: input to the core, one pass, output from it.

`Session.step` and `Engine.step_many` are this function; what a session is: `session.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from duplex_engine import _core
from duplex_engine.arguments import MAX_INT32, found, integer
from duplex_engine.errors import DuplexError, InvalidArgument
from duplex_engine.types import MicroTurn, StepInput

if TYPE_CHECKING:
    from duplex_engine.session import Session

__all__ = ["step_input", "step_together"]


def step_together(
    engine: _core.Engine, requests: Sequence[tuple[Session, StepInput]]
) -> list[MicroTurn | Exception]:
    """One micro-turn of each session, in one pass; see `Engine.step_many`."""
    # All of it before anything is fed: one request that is none leaves the others untouched.
    for request in requests:
        if not (isinstance(request, tuple | list) and len(request) == 2):
            raise InvalidArgument(
                "step_many: expected {session: StepInput(...)} or pairs of these, "
                f"found {found(request)}"
            )
        session, inputs = request
        if getattr(session, "_engine", None) is not engine:
            raise InvalidArgument(
                f"step_many: expected sessions of this engine, found another's, or none: "
                f"{found(session)}"
            )
        if not isinstance(inputs, Mapping) or not all(isinstance(key, str) for key in inputs):
            raise InvalidArgument(
                f"step_many: expected a dict like StepInput(audio=...), found {found(inputs)}"
            )
    if len({session for session, _ in requests}) < len(requests):
        raise InvalidArgument("step_many: expected each session once, found one of them twice")
    if len({session.background for session, _ in requests}) > 1:
        raise InvalidArgument(
            "step_many: expected sessions of one lane, found interaction and background sessions; "
            "step them in two calls"
        )
    answers: dict[Session, MicroTurn | Exception] = {}
    ready: list[Session] = []
    limits: list[int] = []  # -1: that of the checkpoint
    with ExitStack() as stack:
        for session, inputs in requests:
            try:
                wanted = inputs.get("max_tokens")
                limit = -1 if wanted is None else integer(wanted, "max_tokens", high=MAX_INT32)
                stack.enter_context(session._exclusive)
                _feed(session, inputs)
            except Exception as error:  # also of code that its input brings; the others are fed
                answers[session] = error
            else:
                ready.append(session)
                limits.append(limit)
        turns = []
        if ready or engine.closed:  # where all are refused, nobody waits for a pass at work
            turns = engine.step_many([session._core for session in ready], limits)
        for session, turn in zip(ready, turns, strict=True):
            if isinstance(turn, DuplexError):
                answers[session] = turn
                continue
            try:
                answers[session] = session._finish(turn)
            except Exception as error:  # the others have had their micro-turn
                answers[session] = error
    return [answers[session] for session, _ in requests]


def _feed(session: Session, inputs: StepInput) -> None:
    """Feeds what a `StepInput` holds; raises as `Session.feed`."""
    if unknown := inputs.keys() - StepInput.__annotations__.keys():
        raise InvalidArgument(
            f"step: expected {', '.join(StepInput.__annotations__)}, "
            f"found {', '.join(sorted(unknown))}"
        )
    session.feed(
        inputs.get("audio"),
        inputs.get("image"),
        inputs.get("text"),
        result=inputs.get("result"),
        sample_rate=inputs.get("sample_rate"),
    )


def step_input(
    audio: object,
    image: object,
    text: object,
    result: object,
    sample_rate: int | None,
    max_tokens: int | None,
) -> StepInput:
    """The arguments of `Session.step` as one value."""
    return {
        "audio": audio,
        "image": image,
        "text": text,
        "result": result,
        "sample_rate": sample_rate,
        "max_tokens": max_tokens,
    }
