"""The last minutes of a live engine as a trace that Perfetto and chrome://tracing open.

Owns the ring of events and the file's form (Chrome's JSON trace events): a row per session on the
interaction lane with each micro-turn and inside it its stages, a row per session on the background
lane, and delegations as asynchronous slices.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any, Literal, TypeAlias

from duplex_engine.arguments import output_path
from duplex_engine.types import MicroTurn

__all__ = ["Lane", "Trace"]

MAX_EVENTS = 40_000  # about 13 minutes of ten sessions
Lane: TypeAlias = Literal["interaction", "background"]
LANES: dict[Lane, int] = {"interaction": 1, "background": 2}


class Trace:
    """A bounded recording; times are microseconds of the engine's clock."""

    def __init__(self) -> None:
        self._events: deque[tuple[str, dict[str, Any]]] = deque(maxlen=MAX_EVENTS)

    def turn(self, session_id: str, begin_us: int, turn: MicroTurn, late_us: int) -> None:
        """One micro-turn with its stages."""
        timing = turn.timing
        args = {
            "epoch": turn.epoch,
            "rows": turn.input.rows,
            "tokens": len(turn.token_ids),
            "merged": turn.input.merged_turns,
            "late_us": late_us,
        }
        whole = {"ph": "X", "dur": timing.total_us, "args": args}
        self._add("interaction", session_id, f"turn {turn.index}", begin_us, whole)
        at = begin_us
        for name, us in (
            ("encode", timing.encode_us),
            ("append", timing.append_us),
            ("decode", timing.decode_us),
        ):
            self._add("interaction", session_id, name, at, {"ph": "X", "dur": us})
            at += us

    def slice(self, session_id: str, name: str, begin_us: int, us: int) -> None:
        """A piece of background work for a session."""
        self._add("background", session_id, name, begin_us, {"ph": "X", "dur": us})

    def mark(self, session_id: str, name: str, at_us: int) -> None:
        """Something that happened at one moment."""
        self._add("interaction", session_id, name, at_us, {"ph": "i", "s": "t"})

    def delegation(self, session_id: str, key: str, at_us: int, *, begins: bool) -> None:
        """A delegation begins or ends; `key` is its own."""
        values = {"ph": "b" if begins else "e", "cat": "delegation", "id": key}
        self._add("background", session_id, "delegation", at_us, values)

    def save(self, path: str | Path) -> None:
        """Writes what is recorded as JSON; open it at ui.perfetto.dev.

        Raises:
            InvalidArgument: not a path of a file.
            OSError: the file cannot be written.
        """
        path = output_path(path, "trace: path")
        rows: dict[str, int] = {}
        events = []
        for session_id, event in list(self._events):
            row = rows.setdefault(session_id, len(rows) + 1)
            events.append(event | {"tid": row})
        for lane, process in LANES.items():
            events.append(_named("process_name", lane, process, 0))
            events += [_named("thread_name", name, process, row) for name, row in rows.items()]
        text = json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
        path.write_text(text, encoding="utf-8")

    def _add(
        self, lane: Lane, session_id: str, name: str, at_us: int, values: dict[str, Any]
    ) -> None:
        event = {"name": name, "pid": LANES[lane], "ts": at_us} | values
        self._events.append((session_id, event))


def _named(kind: str, name: str, process: int, row: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": row, "args": {"name": name}}
