"""What the live tests share: a very small model, sound, and a simulation that talks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duplex_engine.live import LiveSession, LiveTurn
from duplex_engine.live.simulation import Simulation, drain
from duplex_engine.models.random import write_random_checkpoint

__all__ = ["TURN", "Scene", "drain", "smallest_checkpoint", "sound", "tokens"]

TURN = 3200  # samples of a micro-turn


def smallest_checkpoint(folder: Path, seed: int = 7) -> Path:
    return write_random_checkpoint(folder, "smallest", seed=seed)


def sound(seed: int, n: int = TURN) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * 0.1).astype(np.float32)


class Scene(Simulation):
    """A simulation with a user who talks."""

    def talk(self, session: LiveSession, n_turns: int, seed: int = 0) -> list[LiveTurn]:
        """Pushes whole micro-turns as time goes by; returns what came out."""
        turns: list[LiveTurn] = []
        for n in range(n_turns):
            session.push_audio(sound(seed * 1000 + n))
            self.run(200)
            turns += drain(session)
        return turns

    def tokens_again(self, session_id: str) -> list[tuple[int, ...]]:
        """Token ids of the same stream, stepped without a clock."""
        return [turn.token_ids for turn in self.recomputed(session_id)]


def tokens(turns: list[LiveTurn]) -> list[tuple[int, ...]]:
    return [out.turn.token_ids for out in turns]
