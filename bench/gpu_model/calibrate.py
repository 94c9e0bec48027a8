"""Fits the rates of `duplex_engine/evaluation/machines.py` to published kernel timings.

    pip install pyarrow aiconfigurator-core==0.12.0
    python -m bench.gpu_model.calibrate

aiconfigurator-core (NVIDIA, Apache-2.0) carries tables of kernels timed in TensorRT-LLM, vLLM and
SGLang on H100 to GB300. Of several libraries the fastest counts, shape by shape. A fit is
`microseconds = start + bytes / rate`, in relative least squares. Weights of 30 MB and more alone
enter the fit of products: smaller ones stay in the L2 cache between the timed calls. Prints each
fit with its median and 90th percentile error; ends with status 1 where the table says otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from duplex_engine.evaluation.machines import MACHINES, AllReduce, Fit, Machine
from duplex_engine.evaluation.work import FORMATS

FOLDERS = {"H100": "h100_sxm", "H200": "h200_sxm", "B200": "b200_sxm", "GB300": "gb300"}
# Ours, and theirs: in order of preference, where a machine has no kernels of the first.
GEMM = {"bfloat16": "bfloat16", "fp8": "fp8", "nvfp4": "nvfp4"}
MOE = {"fp8": ("fp8_block",), "nvfp4": ("nvfp4", "w4a8_mxfp4_mxfp8")}
MOE_SHAPE = {"hidden_size": 4096, "inter_size": 2048, "topk": 6, "num_experts": 256}
SMALL_ROWS, LARGE_ROWS = (1, 4, 8, 16, 32, 64), (2048, 4096, 8192)
TOLERANCE = 0.02
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Found:
    """One fitted quantity of one machine: what the data say, with the relative errors of the fit,
    and what the table says."""

    machine: str
    name: str
    values: tuple[float, ...]
    table: tuple[float, ...]
    n: int
    median_error: float
    p90_error: float

    @property
    def is_in_table(self) -> bool:
        """Whether both are the same, but for rounding."""
        return all(
            abs(a - b) <= max(TOLERANCE * abs(a), 0.06)
            for a, b in zip(self.values, self.table, strict=True)
        )


class Data:
    """The tables of one machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parquet = importlib.import_module("pyarrow.parquet")

    def fastest(self, part: str, name: str, keys: list[str], **only: Any) -> dict[str, Floats]:
        """Columns `keys` and `us`, the least over libraries; `only`: column -> values allowed."""
        arrow, compute = (importlib.import_module(f"pyarrow{n}") for n in ("", ".compute"))
        tables = []
        for path in sorted((self._folder / part).glob(f"*/*/{name}_perf.parquet")):
            table = self._parquet.read_table(path)
            for column, values in only.items():
                table = table.filter(compute.is_in(table[column], arrow.array(list(values))))
            eager = compute.match_substring(table["kernel_source"], "eager")
            tables.append(table.filter(compute.invert(eager)).select([*keys, "latency"]))
        grouped = arrow.concat_tables(tables, promote_options="permissive").group_by(keys)
        found = grouped.aggregate([("latency", "min")])
        columns = {key: found[key].to_numpy().astype(np.float64) for key in keys}
        return columns | {"us": 1e3 * found["latency_min"].to_numpy().astype(np.float64)}


def line(x: Floats, y: Floats) -> tuple[float, float, Floats]:
    """(start, slope, relative errors) of y = start + slope * x, the start not negative."""
    basis = np.stack([np.ones_like(x), x], 1) / y[:, None]
    start, slope = np.linalg.lstsq(basis, np.ones_like(y), rcond=None)[0]
    if start < 0:
        scaled = x / y
        start, slope = 0.0, float(scaled.sum() / (scaled @ scaled))
    return float(start), float(slope), np.abs(start + slope * x - y) / y


def _found(
    name: str, what: str, values: tuple[float, ...], table: tuple[float, ...], errors: Floats
) -> Found:
    median, p90 = (float(q) for q in np.quantile(errors, (0.5, 0.9)))
    return Found(name, what, values, table, len(errors), median, p90)


def _rate(name: str, what: str, x: Floats, y: Floats, fit: Fit) -> Found:
    start, slope, errors = line(x, y)
    values = (start, 1e-6 / slope)  # microseconds; bytes per microsecond to TB/s
    return _found(name, what, values, (fit.start_us, fit.bytes_per_s / 1e12), errors)


def products(machine: Machine, data: Data) -> Iterator[Found]:
    """Matrix products: of few rows by bytes, of many by arithmetic."""
    for ours, theirs in GEMM.items():
        if ours not in machine.products:
            continue
        keys, only = ["m", "n", "k"], {"gemm_dtype": [theirs]}
        few = data.fastest("gemm", "gemm", keys, m=SMALL_ROWS, **only)
        n_bytes = few["n"] * few["k"] * FORMATS[ours].bytes(1, 1 << 16) / (1 << 16)
        used = (n_bytes >= 30e6) & (n_bytes <= 600e6)
        fit = machine.products[ours]
        yield _rate(machine.name, f"product {ours}: us, TB/s", n_bytes[used], few["us"][used], fit)
        if ours == "bfloat16":
            small = few["us"][n_bytes <= 1e6]
            value, spread = float(np.median(small)), np.abs(small / np.median(small) - 1)
            table = (machine.small_us,)
            yield _found(machine.name, "product under 1 MB: us", (value,), table, spread)
        many = data.fastest("gemm", "gemm", keys, m=LARGE_ROWS, **only)
        used = (many["n"] >= 4096) & (many["k"] >= 4096)
        speed = 2e-6 * (many["m"] * many["n"] * many["k"] / many["us"])[used]
        value, spread = float(np.median(speed)), np.abs(np.median(speed) / speed - 1)
        table = (machine.operations_per_s[ours] / 1e12,)
        yield _found(machine.name, f"product {ours}: Top/s", (value,), table, spread)


def experts(machine: Machine, data: Data) -> Iterator[Found]:
    """Mixture of experts of Inkling-Small's sizes, routing to adding up, on 1 to 8 ranks."""
    keys = ["num_tokens", "moe_tp_size"]
    only = {key: [value] for key, value in MOE_SHAPE.items()} | {"moe_ep_size": [1]}
    for ours, candidates in MOE.items():
        for theirs in candidates if ours in machine.experts else ():
            rows = data.fastest(
                "moe",
                "moe",
                keys,
                num_tokens=SMALL_ROWS[:-1],
                moe_tp_size=[1, 2, 4, 8],
                distribution=["balanced"],
                moe_dtype=[theirs],
                **only,
            )
            if not len(rows["us"]):
                continue
            sizes = [float(MOE_SHAPE[key]) for key in ("hidden_size", "inter_size")]
            one = 3 * sizes[0] * sizes[1] * FORMATS[ours].bytes(1, 1 << 16) / (1 << 16)
            touched = np.minimum(MOE_SHAPE["num_experts"], MOE_SHAPE["topk"] * rows["num_tokens"])
            n_bytes = touched * one / rows["moe_tp_size"]
            what = f"experts {ours}: us, TB/s"
            yield _rate(machine.name, what, n_bytes, rows["us"], machine.experts[ours])
            break


def attention(machine: Machine, data: Data) -> Found:
    """One query row against bfloat16 keys and values, 4 or 8 query heads on each of theirs."""
    keys = ["num_heads", "num_key_value_heads", "batch_size", "isl", "step"]
    rows = data.fastest(
        "attention",
        "generation_attention",
        keys,
        head_dim=[128],
        window_size=[0],
        kv_cache_dtype=["bfloat16"],
    )
    group = rows["num_heads"] / rows["num_key_value_heads"]
    length = rows["isl"] + rows["step"]
    n_bytes = rows["batch_size"] * length * rows["num_key_value_heads"] * 128 * 4
    used = np.isin(group, (4, 8)) & (n_bytes >= 1e6) & (n_bytes < 2e9) & (rows["batch_size"] <= 32)
    name = "attention: us, TB/s"
    return _rate(machine.name, name, n_bytes[used], rows["us"][used], machine.attention)


def two_lines(x: Floats, y: Floats) -> tuple[AllReduce, Floats]:
    """The lower of two lines, one through the first points, one through the last."""
    best: tuple[AllReduce, Floats] | None = None
    for n in range(3, len(x) - 2):
        (a, b, _), (c, d, _) = line(x[:n], y[:n]), line(x[n:], y[n:])
        fit = AllReduce(a, 1e6 * b, c, 1e6 * d)
        errors = np.abs(np.array([fit.us(size) for size in x]) / y - 1)
        if best is None or errors.max() < best[1].max():
            best = fit, errors
    assert best is not None
    return best


def all_reduce(machine: Machine, data: Data) -> Iterator[Found]:
    """Of 2 KB to 2 MB, in graphs, back to back."""
    for tp, table in machine.all_reduce.items():
        rows = data.fastest("comm", "custom_allreduce", ["message_size"], num_gpus=[tp])
        order = np.argsort(rows["message_size"])
        n_bytes, us = 2 * rows["message_size"][order], rows["us"][order]
        used = (n_bytes >= 2048) & (n_bytes <= 1 << 21)
        fit, errors = two_lines(n_bytes[used], us[used])
        name = f"all-reduce of {tp}: us, us/MB twice"
        yield _found(machine.name, name, tuple(fit), tuple(table), errors)


def main(
    data: Annotated[
        Path | None, typer.Option(help="The package's systems/data folder, if not installed.")
    ] = None,
) -> None:
    """Fits, prints, and compares with the table."""
    if data is None:
        spec = importlib.util.find_spec("aiconfigurator_core")
        if spec is None or spec.origin is None:
            raise typer.BadParameter("expected aiconfigurator-core 0.12.0, found no such package")
        data = Path(spec.origin).parent / "systems" / "data"
    table = Table("machine", "quantity", "fitted", "in the table", "points", "error %", "90 %")
    found: list[Found] = []
    for name, folder in FOLDERS.items():
        machine, tables = MACHINES[name], Data(data / folder)
        found += products(machine, tables)
        found += experts(machine, tables)
        found.append(attention(machine, tables))
        found += all_reduce(machine, tables)
    for one in found:
        values, written = (
            "  ".join(f"{v:.2f}" for v in values) for values in (one.values, one.table)
        )
        style = None if one.is_in_table else "red"
        errors = f"{100 * one.median_error:.1f}", f"{100 * one.p90_error:.1f}"
        table.add_row(one.machine, one.name, values, written, str(one.n), *errors, style=style)
    Console(width=120).print(table)
    if not all(one.is_in_table for one in found):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
