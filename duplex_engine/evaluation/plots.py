"""Pictures of what was measured: latencies as a histogram, one stream as a timeline.

Owns the look. matplotlib is needed here only (extra `plots`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duplex_engine.arrays import SAMPLE_RATE
from duplex_engine.errors import BackendUnavailable
from duplex_engine.evaluation.metrics import StreamScore
from duplex_engine.evaluation.streams import Audio, StreamLog, TimedWord

__all__ = ["plot_latencies", "plot_timeline"]

BIN_MS = 20
DPI = 110
ROW_S = 13.0  # of a timeline
COLUMN = 160  # samples that one step of an envelope stands for
HEARD, DUE, SAID, ALARM = "dimgray", "tab:orange", "tab:blue", "tab:red"


def plot_latencies(path: Path, systems: Mapping[str, Sequence[StreamScore]]) -> None:
    """Writes a PNG: for each system, how long after its moment each right reaction came.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    figure, (axes,) = _figure(8, 3.6)
    every = {
        name: [
            1000 * event.latency_s
            for score in scores
            for event in score.events
            if event.outcome == "right" and event.latency_s is not None and event.kind != "stop"
        ]
        for name, scores in systems.items()
    }
    highest = max([latency for values in every.values() for latency in values], default=1000.0)
    bins = np.arange(0, highest + 2 * BIN_MS, BIN_MS)
    for name, values in every.items():
        label = f"{name} (n = {len(values)})"
        if values:
            label += f", median {np.median(values):.0f} ms"
        axes.hist(values, bins, alpha=0.6, label=label)
    axes.set_xlabel("milliseconds from the decisive moment to the output")
    axes.set_ylabel("reactions")
    axes.legend()
    _save(figure, path)


def plot_timeline(
    path: Path,
    audio: Audio,
    log: StreamLog,
    *,
    alarms_s: Sequence[float] = (),
    heard: Sequence[TimedWord] = (),
    due: Sequence[TimedWord] = (),
) -> None:
    """Writes a PNG: the sound, what was heard when, what was due, and what the model said.

    Args:
        path: of the PNG.
        audio: (n,) samples at 16 kHz.
        log: of the stream.
        alarms_s: when false alarms began; they are marked.
        heard: what the user said, shown where it ends.
        due: what should be said, from the decisive moment on.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    n_rows = max(math.ceil(len(audio) / SAMPLE_RATE / ROW_S), 1)
    figure, rows = _figure(14, 2.6 * n_rows, n_rows)
    for i, axes in enumerate(rows):
        _draw_sound(axes, audio, i * ROW_S)
        for word in heard:
            _draw_word(axes, word.end_s, 1.1, word.text, HEARD)
        for word in due:
            axes.axvline(word.start_s, color=DUE, lw=0.9, ls=":")
            _draw_word(axes, word.start_s, 2.0, word.text, DUE)
        for turn in log.turns:
            requests = [f"→ {request}" for request in turn.delegations]
            if text := " ".join([*requests, turn.text.strip()]).strip():
                axes.axvline(turn.emitted_s, ymax=0.45, color=SAID, lw=0.9)
                _draw_word(axes, turn.emitted_s, -2.0, text, SAID)
        for alarm_s in alarms_s:
            axes.plot([alarm_s], [-1.1], marker="x", color=ALARM)
        axes.set(xlim=(i * ROW_S, (i + 1) * ROW_S), ylim=(-2.2, 2.7), yticks=[])
    rows[0].set_title("dotted: due; line below: said; x: false alarm", fontsize=8, loc="left")
    rows[-1].set_xlabel("seconds")
    _save(figure, path)


def _draw_sound(axes: Any, audio: Audio, start_s: float) -> None:
    """The envelope of one row, as high as the whole recording is loud."""
    part = audio[round(start_s * SAMPLE_RATE) : round((start_s + ROW_S) * SAMPLE_RATE)]
    columns = part[: len(part) // COLUMN * COLUMN].reshape(-1, COLUMN)
    time_s = start_s + np.arange(len(columns)) * COLUMN / SAMPLE_RATE
    peak = float(np.abs(audio).max(initial=1e-9))
    axes.fill_between(
        time_s, columns.min(axis=1) / peak, columns.max(axis=1) / peak, color=HEARD, alpha=0.5, lw=0
    )


def _draw_word(axes: Any, time_s: float, height: float, text: str, colour: str) -> None:
    axes.text(time_s, height, text, fontsize=7.5, color=colour, rotation=25, clip_on=True)


def _figure(width: float, height: float, n_rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure without any window system behind it, and the axes of its rows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailable(
            f"plots: expected the package matplotlib, found: {error}; "
            "pip install 'duplex_engine[plots]'"
        ) from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(n_rows, squeeze=False)[:, 0])


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path)
