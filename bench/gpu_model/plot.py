"""The picture of a prediction: a bar for each machine, split into what the time goes to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from duplex_engine.evaluation.prediction import PARTS
from duplex_engine.evaluation.prediction_tables import Case

PANELS = ("silent", "5 tokens")
GOALS_MS = {"silent": 10, "5 tokens": 30}


def plot_split(found: Sequence[Case], context: int, path: Path, title: str) -> None:
    """One panel for each kind of turn; public kernels beside the design, today's left out."""
    shown = [case for case in found if case.setup.variant != "today"]
    size = (12, 1.5 + 0.28 * len(shown))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="tight", sharey=True)
    names = [f"{case.name}, {case.setup.variant}" for case in shown]
    for axis, turn in zip(axes, PANELS, strict=True):
        left = [0.0] * len(shown)
        for part in PARTS:
            ms = [case.turns[context][turn].parts_ms[part] for case in shown]
            axis.barh(names, ms, left=left, label=part)
            left = [a + b for a, b in zip(left, ms, strict=True)]
        goal = GOALS_MS[turn]
        axis.axvline(goal, color="black", linewidth=1, linestyle="--", label=f"goal {goal} ms")
        axis.set(xlabel="predicted ms", title=f"micro-turn: {turn}, {context} positions")
    axes[0].invert_yaxis()  # the axes share it
    axes[1].legend(fontsize="small")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
