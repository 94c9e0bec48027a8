"""What one micro-turn costs: bytes to read and operations to do, from the sizes alone.

Owns the figures of `duplex-engine inspect`; what a pass consists of says `evaluation/work.py`. It
reads every weight that it uses once and every visible key and value once, however many rows it has;
that is the floor, not a forecast.
"""

from __future__ import annotations

from dataclasses import dataclass

from duplex_engine.config import ModelConfig
from duplex_engine.evaluation.work import Format, Pass, Recipe, pass_work

__all__ = ["Cost", "Machine", "pass_cost", "turn_passes"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured here: bytes read and float32 operations per second, all threads."""

    read_bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a pass, or of several: bytes read, and operations (a multiply and an add are two)."""

    n_bytes: int
    operations: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.n_bytes + other.n_bytes, self.operations + other.operations)

    def floor_ms(self, machine: Machine) -> float:
        """Milliseconds below which one pass cannot get: its reading and its computing overlap."""
        return 1000 * max(
            self.n_bytes / machine.read_bytes_per_s, self.operations / machine.operations_per_s
        )


def turn_passes(config: ModelConfig, n_tokens: int) -> list[int]:
    """Rows of each pass of a micro-turn that puts out `n_tokens` and takes in nothing but sound.

    The last token of the turn before comes with the sound; each token but the last needs a pass.
    """
    n_frames = 4 if config.interaction is None else config.interaction.audio_frames
    return [n_frames + 1] + [1] * (n_tokens - 1)


def pass_cost(
    config: ModelConfig, n_rows: int, context: int, cache_bytes: float, weight_bytes: float
) -> Cost:
    """Cost of one pass of `n_rows` that sees `context` positions, logits of the last row included.

    cache_bytes, weight_bytes: of one element of the cache and of one weight.
    """
    format = Format("given", weight_bytes)
    rows = Pass(text=n_rows, context=context)
    ops = pass_work(config, Recipe(*[format] * len(Recipe._fields)), rows, cache_bytes=cache_bytes)
    n_bytes = sum(op.n * (op.weight_bytes + op.cache_bytes) for op in ops)
    return Cost(round(n_bytes), round(sum(op.n * op.operations for op in ops)))
