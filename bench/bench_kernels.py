"""Each operation of the CPU backend against its roofline.

The limits are measured around every case: how fast this machine reads as many bytes as the
operation reads (from memory or from the cache that holds them), and how many dot products of its
type it does on registers. An operation cannot be faster than the slower of the two; the table at
the end gives the share of that bound. More than 100 % says that the limits moved meanwhile: measure
again on a quiet machine. Sizes are those of shape M, of the mixture of experts those of shape MOE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.native import Dot, Kernel, NativeError, Reader, dot_peak

ROUNDS = 40
READS = 9
MAX_SECONDS = 1.5  # of one case; fewer rounds where a call takes long
READ_BYTES = 256 << 20  # of the ring that weights come from
MIN_READ_BYTES = 2 << 20
DOT_OF: dict[str, Dot] = {"f32": "f32", "bf16": "bf16", "int8": "int8", "int4": "int8"}
FORMATS = ("f32", "bf16", "int8", "int4")
HEADS = {"n_heads": 16, "n_kv_heads": 8, "d_head": 128, "rel_extent": 1024}
EXPERTS = {"n_in": 1024, "n_experts": 64, "n_shared": 2, "top_k": 6, "d_expert": 512}


@dataclass(frozen=True, slots=True)
class Case:
    """One operation with its sizes."""

    name: str
    dtype: str
    sizes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ("rows", "n_out", "n_in", "context")
        sizes = " ".join(f"{key}={self.sizes[key]}" for key in shown if key in self.sizes)
        return f"{self.name} {self.dtype} {sizes}"


CASES = [
    *(
        Case("linear", dtype, {"rows": rows, "n_out": n_out, "n_in": n_in})
        for n_out, n_in in ((6144, 1024), (1024, 3072))
        for dtype in FORMATS
        for rows in (1, 5, 20)
    ),
    *(
        Case("attention", dtype, HEADS | {"rows": rows, "context": context})
        for dtype in ("f32", "bf16", "int8")
        for context in (1024, 4096, 32_768)
        for rows in (1, 5, 20)
    ),
    *(
        Case("attention", dtype, HEADS | {"rows": rows, "context": 262_144})
        for dtype in ("bf16", "int8")
        for rows in (1, 20)
    ),
    *(Case("moe", dtype, EXPERTS | {"rows": rows}) for dtype in FORMATS for rows in (1, 5, 20)),
    *(
        Case("kv_append", dtype, HEADS | {"rows": rows, "context": 1024})
        for dtype in ("bf16", "int8")
        for rows in (1, 20)
    ),
    *(Case("conv_add_norm", "bf16", {"rows": rows, "n_in": 1024}) for rows in (1, 20)),
    *(Case("norm", "bf16", {"rows": rows, "n_in": 1024}) for rows in (1, 20)),
    *(Case("silu_mul", "bf16", {"rows": rows, "n_in": 3072}) for rows in (1, 20)),
]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of this minute."""

    bytes_per_second: float
    operations_per_second: float

    def bound(self, kernel: Kernel) -> float:
        """The least seconds of a call."""
        return max(
            kernel.n_bytes / self.bytes_per_second, kernel.operations / self.operations_per_second
        )


def read_limits(case: Case, kernel: Kernel) -> Limits | None:
    """Measured now; None where the processor lacks the instructions that the limits are in."""
    is_ring = case.name in ("linear", "moe")
    n_bytes = READ_BYTES if is_ring else max(MIN_READ_BYTES, int(kernel.n_bytes))
    try:
        with Reader(n_bytes) as reader:
            speeds = [reader.gigabytes_per_second() for _ in range(READS)]
        return Limits(1e9 * float(np.median(speeds)), 1e9 * dot_peak(DOT_OF[case.dtype]))
    except NativeError:
        return None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(benchmark: BenchmarkFixture, case: Case, note: Callable[..., None]) -> None:
    times: list[float] = []
    with Kernel(case.name, case.dtype, **case.sizes) as kernel:
        before = read_limits(case, kernel)
        rounds = max(5, min(ROUNDS, int(MAX_SECONDS / kernel.seconds())))
        pedantic: Callable[..., Any] = benchmark.pedantic
        pedantic(lambda: times.append(kernel.seconds()), rounds=rounds, warmup_rounds=3)
        after = read_limits(case, kernel)
        seconds = float(np.median(times[3:]))
        speeds = f"{kernel.n_bytes / seconds / 1e9:.1f} GB/s"
        if kernel.operations:
            speeds += f", {kernel.operations / seconds / 1e9:.0f} G op/s"
        if before is not None and after is not None:
            bound = (before.bound(kernel) + after.bound(kernel)) / 2
            benchmark.extra_info["percent_of_bound"] = 100 * bound / seconds
            speeds = f"{100 * bound / seconds:.0f} % of the bound; {speeds}"
    benchmark.extra_info.update(engine="duplex", bits=case.dtype, task=str(case))
    note(str(case), f"{1e6 * seconds:.1f} us", speeds)
