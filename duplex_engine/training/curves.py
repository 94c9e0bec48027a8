"""The learning curves of a run, or of one and those that went on from it, drawn from their logs.

python -m duplex_engine.training.curves out/run --out out/learning.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from duplex_engine.training.command import run_command
from duplex_engine.training.train import LOG

__all__ = ["plot_curves"]

LOSSES = {"token": "next output", "word": "word just heard"}
SHARES = {"spoken": "outputs", "heard": "words just heard"}
SMOOTHING = 0.9  # of the training curves, from log line to log line
DPI = 110


def plot_curves(runs: Sequence[Path], path: Path) -> None:
    """Writes a PNG: losses and shares of right answers, in training and on held-out voices.

    Raises:
        FileNotFoundError: a folder holds no log.
    """
    lines: list[dict[str, float]] = []
    begins_s: list[float] = []
    for run in runs:
        begin_s = lines[-1]["elapsed_s"] if lines else 0.0
        begins_s.append(begin_s)
        for line in _read_log(run / LOG):
            lines.append(line | {"elapsed_s": begin_s + line["elapsed_s"]})
    figure = Figure(figsize=(11, 4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes, names in ((left, LOSSES), (right, SHARES)):
        for colour, (key, label) in zip(("tab:blue", "tab:orange"), names.items(), strict=True):
            _draw(axes, lines, key, f"{label}, training", smooth=True, color=colour, alpha=0.45)
            _draw(axes, lines, f"held_{key}", f"{label}, held-out voices", color=colour, marker=".")
    drilled = "words in no order, held-out voices"
    _draw(right, lines, "drill_heard", drilled, color="tab:green", marker=".")
    for axes in (left, right):
        for begin_s in begins_s[1:]:
            axes.axvline(begin_s / 60, color="grey", linestyle=":")
        axes.set_xlabel("minutes")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set(yscale="log", ylabel="cross-entropy")
    right.set(ylim=(0, 1), ylabel="share of right ones, the stream so far given")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log, less what was learnt again because a run was killed after it."""
    lines: list[dict[str, float]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        while lines and lines[-1]["step"] > line["step"]:
            lines.pop()
        lines.append(line)
    return lines


def _draw(
    axes: Any,
    lines: list[dict[str, float]],
    key: str,
    label: str,
    *,
    smooth: bool = False,
    **style: Any,
) -> None:
    points = [(line["elapsed_s"] / 60, line[key]) for line in lines if key in line]
    if not points:
        return
    minutes, values = zip(*points, strict=True)
    if smooth:
        smoothed = [values[0]]
        for value in values[1:]:
            smoothed.append(SMOOTHING * smoothed[-1] + (1 - SMOOTHING) * value)
        values = tuple(smoothed)
    axes.plot(minutes, values, label=label, **style)


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders of a run and of its later parts.")],
    out: Annotated[Path, typer.Option(help="The PNG.")] = Path("learning.png"),
) -> None:
    """Draws the learning curves of a run, its parts one after the other."""
    plot_curves(runs, out)


if __name__ == "__main__":
    run_command(main)
