"""What a live session's model was given, so that the stream can be computed again without a clock.

`LiveEngine(journal=f)` calls `f(session_id, entry)` for each. `replay` does the same to a session
of any engine with the same checkpoint and options, and the output is the same, token for token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from duplex_engine.session import Session
from duplex_engine.types import MicroTurn

__all__ = ["Entry", "replay"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One call on the session: its name, and its argument or arguments."""

    call: Literal["feed", "step", "truncate", "forget"]
    value: Any


def replay(session: Session, entries: Iterable[Entry]) -> list[MicroTurn]:
    """Does to `session` what was done to the live one; returns the micro-turns of its steps."""
    turns: list[MicroTurn] = []
    for entry in entries:
        match entry.call:
            case "step":
                turns.append(session.step(**entry.value))
            case "feed":
                session.feed(**entry.value)
            case "truncate":
                session.truncate(entry.value)
            case "forget":
                session.forget(*entry.value)
    return turns
