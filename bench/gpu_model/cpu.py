"""The same model on the CPU backend, where prediction and measurement can be put side by side.

The machine is measured in the same run: how fast it reads as many bytes as a pass does
(bench/native's reader), and how long single operations of the backend take away from any model: a
product for 1, 5 and 21 rows, attention for as many at the context, and the operations on rows. A
pass is then predicted as the sum of its operations, each reading or computing, whichever takes
longer. Nothing is fitted to the micro-turns. Machines are shared, and disturbances only ever slow:
of all times the lower quartile counts, and of the machine, measured before and after, the better.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.native import Bits, Kernel, Reader
from bench.shapes import KV_BYTES, SHAPES, Shape
from duplex_engine import Engine, Session
from duplex_engine.config import ModelConfig
from duplex_engine.evaluation.work import FORMATS, RECIPES, Op, Pass, pass_work
from duplex_engine.models.random import preset_config

CONTEXT = 1024
TURN_ROWS = 4  # of a silent micro-turn, with the token of the turn before a fifth
ROWS = (1, 5, 21)  # for which operations are timed alone
ROUNDS, READS = 15, 9
MAX_READ_BYTES = 1 << 30
RECIPE: dict[Bits, str] = {"bf16": "bfloat16", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True, slots=True)
class Cpu:
    """Operations of one shape in one format on this machine in this minute.

    For each count of ROWS: microseconds of one weight in a product, and of attention of one layer
    that sees CONTEXT; microseconds of operations on rows, for each byte that they state.
    """

    product_us: Sequence[float]
    attention_us: Sequence[float]
    row_us: dict[str, float]

    def better(self, other: Cpu) -> Cpu:
        """The lower of each."""
        return Cpu(
            [min(pair) for pair in zip(self.product_us, other.product_us, strict=True)],
            [min(pair) for pair in zip(self.attention_us, other.attention_us, strict=True)],
            {name: min(us, other.row_us[name]) for name, us in self.row_us.items()},
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one task: milliseconds measured and predicted, in all and by kind."""

    shape: str
    bits: Bits
    task: str
    measured_ms: float
    predicted_ms: float
    read_gb_per_s: float
    parts_ms: dict[str, float]

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted_ms / self.measured_ms - 1


def _quiet(seconds: Callable[[], float], n: int = ROUNDS) -> float:
    """The lower quartile of n calls, after one that does not count."""
    seconds()
    return float(np.quantile([seconds() for _ in range(n)], 0.25))


def _kernel_us(name: str, dtype: str, **sizes: int) -> float:
    with Kernel(name, dtype, **sizes) as kernel:
        return 1e6 * _quiet(kernel.seconds)


def measure_cpu(shape: Shape, bits: Bits) -> Cpu:
    """Times operations of the shape's sizes."""
    p = shape.preset
    matrices = shape.mlp_matrices(shape.layers[-1])
    n_out, n_in = matrices[0] if len(matrices) == 2 else matrices[1]
    heads = {
        "n_heads": p.heads[0],
        "n_kv_heads": p.heads[1],
        "d_head": p.d_head,
        "rel_extent": p.rel_extent,
    }
    sizes: dict[str, dict[str, int]] = {
        "kv_append": heads | {"context": CONTEXT},
        "conv_add_norm": {"n_in": p.d_model},
        "norm": {"n_in": p.d_model},
        "silu_mul": {"n_in": p.d_ff},
    }
    rows = ROWS[1]
    stated = {op.name: op.row_bytes for op in _ops(shape, "bf16", Pass(text=rows))}
    return Cpu(
        [_kernel_us("linear", bits, rows=n, n_out=n_out, n_in=n_in) / (n_out * n_in) for n in ROWS],
        [_kernel_us("attention", "bf16", rows=n, context=CONTEXT, **heads) for n in ROWS],
        {
            name: _kernel_us(name, "bf16", rows=rows, **given) / stated[name]
            for name, given in sizes.items()
        },
    )


def _ops(shape: Shape, bits: Bits, p: Pass) -> list[Op]:
    config = ModelConfig.from_dict(preset_config(shape.preset))
    return pass_work(config, RECIPES[RECIPE[bits]], p)


def read_per_s(n_bytes: float) -> float:
    """Bytes a second of reading so many bytes, from end to end, again and again."""
    with Reader(int(min(max(n_bytes, 1 << 21), MAX_READ_BYTES))) as reader:
        return 1e9 / _quiet(lambda: 1 / reader.gigabytes_per_second(), READS)


def _op_us(op: Op, n_rows: int, cpu: Cpu, per_s: float, seen: float) -> float:
    """`seen`: keys and values of a layer that sees CONTEXT, in bytes."""
    if op.kind in ("rows", "encoders"):
        return op.row_bytes * cpu.row_us.get(op.name.split()[0], cpu.row_us["norm"])
    read_us = 1e6 * (op.weight_bytes + op.cache_bytes) / per_s
    if op.kind == "attention":
        work_us = float(np.interp(n_rows, ROWS, cpu.attention_us)) * op.cache_bytes / seen
    else:
        # Rows that meet a weight: of experts few, however many rows the pass has.
        format = FORMATS[op.format]
        n_weights = op.weight_bytes * (1 << 16) / format.bytes(1, 1 << 16)
        rows = op.operations / 2 / n_weights
        work_us = n_weights * float(np.interp(rows, ROWS, cpu.product_us))
    return max(read_us, work_us)


def predict_ms(
    shape: Shape, bits: Bits, cpu: Cpu, per_s: float, passes: list[tuple[Pass, int]]
) -> dict[str, float]:
    """Milliseconds by kind of operation; the head once for every pass."""
    parts: dict[str, float] = {}
    seen = 2 * CONTEXT * shape.preset.heads[1] * shape.preset.d_head * KV_BYTES
    for p, times in passes:
        for op in _ops(shape, bits, p):
            us = times * op.n * _op_us(op, p.n_rows, cpu, per_s, seen)
            parts[op.kind] = parts.get(op.kind, 0.0) + us / 1000
    return parts


def _silent(session: Session) -> None:
    session.step(text=_ids(TURN_ROWS), max_tokens=1)


def _long_turn(session: Session) -> None:
    session.append(text=_ids(20))
    session.decode(5)


# Name, passes, and the call, which begins in mid-turn: a newest token waits to be fed.
TASKS: list[tuple[str, list[tuple[Pass, int]], Callable[[Session], None]]] = [
    ("silent", [(Pass(text=TURN_ROWS + 1, context=CONTEXT), 1)], _silent),
    ("20+5", [(Pass(text=21, context=CONTEXT), 1), (Pass(context=CONTEXT), 4)], _long_turn),
]


def _ids(n: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(0).integers(300, 4096, n).tolist()
    return drawn


def _measure_ms(engine: Engine, call: Callable[[Session], None], n_rows: int) -> float:
    """Turns of `n_rows` one after the other, as in a stream, with CONTEXT behind the middle one."""
    with engine.open_session() as session:
        session.append(text=_ids(CONTEXT - ROUNDS // 2 * n_rows))
        session.decode(1)

        def once() -> float:
            begin = time.perf_counter()
            call(session)
            return 1e3 * (time.perf_counter() - begin)

        return _quiet(once)


def compare(name: str, bits: Bits, folder: Path) -> Iterator[Comparison]:
    """Measures one shape in one format, and the machine before and after, and predicts it."""
    options: dict[str, Any] = {} if bits == "bf16" else {"weights": bits}
    shape = SHAPES[name]
    memory = (64 << 20) + 2 * shape.tape_bytes(2 * CONTEXT)
    with Engine.load(
        shape.checkpoint(folder), dtype="bfloat16", memory=memory, max_positions=2048, **options
    ) as engine:
        for task, passes, call in TASKS:
            ops = _ops(shape, bits, passes[-1][0])
            n_bytes = sum(op.n * (op.weight_bytes + op.cache_bytes) for op in ops)
            before, reading = measure_cpu(shape, bits), read_per_s(n_bytes)
            ms = _measure_ms(engine, call, sum(p.n_rows * n for p, n in passes))
            per_s = max(reading, read_per_s(n_bytes))
            cpu = before.better(measure_cpu(shape, bits))
            parts = predict_ms(shape, bits, cpu, per_s, passes)
            yield Comparison(name, bits, task, ms, sum(parts.values()), per_s / 1e9, parts)
