"""Pictures of result rows: times of engines, distributions, cost against context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from bench.results import Row, summarize

OURS, FLOOR = "duplex", "floor"
COLORS = {OURS: "tab:blue", FLOOR: "tab:gray"}
OTHER_COLOR = "tab:orange"


def plot_engines(rows: Sequence[Row], path: Path) -> None:
    """A panel per task: the median of every engine, and a line to its 90th percentile."""
    cases = summarize(rows)
    panels = list(dict.fromkeys(case[:3] for case in cases))
    if not panels:
        return
    n_columns = min(2, len(panels))
    n_lines = -(-len(panels) // n_columns)
    size = (7 * n_columns, 1 + 3.2 * n_lines)
    figure, axes = plt.subplots(n_lines, n_columns, figsize=size, layout="tight", squeeze=False)
    for panel, axis in zip(panels, axes.flat, strict=False):
        members = sorted(
            (case for case in cases if case[:3] == panel), key=lambda c: -cases[c].median
        )
        labels = [f"{engine} {bits}" for *_, engine, bits in members]
        medians = [cases[case].median for case in members]
        above = [max(0.0, cases[case].p90 - cases[case].median) for case in members]
        colors = [COLORS.get(case[3], OTHER_COLOR) for case in members]
        axis.barh(labels, medians, xerr=[[0.0] * len(members), above], color=colors, ecolor="black")
        shape, context, task = panel
        axis.set(title=f"{shape}: {task} at {context} rows", xlabel="ms, median and 90 %")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
