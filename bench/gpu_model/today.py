"""Fits what our CUDA kernels took, the day they were measured on a GPU (docs/GPU.md).

    python -m bench.gpu_model.today

The measurements are those of `duplex-engine gpu-check` on one H200, before passes were recorded,
and of single kernels in Nsight Compute. Attention, norms, convolutions and products of many rows
have been made anew since; nobody has measured those. The fit is in relative least squares, nothing
negative. Prints each measurement beside what the model then says, and ends with status 1 where
TODAY in `duplex_engine/evaluation/machines.py` is not what was fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

from duplex_engine.config import ModelConfig
from duplex_engine.evaluation.gpu_check import SHAPES
from duplex_engine.evaluation.machines import MACHINES, TODAY, Today
from duplex_engine.evaluation.prediction import HEAD_ROWS, Setup, counts_today, work_us
from duplex_engine.evaluation.work import Op, Pass, pass_work
from duplex_engine.models.random import PRESETS, Preset, preset_config

GPU = "H200"
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Measured:
    """Passes, tokens chosen by each of the sessions, and the milliseconds of all."""

    shape: str
    what: str
    passes: tuple[Pass, ...]
    n_tokens: int
    ms: float


def _calls(shape: str, context: int, *ms: float) -> Iterator[Measured]:
    """Of one row of the table in docs/GPU.md: append 1, append 20, append 20 and decode 5."""
    one, twenty = Pass(text=1, context=context), Pass(text=20, context=context)
    turn = (Pass(text=21, context=context), one, one, one, one)
    yield Measured(shape, f"append 1 at {context}", (one,), 0, ms[0])
    yield Measured(shape, f"append 20 at {context}", (twenty,), 0, ms[1])
    yield Measured(shape, f"append 20, decode 5 at {context}", turn, 5, ms[2])


def _silent(shape: str, n_sessions: int, ms: float) -> Measured:
    p = Pass(n_sessions, audio=4, text=1, context=256)
    return Measured(shape, f"silent micro-turn of {n_sessions}", (p,), 1, ms)


MEASURED = [
    *_calls("small", 1024, 0.57, 0.66, 3.08),
    *_calls("small", 4096, 0.58, 0.71, 3.16),
    *_calls("0.6b", 1024, 3.02, 3.31, 15.98),
    *_calls("0.6b", 4096, 3.04, 3.57, 16.46),
    *(_silent("small", n, ms) for n, ms in ((1, 0.63), (8, 1.66), (32, 4.94))),
    *(_silent("0.6b", n, ms) for n, ms in ((1, 2.64), (8, 5.03))),
]
# Nsight Compute, cold caches, "0.6b", 1 row at 1k: microseconds of operations of one layer.
KERNELS = {"attention": 34.0, "conv_add_norm": 16.0, "qkvr": 6.5}


def setup(shape: str) -> Setup:
    """Of a shape of gpu-check, in bfloat16."""
    preset = SHAPES[shape].preset
    sizes = preset if isinstance(preset, Preset) else PRESETS[preset]
    config = ModelConfig.from_dict(preset_config(sizes))
    return Setup(config, MACHINES[GPU], variant="today")


def _costs(ops: Iterable[tuple[float, Op]], on: Setup) -> tuple[float, NDArray[np.float64]]:
    """Microseconds of bytes and arithmetic, and how often each cost of Today comes on top."""
    us, counts = 0.0, np.zeros(len(TODAY))
    for n, op in ops:
        us += n * work_us(op, on)
        counts += n * np.array(counts_today(op, on.machine), np.float64)
    return us, counts


def _call(one: Measured) -> tuple[float, NDArray[np.float64]]:
    """Of passes without their heads, then the heads and what the host does for each token."""
    on, n_sessions = setup(one.shape), one.passes[0].n_sessions
    ops: list[tuple[float, Op]] = []
    for p in one.passes:
        *layers, head = pass_work(on.config, on.formats, p)
        ops += ((op.n, op) for op in layers)
    ops.append((one.n_tokens * math.ceil(n_sessions / HEAD_ROWS), head))
    us, counts = _costs(ops, on)
    n = one.n_tokens * n_sessions
    return us, counts + np.array(Today(0, 0, 0, n, n * on.config.text.n_logits), np.float64)


def rows() -> Iterable[tuple[str, str, float, NDArray[np.float64], float]]:
    """Shape, what, microseconds that need no fit, how often each cost of Today, microseconds."""
    for one in MEASURED:
        known, counts = _call(one)
        yield one.shape, one.what, known, counts, 1000 * one.ms
    on = setup("0.6b")
    ops = pass_work(on.config, on.formats, Pass())
    for name, us in KERNELS.items():
        op = next(op for op in ops if op.name == name)
        known, counts = _costs([(1, op)], on)
        yield "0.6b", f"one {name}", known, counts, us


def main() -> None:
    """Fits, and prints what is left."""
    cases = list(rows())
    weights = np.array([1 / us for *_, us in cases])
    counts = np.stack([counts for _, _, _, counts, _ in cases])
    rest = np.array([us - known for _, _, known, _, us in cases])
    found, _ = nnls(counts * weights[:, None], rest * weights)
    fitted = Today(*(float(value) for value in found))
    table = Table("shape", "what", "measured us", "model us", "error %")
    errors = []
    for shape, what, known, counted, us in cases:
        model = known + float(counted @ found)
        errors.append(abs(model / us - 1))
        table.add_row(shape, what, f"{us:,.0f}", f"{model:,.0f}", f"{100 * (model / us - 1):+.0f}")
    console = Console()
    console.print(table)
    console.print(f"median error {np.median(errors):.1%}, largest {max(errors):.1%}")
    console.print(str(fitted))
    if any(abs(a - b) > max(TOLERANCE * a, 0.05) for a, b in zip(fitted, TODAY, strict=True)):
        console.print(f"in the table: {TODAY}", style="red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
