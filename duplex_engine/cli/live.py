"""How a micro-turn is shown: one line for people, one JSON object for programs.

Owns the columns and the keys. Does not own the stream: see `stream.py`.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from duplex_engine.types import Delegation, Event, Forgot, MergedTurns, MicroTurn, MissingAudio

__all__ = ["JsonView", "LineView", "View", "level_db"]

BARS = " ▁▂▃▄▅▆▇█"
N_BARS = 8  # levels shown per micro-turn
QUIET_DB, LOUD_DB = -60.0, -10.0  # what the lowest and the highest bar stand for


class View(Protocol):
    """Something that shows a stream."""

    def note(self, text: str) -> None:
        """Says something about the run itself."""

    def show(self, turn: MicroTurn, heard: NDArray[np.float32], caption: str = "") -> None:
        """Shows one micro-turn, the sound (n,) since the last one, and what is said in it."""

    def end(self) -> None:
        """Sums up."""


def level_db(samples: NDArray[np.float32]) -> float:
    """Root mean square of samples in [-1, 1] in dB; 0 is a full square wave, at least -120."""
    power = float(np.mean(np.square(samples, dtype=np.float64))) if samples.size else 0.0
    return max(10 * float(np.log10(max(power, 1e-12))), -120.0)


class JsonView:
    """One JSON object per micro-turn on stdout, notes on stderr."""

    def note(self, text: str) -> None:
        """Says something about the run itself."""
        print(text, file=sys.stderr)

    def show(self, turn: MicroTurn, heard: NDArray[np.float32], caption: str = "") -> None:
        """Prints the fields of `MicroTurn`, the type of each event, level and caption of the sound.

        The caption is there only where there is one.
        """
        values = asdict(turn)
        values["events"] = [{"type": type(event).__name__} | asdict(event) for event in turn.events]
        values["input"]["level_db"] = round(level_db(heard), 1)
        if caption:
            values["input"]["caption"] = caption
        print(json.dumps(values), flush=True)

    def end(self) -> None:
        """Nothing: the objects say all."""


@dataclass
class LineView:
    """One line per micro-turn.

    caption_width: characters for what the user says, where that is known.
    """

    turn_ms: int
    caption_width: int = 0
    out: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    _total_us: list[int] = field(default_factory=list)
    _n_tokens: int = 0

    def note(self, text: str) -> None:
        """Says something about the run itself."""
        self.out.print(Text(text, style="yellow"))

    def show(self, turn: MicroTurn, heard: NDArray[np.float32], caption: str = "") -> None:
        """Prints number, time, level, milliseconds, memory, caption and output."""
        if not self._total_us:
            self.out.print(
                "turn    time  heard                   ms      memory  "
                + f"{'user' * bool(self.caption_width):{self.caption_width}}said",
                style="bold",
            )
        total_ms = turn.timing.total_us / 1000
        line = Text(f"{turn.index:4d} {turn.index * self.turn_ms / 1000:6.1f}s  ")
        line.append(f"{_bars(heard)} {level_db(heard):4.0f} dB", style="cyan")
        line.append(f" {total_ms:9.2f}", style="red" if total_ms > self.turn_ms else "green")
        line.append(f" {turn.memory.sequence_bytes / 2**20:7.2f} MiB  ", style="dim")
        if self.caption_width:
            line.append(f"{caption:{self.caption_width}}", style="cyan")
        line.append(Text(_printable(turn.text.strip()), "bold") if turn.text else _silence(turn))
        for event in turn.events:
            line.append(f"  [{_described(event)}]", style="magenta")
        self.out.print(line)
        self._total_us.append(turn.timing.total_us)
        self._n_tokens += len(turn.token_ids)

    def end(self) -> None:
        """Prints how long the micro-turns took."""
        if not self._total_us:
            return
        late = sum(us > self.turn_ms * 1000 for us in self._total_us)
        self.out.print(
            f"{len(self._total_us)} micro-turns of {self.turn_ms} ms: "
            f"median {statistics.median(self._total_us) / 1000:.2f} ms, "
            f"longest {max(self._total_us) / 1000:.2f} ms, {late} late; {self._n_tokens} tokens",
            style="bold",
        )


def _bars(samples: NDArray[np.float32]) -> str:
    if not samples.size:
        return BARS[0] * N_BARS
    levels = np.array([level_db(part) for part in np.array_split(samples, N_BARS)])
    steps = (levels - QUIET_DB) / (LOUD_DB - QUIET_DB) * (len(BARS) - 1)
    return "".join(BARS[round(float(step))] for step in np.clip(steps, 0, len(BARS) - 1))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{MIDDLE DOT}" for c in text)


def _silence(turn: MicroTurn) -> Text:
    n_tokens = len(turn.token_ids)
    is_silent = n_tokens == 0 or (n_tokens == 1 and turn.stopped == "listen")
    return Text("(listens)" if is_silent else f"({n_tokens} tokens without text)", style="dim")


def _described(event: Event) -> str:
    match event:
        case Delegation(text=text, token_ids=ids):
            return f"delegates: {_printable(text) or f'{len(ids)} tokens'}"
        case MissingAudio(ms=ms):
            return f"{ms:.0f} ms of sound missing"
        case MergedTurns(count=count):
            return f"{count} earlier turns merged"
        case Forgot(begin=begin, end=end):
            return f"positions {begin} to {end} forgotten"
