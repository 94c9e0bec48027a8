"""`duplex-engine inspect`: what a checkpoint holds, what it needs, how fast it could be here."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from duplex_engine.checkpoint import Checkpoint
from duplex_engine.cli.cost import Cost, Machine, pass_cost, turn_passes
from duplex_engine.cli.run import (
    CheckpointArgument,
    DtypeOption,
    KvDtypeOption,
    TensorParallelOption,
    ThreadsOption,
    WeightsOption,
    turn_duration_ms,
)
from duplex_engine.config import ModelConfig
from duplex_engine.engine import Engine

__all__ = ["inspect", "measure_machine"]

QUANTISED_BITS = {"int8": 8.25, "int4": 4.5, "mxfp8": 8.25}  # a weight, with its share of the scale
PROBE_BYTES = 256 * 2**20  # more than any processor's cache
PROBE_SIDE = 1024
PROBE_REPEATS = 5


def inspect(
    checkpoint: CheckpointArgument,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    threads: ThreadsOption = None,
    tensor_parallel: TensorParallelOption = 1,
    memory: Annotated[str, typer.Option(help="Bytes for all sessions.")] = "1GiB",
    context: Annotated[
        int, typer.Option(min=1, help="Positions in the sequence, for the costs.")
    ] = 1024,
) -> None:
    """Show the sizes of a checkpoint, its memory plan, and the floor of a micro-turn here.

    The floor is what reading the weights and the cache once per pass, or computing on them, takes
    at the speeds measured now: of memory, and in float32. `run` says how close the engine is; a
    model that fits the processor's cache, or computes in a narrower type, may be below.

    Examples:

    `duplex-engine inspect reference`

    `duplex-engine inspect checkpoints/mine --dtype bfloat16 --context 8192`
    """
    out = Console(highlight=False)
    with Checkpoint.open(checkpoint) as opened:
        _print_sizes(out, opened)
    with Engine.load(
        checkpoint,
        dtype=dtype,
        weights=weights,
        kv_dtype=kv_dtype,
        threads=threads,
        tensor_parallel=tensor_parallel,
        memory=memory,
        progress=True,
    ) as engine:
        config = engine.config
        out.print(engine.description, markup=False)
        title = "memory plan" if tensor_parallel == 1 else "memory plan of rank 0"
        plan = Table("range", "MiB", title=title, title_justify="left")
        plan.columns[1].justify = "right"
        for name, n_bytes in engine.memory_plan:
            plan.add_row(name, f"{n_bytes / 2**20:,.2f}")
        out.print(plan)
        row_bytes = 2 if engine.dtype == "bfloat16" else 4
        weight_bytes = QUANTISED_BITS.get(engine.weights, 8 * row_bytes) / 8
        # A scale of two bytes for each head.
        cache_bytes = 1 + 2 / config.text.head_dim if engine.kv_dtype == "int8" else row_bytes
    with out.status("measuring this machine"):
        machine = measure_machine(threads or len(os.sched_getaffinity(0)))
    _print_costs(out, config, context, cache_bytes, weight_bytes, machine)


def measure_machine(n_threads: int) -> Machine:
    """Reads a large array and multiplies two matrices with NumPy; the best of a few tries."""
    values = np.ones(PROBE_BYTES // 4, dtype=np.float32)
    parts = np.array_split(values, n_threads)
    with ThreadPoolExecutor(n_threads) as pool:
        read_s = _best_s(lambda: list(pool.map(np.max, parts)))
    square = np.ones((PROBE_SIDE, PROBE_SIDE), dtype=np.float32)
    multiply_s = _best_s(lambda: square @ square)
    return Machine(PROBE_BYTES / read_s, 2 * PROBE_SIDE**3 / multiply_s)


def _best_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(PROBE_REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _print_sizes(out: Console, checkpoint: Checkpoint) -> None:
    text = checkpoint.config.text
    by_dtype = Counter[str]()
    n_parameters = 0
    for tensor in checkpoint.tensors:
        by_dtype[tensor.dtype] += tensor.data.nbytes
        n_parameters += math.prod(tensor.shape)
    n_layers, n_local, n_moe = text.num_hidden_layers, sum(text.is_local), sum(text.is_moe)
    towers = [name for name in ("audio", "vision") if getattr(checkpoint.config, name) is not None]
    layout = checkpoint.config.interaction
    table = Table(title=escape(str(checkpoint.path)), title_justify="left", show_header=False)
    packed = checkpoint.packed
    held = (
        {
            "packed": f"{packed.weights} weights and {packed.dtype} rows, for the CPU",
            "bytes": f"{packed.n_bytes / 2**20:,.2f} MiB, written by duplex-engine convert",
        }
        if packed is not None
        else {
            "parameters": f"{n_parameters / 1e6:,.2f} M in {len(checkpoint.tensors)} tensors",
            "bytes": ", ".join(f"{n / 2**20:,.2f} MiB {dtype}" for dtype, n in by_dtype.items()),
        }
    )
    rows = held | {
        "layers": f"{n_layers}: {n_layers - n_local} global, {n_local} local "
        f"(window {text.sliding_window_size}); {n_moe} with experts",
        "width": f"{text.hidden_size}, vocabulary {text.n_logits}",
        "takes": " and ".join(["text", *towers]),
        "micro-turn": "no interaction block: text output up to a limit per step"
        if layout is None
        else f"{layout.micro_turn_ms} ms, at most {layout.max_output_tokens} tokens out and "
        f"{layout.max_image_patches} patches in",
        "tokenizer": "none" if checkpoint.tokenizer_path is None else "tokenizer.json",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)


def _print_costs(
    out: Console,
    config: ModelConfig,
    context: int,
    cache_bytes: float,
    weight_bytes: float,
    machine: Machine,
) -> None:
    n_most = 16 if config.interaction is None else config.interaction.max_output_tokens
    table = Table(
        "tokens out",
        "passes",
        "MB read",
        "Mop",
        "floor ms",
        title=f"a micro-turn of {turn_duration_ms(config)} ms at {context} positions",
        title_justify="left",
    )
    for column in table.columns:
        column.justify = "right"
    for n_tokens in sorted({1, max(n_most // 2, 1), n_most}):
        costs = [
            pass_cost(config, n_rows, context, cache_bytes, weight_bytes)
            for n_rows in turn_passes(config, n_tokens)
        ]
        total = sum(costs, Cost(0, 0))
        floor_ms = sum(cost.floor_ms(machine) for cost in costs)
        table.add_row(
            str(n_tokens),
            str(len(costs)),
            f"{total.n_bytes / 1e6:,.1f}",
            f"{total.operations / 1e6:,.1f}",
            f"{floor_ms:.2f}",
        )
    out.print(table)
    out.print(
        f"measured here: {machine.read_bytes_per_s / 1e9:.1f} GB/s read, "
        f"{machine.operations_per_s / 1e9:.0f} Gop/s in float32. Weights that fit the cache are "
        "read faster, bfloat16 instructions compute faster: then the floor is lower."
    )
