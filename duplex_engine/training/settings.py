"""What a training run is told: the settings, and what contradicts itself in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from duplex_engine.errors import InvalidArgument
from duplex_engine.training.model import SIZES
from duplex_engine.training.rows import N_TURNS

__all__ = ["Settings"]

ROWS_PER_TURN = 5.5  # 4 frames, `listen`, and what else comes on average; more is cut off


@dataclass(frozen=True, slots=True)
class Settings:
    """One run.

    Attributes:
        out: folder of the checkpoint and the log.
        bank: a speech bank: episodes are composed as the run goes on.
        shards: else a folder of ready episodes.
        after: a checkpoint of a finished run, from which this one goes on as its second part; or
            the folder of an exported one.
        p_drill: of a bank, the share of scenes that are drills in hearing.
        replays: of a bank, how often an episode is learnt again, with other mistakes and masks.
        size: a name of `model.SIZES`.
        batch: sequences of a step, all processes together.
        turns: micro-turns of an episode.
        hours, steps: the budget, one or both; the rate falls to 0 over whichever ends first.
        rate: peak learning rate.
        seed: of weights and data.
        processes: each has one core and its share of every batch.
        workers: processes that compose beside each of these; 0: it composes itself.
        device: "cpu" or "cuda".
        autocast: compute matrix products in bfloat16.
        compiled: compile parts of the network, which takes half a minute once.
    """

    out: Path
    bank: Path | None = None
    shards: Path | None = None
    after: Path | None = None
    p_drill: float = 0.0
    replays: int = 1
    size: str = "small"
    batch: int = 4
    turns: int = N_TURNS
    hours: float | None = None
    steps: int | None = None
    rate: float = 2e-3
    seed: int = 0
    processes: int = 1
    workers: int = 0
    device: str = "cpu"
    autocast: bool = True
    compiled: bool = True

    def check(self) -> None:
        """Raises InvalidArgument for settings that contradict each other."""
        if (self.bank is None) == (self.shards is None):
            raise InvalidArgument("data: expected one of bank and shards, found both or none")
        if not 0.0 <= self.p_drill <= 1.0 or (self.p_drill > 0.0 and self.bank is None):
            raise InvalidArgument(
                f"p_drill: expected 0 to 1, and a bank to compose drills from, found {self.p_drill}"
            )
        for name in ("replays", "workers", "seed"):
            if getattr(self, name) < 0:
                raise InvalidArgument(f"{name}: expected 0 or more, found {getattr(self, name)}")
        if self.hours is None and self.steps is None:
            raise InvalidArgument("budget: expected hours or steps, found neither")
        for name in ("batch", "turns", "hours", "steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidArgument(f"{name}: expected more than 0, found {value}")
        if self.size not in SIZES:
            raise InvalidArgument(f"size: expected one of {', '.join(SIZES)}, found {self.size!r}")
        if self.processes < 1 or self.batch % self.processes:
            raise InvalidArgument(
                f"batch: expected a multiple of the {self.processes} processes, found {self.batch}"
            )
        if self.processes > 1 and self.device != "cpu":
            raise InvalidArgument(f"processes: expected 1 on {self.device}, found {self.processes}")

    @property
    def share(self) -> int:
        """Sequences of a step that each process learns."""
        return self.batch // self.processes

    @property
    def n_rows(self) -> int:
        """Rows of every sequence: one shape, for which the network is compiled once."""
        return round(self.turns * ROWS_PER_TURN)
