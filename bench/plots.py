"""Pictures of result rows: times of engines, distributions, cost against context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from bench.peers.table import FLOOR, FLOOR_KV8, OURS, OURS_KV8, of_same_kv
from bench.results import Row, key, summarize

FLOORS = (FLOOR.name, FLOOR_KV8.name)
COLORS = dict.fromkeys((OURS.name, OURS_KV8.name), "tab:blue") | dict.fromkeys(FLOORS, "tab:gray")
OTHER_COLOR = "tab:orange"


def plot_engines(rows: Sequence[Row], path: Path) -> None:
    """A panel per task: the median of every engine, and a line to its 90th percentile."""
    cases = summarize(rows)
    panels = list(dict.fromkeys(case[:3] for case in cases))
    if not panels:
        return
    figure, axes = _grid(len(panels))
    for panel, axis in zip(panels, axes, strict=False):
        members = sorted(
            (case for case in cases if case[:3] == panel), key=lambda c: -cases[c].median
        )
        labels = [f"{engine} {bits}" for *_, engine, bits in members]
        medians = [cases[case].median for case in members]
        above = [max(0.0, cases[case].p90 - cases[case].median) for case in members]
        colors = [COLORS.get(case[3], OTHER_COLOR) for case in members]
        axis.barh(labels, medians, xerr=[[0.0] * len(members), above], color=colors, ecolor="black")
        axis.set(title=_title(*panel), xlabel="ms, median and 90 %")
    _save(figure, path)


def plot_distributions(rows: Sequence[Row], path: Path) -> Path | None:
    """Which share of the measurements took at most so long: one line per engine and format."""
    timed = [row for row in rows if "ms" in row]
    panels: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in timed:
        shape, context, task, engine, bits = key(row)
        lines = panels.setdefault((shape, context, task), {})
        lines.setdefault(f"{engine} {bits}", []).append(row["ms"])
    if not panels:
        return None
    figure, axes = _grid(len(panels))
    for (name, lines), axis in zip(panels.items(), axes, strict=False):
        for label, values in lines.items():
            shares = (np.arange(len(values)) + 1) / len(values)
            axis.step(np.sort(values), shares, where="post", label=label)
        axis.set(title=_title(*name), xlabel="ms", ylabel="share", xscale="log")
        axis.legend(fontsize="x-small")
    return _save(figure, path)


def plot_contexts(rows: Sequence[Row], path: Path) -> Path | None:
    """Cost against context, where a task was measured at several."""
    panels: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for case, summary in summarize(rows).items():
        shape, context, task, engine, bits = case
        if context.isdigit():
            lines = panels.setdefault((shape, task), {})
            lines.setdefault(f"{engine} {bits}", {})[int(context)] = summary.median
    panels = {name: lines for name, lines in panels.items() if max(map(len, lines.values())) > 1}
    if not panels:
        return None
    figure, axes = _grid(len(panels))
    for ((shape, task), lines), axis in zip(panels.items(), axes, strict=False):
        for label, points in lines.items():
            contexts = sorted(points)
            axis.plot(contexts, [points[n] for n in contexts], marker="o", label=label)
        axis.set(title=f"{shape} {task}", xlabel="rows in the cache", ylabel="median ms")
        axis.set_ylim(0, None)
        axis.legend(fontsize="x-small")
    return _save(figure, path)


def plot_shares(rows: Sequence[Row], path: Path) -> Path | None:
    """Share of the bound of every operation (bench_kernels.py), or of the floor program."""
    shares: dict[str, float] = {}
    cases = summarize(rows)
    for row in rows:
        if "percent_of_bound" in row:
            shares[row["task"]] = row["percent_of_bound"]
    for case, summary in cases.items():
        if case[3] in FLOORS:
            continue
        floor = cases.get((*case[:3], of_same_kv(case[3], FLOOR, FLOOR_KV8).name, case[4]))
        if floor is not None:
            shares[" ".join(case)] = 100 * floor.median / summary.median
    if not shares:
        return None
    size = (8, 1 + 0.2 * len(shares))
    figure, axis = plt.subplots(figsize=size, layout="tight")
    axis.barh(list(shares)[::-1], list(shares.values())[::-1], color=COLORS[OURS.name])
    axis.axvline(100, color="black", linewidth=1)
    axis.set(xlabel="% of the limit of the same run")
    axis.tick_params(axis="y", labelsize="x-small")
    return _save(figure, path)


def _title(shape: str, context: str, task: str) -> str:
    return f"{shape} {task}" + (f" at {context} rows" if context else "")


def _grid(n: int) -> tuple[Any, Any]:
    """A figure of n panels, two in a line, and its axes in one row."""
    n_columns = min(2, n)
    n_lines = -(-n // n_columns)
    size = (7 * n_columns, 1 + 3.2 * n_lines)
    figure, axes = plt.subplots(n_lines, n_columns, figsize=size, layout="tight", squeeze=False)
    return figure, axes.flat


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
