"""Fits what our CUDA kernels took, the day they were measured on a GPU (docs/GPU.md).

    python -m bench.gpu_model.today

The measurements are those of `duplex-engine gpu-check` on one H200: a turn is one launch, kernels
begin early, and gates and ups were activated by a kernel of their own. The fit is in relative least
squares, nothing negative; prefills are left out of it, as so few costs do not describe them. Prints
each measurement beside what the model then says, and ends with status 1 where TODAY in
`duplex_engine/evaluation/machines.py` is not what was fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls

from duplex_engine.config import ModelConfig
from duplex_engine.evaluation.gpu_check import PREFILL, SHAPES
from duplex_engine.evaluation.machines import MACHINES, TODAY, Today
from duplex_engine.evaluation.prediction import Setup, counts_today, work_us
from duplex_engine.evaluation.work import HEAD_ROWS, Pass, pass_work
from duplex_engine.models.random import PRESETS, Preset, preset_config

GPU = "H200"
TOLERANCE = 0.02
MAX_ROWS = 256  # of a pass, as Engine.load has it


@dataclass(frozen=True, slots=True)
class Measured:
    """Passes, tokens chosen by each of the sessions, and the milliseconds of all."""

    shape: str
    what: str
    passes: tuple[Pass, ...]
    n_tokens: int
    ms: float
    has_sound: bool = False
    is_fitted: bool = True


def _calls(shape: str, context: int, *ms: float) -> Iterator[Measured]:
    """Of one session; a first pass also takes the token that was chosen last."""
    one, five, twenty, more = (Pass(text=n, context=context) for n in (1, 5, 20, 21))
    yield Measured(shape, f"decode 1 at {context}", (one,), 1, ms[0])
    yield Measured(shape, f"append 4, decode 1 at {context}", (five,), 1, ms[1])
    yield Measured(shape, f"append 19, decode 1 at {context}", (twenty,), 1, ms[2])
    turn = (more, one, one, one, one)
    yield Measured(shape, f"append 20, decode 5 at {context}", turn, 5, ms[3])


def _silent(shape: str, n_sessions: int, ms: float) -> Measured:
    p = Pass(n_sessions, audio=4, text=1, context=1024)
    return Measured(shape, f"silent micro-turn of {n_sessions}", (p,), 1, ms, has_sound=True)


def _prefill(shape: str, ms: float) -> Measured:
    ends = range(MAX_ROWS, PREFILL + 1, MAX_ROWS)
    passes = tuple(Pass(text=MAX_ROWS, context=end) for end in ends)
    return Measured(shape, f"prefill {PREFILL}, decode 1", passes, 1, ms, is_fitted=False)


MEASURED = [
    *_calls("small", 1024, 0.277, 0.370, 0.475, 1.289),
    *_calls("small", 4096, 0.279, 0.366, 0.465, 1.326),
    *_calls("0.6b", 1024, 0.982, 1.197, 1.765, 5.542),
    *_calls("0.6b", 4096, 0.969, 1.143, 1.766, 5.603),
    *(_silent("small", n, ms) for n, ms in ((1, 0.389), (8, 1.186), (32, 4.242))),
    *(_silent("0.6b", n, ms) for n, ms in ((1, 1.293), (8, 3.125), (32, 10.519))),
    _prefill("small", 12.362),
    _prefill("0.6b", 70.127),
]


def setup(shape: str) -> Setup:
    """Of a shape of gpu-check, in bfloat16."""
    preset = SHAPES[shape].preset
    sizes = preset if isinstance(preset, Preset) else PRESETS[preset]
    config = ModelConfig.from_dict(preset_config(sizes))
    return Setup(config, MACHINES[GPU], variant="today")


def costs(one: Measured) -> tuple[float, NDArray[np.float64]]:
    """Microseconds of bytes and arithmetic, and how often each cost of Today comes on top."""
    on, n_sessions = setup(one.shape), one.passes[0].n_sessions
    us, counts = 0.0, np.zeros(len(TODAY))
    n_heads = one.n_tokens * math.ceil(n_sessions / HEAD_ROWS)
    for number, p in enumerate(one.passes):
        for op in pass_work(on.config, on.formats, p):
            n = op.n
            if op.kind == "head":  # of all tokens, once
                n = n_heads if number == 0 else 0
            us += n * work_us(op, on)
            if op.name == "gate_up":  # silu_mul, that day
                op = replace(op, launches=op.launches + 1)
            counts += n * np.array(counts_today(op, on.machine), np.float64)
    n_with_sound = n_sessions if one.has_sound else 0
    return us, counts + np.array(Today(0, 0, 0, 0, n_sessions, n_with_sound), np.float64)


def main() -> None:
    """Fits, and prints what is left."""
    known, counts = (np.array(each) for each in zip(*map(costs, MEASURED), strict=True))
    measured = np.array([1000 * one.ms for one in MEASURED])
    fitted = [one.is_fitted for one in MEASURED]
    found, _ = nnls((counts / measured[:, None])[fitted], ((measured - known) / measured)[fitted])
    model = known + counts @ found
    errors = model / measured - 1
    table = Table("shape", "what", "measured us", "model us", "error %")
    for one, *numbers in zip(MEASURED, measured, model, 100 * errors, strict=True):
        table.add_row(one.shape, one.what, *(f"{x:,.0f}" for x in numbers))
    console = Console()
    console.print(table)
    sizes = np.abs(errors[fitted])
    console.print(
        f"without prefills: median error {np.median(sizes):.1%}, largest {sizes.max():.1%}"
    )
    of_fit = Today(*(float(value) for value in found))
    console.print(str(of_fit))
    if any(abs(a - b) > max(TOLERANCE * a, 0.05) for a, b in zip(of_fit, TODAY, strict=True)):
        console.print(f"in the table: {TODAY}", style="red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
