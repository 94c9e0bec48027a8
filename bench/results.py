"""Rows of results: one JSON object per measurement, and what is computed from them.

A row has engine, bits, shape, context, task, round, ms and preempted (how often the system took the
processor away meanwhile). Suites and comparisons write the same rows, so `compare.py` reads both.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
KEYS = ("shape", "context", "task", "engine", "bits")


MIN_CLEAN = 5


@dataclass(frozen=True, slots=True)
class Summary:
    """Of the milliseconds of one case: of the clean ones, in which the system took no processor
    away, where there are at least MIN_CLEAN of them; else of all."""

    n: int
    n_clean: int
    best: float
    median: float
    p90: float
    p99: float


def key(row: Row) -> tuple[str, ...]:
    """Which case a row belongs to."""
    return tuple(str(row.get(name, "")) for name in KEYS)


def summarize(rows: Iterable[Row]) -> dict[tuple[str, ...], Summary]:
    """One summary per case, in the order of first appearance."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if "ms" in row:
            cases.setdefault(key(row), []).append(row)
    return {case: _summary(members) for case, members in cases.items()}


def _summary(rows: Sequence[Row]) -> Summary:
    clean = [row for row in rows if not row.get("preempted")]
    used = clean if len(clean) >= MIN_CLEAN else rows
    quantiles = np.quantile([row["ms"] for row in used], (0, 0.5, 0.9, 0.99))
    return Summary(len(rows), len(clean), *(float(value) for value in quantiles))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def machine() -> Row:
    """Where and from which commit a run comes; no host name."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = f"{names[0].partition(':')[2].strip()}, {len(names)} cores" if names else ""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {"processor": processor, "commit": commit}
