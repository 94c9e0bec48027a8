"""How long a micro-turn should take on a GPU, and how many sessions one node should hold.

A forecast, not a measurement: `work.py` says what a pass consists of, `machines.py` how fast
published kernels do such work, and a variant how our kernels relate to those. Calibration, errors,
tables and pictures: `bench/gpu_model/`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from duplex_engine.config import ModelConfig
from duplex_engine.evaluation.machines import TODAY, Fit, Machine, Today
from duplex_engine.evaluation.work import (
    HEAD_ROWS,
    RECIPES,
    Op,
    Recipe,
    Turn,
    pass_work,
    session_bytes,
    weight_bytes,
)

__all__ = [
    "DEADLINE_MS",
    "PARTS",
    "Prediction",
    "Sessions",
    "Setup",
    "Variant",
    "counts_today",
    "free_bytes",
    "predict",
    "sessions",
    "work_us",
]

Variant: TypeAlias = Literal["today", "public", "design"]

DEADLINE_MS = 200.0
# What the time of a micro-turn is split into. Launches: what kernels take beyond their bytes and
# their arithmetic. Host: what the processor does while the GPU waits.
PARTS = (
    "weights",
    "attention",
    "rows",
    "head",
    "encoders",
    "all-reduce",
    "launches",
    "host",
)
# Assumed: a kernel in the design's graph, whose start hides behind the end of the one before. In a
# graph without that, a product of less than 1 MB takes 2.2 to 3.0 us; a published chain of 175
# products lost 2.0 us each by it (docs/GPU.md).
NODE_US = 2.0
GRAPH_US = 10.0  # to launch a micro-turn's graph, and to be told that it has ended
FULL = 0.9  # of memory: weights and sessions; the rest is workspace and the driver's
THREAD_BLOCKS = 2  # of our attention on a multiprocessor at once, by registers
MAX_SESSIONS = 1 << 14


@dataclass(frozen=True, slots=True)
class Setup:
    """A model on some GPUs: `recipe` is a key of RECIPES, `tp` how many GPUs share it."""

    config: ModelConfig
    machine: Machine
    tp: int = 1
    recipe: str = "bfloat16"
    variant: Variant = "design"

    @property
    def formats(self) -> Recipe:
        """Of its matrices."""
        return RECIPES[self.recipe]


@dataclass(frozen=True, slots=True)
class Prediction:
    """Milliseconds of a micro-turn by PARTS; launches from the host, and kernels in all."""

    parts_ms: dict[str, float]
    n_launches: int
    n_kernels: int

    @property
    def ms(self) -> float:
        """Of all parts."""
        return sum(self.parts_ms.values())


@dataclass(frozen=True, slots=True)
class Sessions:
    """How many a group of `tp` GPUs serves: within the deadline, in memory, and what limits it."""

    in_time: int
    in_memory: int
    limit: str

    @property
    def n(self) -> int:
        """Served."""
        return min(self.in_time, self.in_memory)


def _fit(op: Op, machine: Machine) -> Fit:
    """How fast published kernels do this. A format without any here is read as 8-bit codes are."""
    if op.kind == "attention":
        return machine.attention
    products = machine.products
    if op.format == "float32":
        product = products["bfloat16"]
    else:
        product = products.get(op.format, products["fp8"])
    if not op.name.startswith("experts"):
        return product
    start_us = machine.experts["fp8"].start_us
    return machine.experts.get(op.format, Fit(start_us, product.bytes_per_s))


def work_us(op: Op, setup: Setup) -> float:
    """Reading or computing, whichever takes longer, without what a launch costs."""
    machine = setup.machine
    if op.kind == "all-reduce":
        return machine.all_reduce[setup.tp].us(op.row_bytes)
    # We turn weights of fewer bits into bfloat16 in registers, or into int8, which is no slower to
    # multiply; published kernels turn the rows.
    format = op.format if setup.variant == "public" else "bfloat16"
    per_s = machine.operations_per_s.get(format, machine.operations_per_s["bfloat16"])
    return 1e6 * max(op.n_bytes / _fit(op, machine).bytes_per_s, op.operations / per_s)


def _start_us(op: Op, setup: Setup) -> float:
    """What its launches cost on top."""
    machine = setup.machine
    if op.kind == "all-reduce":
        return 0.0  # part of its fit
    if setup.variant == "design":
        return op.nodes * NODE_US
    if setup.variant == "today":
        return sum(n * us for n, us in zip(counts_today(op, machine), TODAY, strict=True))
    products = ("qkvr", "out", "gate_up", "down", "shared_up", "shared_down")
    if op.name in (*products, "experts_up", "attention"):
        return op.nodes * _fit(op, machine).start_us
    if op.name == "experts_down":
        return 0.0  # timed together with the first product
    return op.nodes * machine.small_us


def counts_today(op: Op, machine: Machine) -> Today:
    """How often one run of our kernel has each cost of TODAY."""
    n_waves = math.ceil(op.blocks / (THREAD_BLOCKS * machine.n_multiprocessors))
    return Today(
        launch_us=op.launches,
        tile_us=n_waves * op.tiles,
        row_step_us=op.row_steps,
        large_us=1e-9 * op.operations if op.is_large else 0,
        session_us=0,
        sound_us=0,
    )


def _host_us(setup: Setup, n_sessions: int) -> float:
    if setup.variant != "today":
        return GRAPH_US
    return n_sessions * (TODAY.session_us + TODAY.sound_us)


def predict(setup: Setup, turn: Turn, n_sessions: int = 1, context: int = 1024) -> Prediction:
    """A micro-turn of `n_sessions` that step together, each with `context` positions behind it.

    `n_launches`: the design launches one graph; today each pass is a recorded graph, and encoders
    and head are launched beside it.
    """
    parts = dict.fromkeys(PARTS, 0.0)
    n_launches = n_kernels = 0
    is_today = setup.variant == "today"
    for p, times in turn.passes(n_sessions, context):
        for op in pass_work(setup.config, setup.formats, p, tp=setup.tp):
            n = times * op.n
            if is_today and op.kind == "head":
                n *= math.ceil(n_sessions / HEAD_ROWS)
            parts[op.kind] += n * work_us(op, setup) / 1000
            parts["launches"] += n * _start_us(op, setup) / 1000
            n_kernels += n * (op.launches if is_today else op.nodes)
            if is_today and op.kind in ("encoders", "head"):
                n_launches += n * op.launches
        n_launches += times if is_today else 0
    parts["host"] = _host_us(setup, n_sessions) / 1000
    return Prediction(parts, n_launches if is_today else 1, n_kernels)


def free_bytes(setup: Setup) -> float:
    """On each GPU, for sessions; negative where not even the weights fit."""
    weights = weight_bytes(setup.config, setup.formats, setup.tp)
    return FULL * setup.machine.memory_bytes - weights


def sessions(setup: Setup, turn: Turn, context: int, deadline_ms: float = DEADLINE_MS) -> Sessions:
    """The most sessions that step together every micro-turn, all in the same kind of turn."""
    in_memory = max(0, int(free_bytes(setup) // session_bytes(setup.config, context, setup.tp)))
    low, high = 0, MAX_SESSIONS  # low are served, high are not
    while high - low > 1:
        n = (low + high) // 2
        if predict(setup, turn, n, context).ms <= deadline_ms:
            low = n
        else:
            high = n
    if in_memory <= low:
        return Sessions(low, in_memory, "memory")
    parts = predict(setup, turn, low + 1, context).parts_ms
    return Sessions(low, in_memory, max(parts, key=lambda name: parts[name]))
