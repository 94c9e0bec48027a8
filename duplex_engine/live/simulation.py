"""A live engine on a made-up clock: hours pass in seconds, and every run is the same.

Owns the clock and the loop that lets time pass. The steps are real; what they take by the made-up
clock is given. For tests of the driver and of what is built on it, and for long runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from duplex_engine.engine import Engine
from duplex_engine.live.cost import CostModel
from duplex_engine.live.driver import LiveEngine
from duplex_engine.live.journal import Entry, replay
from duplex_engine.live.session import LiveSession
from duplex_engine.live.types import LiveTurn
from duplex_engine.types import MicroTurn

__all__ = ["Simulation", "drain"]

MAX_POLLS = 1_000_000  # of one `run`: a driver that never waits is a mistake


class Simulation:
    """A `LiveEngine` without a thread, and the journal of all its sessions.

    Attributes:
        live: the live engine; open sessions with it.
        now_us: its clock.
        step_us: what a step takes by that clock.
        entries: what each session's model was given, by id.
        step_many: what runs a pass; a test may put its own in its place.
        passes: the number of sessions of each pass.
    """

    def __init__(self, engine: Engine, *, step_us: int = 0, **options: Any) -> None:
        """`options` are those of `LiveEngine`. Time costs nothing unless `cost` says so."""
        self.engine = engine
        self.step_us = step_us
        self.now_us = 1_000_000
        self.entries: dict[str, list[Entry]] = {}
        self.passes: list[int] = []
        self.step_many: Callable[[Any], Any] = engine.step_many
        options.setdefault("cost", CostModel(learn=False))
        options["journal"] = self._note
        timed = cast(Engine, _Timed(self))
        self.live = LiveEngine(timed, clock=lambda: self.now_us / 1e6, **options)

    def run(self, ms: float) -> None:
        """Lets `ms` milliseconds pass, and everything happen that is due meanwhile."""
        end_us = self.now_us + round(ms * 1000)
        for _ in range(MAX_POLLS):
            wait_s = self.live.poll()
            if wait_s == 0:
                if self.now_us > end_us:
                    return
                continue
            next_us = self.now_us + max(round((wait_s or 0) * 1e6), 1)
            if wait_s is None or next_us > end_us:
                self.now_us = max(end_us, self.now_us)
                return
            self.now_us = next_us
        raise AssertionError("the driver never waits")

    def recomputed(self, session_id: str, **options: Any) -> list[MicroTurn]:
        """The same stream, stepped without a clock; `options` are those of `open_session`."""
        with self.engine.open_session(**options) as session:
            return replay(session, self.entries.get(session_id, []))

    def _note(self, session_id: str, entry: Entry) -> None:
        self.entries.setdefault(session_id, []).append(entry)


class _Timed:
    """The engine, whose passes take their time by the made-up clock."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._simulation.engine, name)

    def step_many(self, requests: Any) -> Any:
        """One pass."""
        simulation = self._simulation
        simulation.passes.append(len(requests))
        simulation.now_us += simulation.step_us
        return simulation.step_many(requests)


def drain(session: LiveSession) -> list[LiveTurn]:
    """All output that can be read now."""
    turns: list[LiveTurn] = []
    while (turn := session.get(0)) is not None:
        turns.append(turn)
    return turns
