"""What the live tests share: a very small model, a clock that a test moves, and sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duplex_engine import Engine
from duplex_engine.live import CostModel, Entry, LiveEngine, LiveSession, LiveTurn, replay
from duplex_engine.models.random import Preset, write_random_checkpoint

TURN = 3200  # samples of a micro-turn
SMALLEST = Preset(
    vocab_size=384,
    d_model=32,
    d_ff=64,
    layers="ld gd",
    heads=(2, 1),
    local_heads=(2, 1),
    d_head=16,
    d_rel=4,
    rel_extent=64,
    window=64,
    patch_size=16,
    vision_layers=2,
    max_output_tokens=6,
)


def smallest_checkpoint(folder: Path, seed: int = 7) -> Path:
    return write_random_checkpoint(folder, SMALLEST, seed=seed)


def sound(seed: int, n: int = TURN) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * 0.1).astype(np.float32)


class Clock:
    """Seconds, when a test says so."""

    def __init__(self) -> None:
        self.us = 1_000_000

    def __call__(self) -> float:
        return self.us / 1e6


class Scene:
    """A live engine on a made-up clock, and what its model was given."""

    def __init__(self, engine: Engine, *, step_us: int = 0, **options: Any) -> None:
        self.engine = engine
        self.clock = Clock()
        self.step_us = step_us
        self.entries: dict[str, list[Entry]] = {}
        self.passes: list[int] = []
        options.setdefault("cost", CostModel(learn=False))
        self.live = LiveEngine(engine, clock=self.clock, journal=self._note, **options)
        self._step_many = engine.step_many
        self.live.engine = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step_many(self, requests: Any) -> Any:
        """The engine's, with the time it takes."""
        self.passes.append(len(requests))
        self.clock.us += self.step_us
        return self._step_many(requests)

    def run(self, ms: float) -> None:
        """Lets so much time pass, and everything happen that is due meanwhile."""
        end_us = self.clock.us + int(ms * 1000)
        for _ in range(100_000):
            wait_s = self.live.poll()
            if wait_s is not None and wait_s == 0:
                if self.clock.us >= end_us:
                    return
                continue
            next_us = end_us if wait_s is None else self.clock.us + round(wait_s * 1e6)
            if next_us >= end_us:
                self.clock.us = max(end_us, self.clock.us)
                if self.live.poll() != 0:
                    return
            else:
                self.clock.us = next_us
        raise AssertionError("the driver never waits")

    def talk(self, session: LiveSession, n_turns: int, seed: int = 0) -> list[LiveTurn]:
        """Pushes whole micro-turns as time goes by; returns what came out."""
        turns: list[LiveTurn] = []
        for n in range(n_turns):
            session.push_audio(sound(seed * 1000 + n))
            self.run(200)
            turns += drain(session)
        return turns

    def recomputed(self, session_id: str, **options: Any) -> list[tuple[int, ...]]:
        """Token ids of the same stream, stepped without a clock."""
        with self.engine.open_session(**options) as session:
            return [turn.token_ids for turn in replay(session, self.entries[session_id])]

    def _note(self, session_id: str, entry: Entry) -> None:
        self.entries.setdefault(session_id, []).append(entry)


def drain(session: LiveSession) -> list[LiveTurn]:
    """All that can be read now."""
    turns: list[LiveTurn] = []
    while (turn := session.get(0)) is not None:
        turns.append(turn)
    return turns


def tokens(turns: list[LiveTurn]) -> list[tuple[int, ...]]:
    return [out.turn.token_ids for out in turns]
