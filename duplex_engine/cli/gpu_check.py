"""`duplex-engine gpu-check`: does a GPU compute what the CPU computes, and how fast?"""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from duplex_engine.cli.output import check_output
from duplex_engine.cli.run import DeviceOption
from duplex_engine.engine import Engine
from duplex_engine.errors import BackendUnavailable, InvalidArgument
from duplex_engine.evaluation import gpu_check as suite
from duplex_engine.evaluation.gpu_prompts import prompt_checks
from duplex_engine.evaluation.prediction_tables import cases, turn_table
from duplex_engine.evaluation.work import INKLING_SMALL

__all__ = ["gpu_check"]

EXIT_FAILED = 1


def gpu_check(
    checkpoint: Annotated[
        str, typer.Argument(help='Checkpoint for the comparisons, or "reference".')
    ] = "reference",
    device: DeviceOption = "cuda",
    turns: Annotated[int, typer.Option(min=10, help="Micro-turns of each comparison.")] = 100,
    shape: Annotated[
        list[str] | None,
        typer.Option(help=f"Time this model only ({', '.join(suite.SHAPES)}); may come again."),
    ] = None,
    checks: Annotated[bool, typer.Option(help="Compare.")] = True,
    timings: Annotated[bool, typer.Option(help="Time micro-turns after the comparisons.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write all of it here, as JSON.")] = None,
) -> None:
    """Compare a GPU with the CPU, byte by byte, then time micro-turns on it.

    In float32, whatever the weights and the cache, all that a session holds in the GPU's memory
    must equal the CPU's; in bfloat16 the tokens must, and the memory must not depend on chunks, on
    other sessions, on the background lane, or on whether weights are in codes. Ends with status 1
    if a comparison fails. Needs a GPU that the build has kernels for (docs/GPU.md), and CUDA;
    where one is missing, prints what is predicted for several GPUs, and then what is missing.

    Examples:

    `duplex-engine gpu-check`

    `duplex-engine gpu-check --no-timings --turns 300`

    `duplex-engine gpu-check --no-checks --shape 0.6b --out timings.json`
    """
    console = Console(highlight=False)
    for name in shape or ():
        if name not in suite.SHAPES:
            known = ", ".join(suite.SHAPES)
            raise InvalidArgument(f"--shape: expected one of {known}, found {name!r}")
    if out is not None:
        check_output(out, "--out")
    try:
        with Engine.load(checkpoint, device=device, memory="64MiB") as engine:
            description = engine.description
    except BackendUnavailable:
        _print_prediction(console)
        raise
    console.print(description, markup=False)
    report: dict[str, Any] = {"date": date.today().isoformat(), "device": description}
    compared = _compare(console, device, checkpoint, turns) if checks else []
    report["checks"] = [asdict(check) for check in compared]
    if timings:
        report["timings"] = _time(console, device, list(shape or suite.SHAPES))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json_module.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = sum(not check.passed for check in compared)
    if failed:
        console.print(f"{failed} of {len(compared)} comparisons failed", style="red")
        raise typer.Exit(EXIT_FAILED)


def _print_prediction(console: Console) -> None:
    """What published kernels and our design should make of the published model."""
    found = list(cases(INKLING_SMALL, "nvfp4", ("design", "public"), contexts=[32_768]))
    console.print(turn_table("predicted, not measured: Inkling-Small, experts in NVFP4, ms", found))
    console.print(
        "design: our kernels as planned; public: each operation as fast as the best published "
        "kernel. docs/GPU.md says how this was calibrated, and how far such predictions are off."
    )


def _compare(console: Console, device: str, checkpoint: str, turns: int) -> list[suite.Check]:
    checks: list[suite.Check] = []
    for check in _all_checks(device, checkpoint, turns):
        mark = "[green]same[/]" if check.passed else "[red]other[/]"
        console.print(f"{mark}  {check.name}: {check.detail}")
        checks.append(check)
    return checks


def _all_checks(device: str, checkpoint: str, turns: int) -> Iterator[suite.Check]:
    for dtype, weights, kv_dtype in suite.FORMATS:
        yield from suite.checks(device, checkpoint, dtype, turns, weights, kv_dtype)
    if device != "cpu":  # which takes no weights in these formats
        for coded in suite.CODED:
            yield from suite.coded_checks(device, coded, turns)
        yield from prompt_checks(device)


def _time(console: Console, device: str, shapes: list[str]) -> list[dict[str, Any]]:
    table = Table("model", "weights, cache", "call", "context", "sessions", "median ms", "p99 ms")
    table.add_column("GB/s")
    for column in table.columns[3:]:
        column.justify = "right"
    rows = []
    for name in shapes:
        with console.status(f"timing {name}"):
            for timing in suite.timings(device, name):
                rows.append(asdict(timing))
                table.add_row(
                    timing.shape,
                    f"{timing.weights}, {timing.kv_dtype}",
                    timing.what,
                    str(timing.context),
                    str(timing.n_sessions),
                    f"{timing.median_ms:.3f}",
                    f"{timing.p99_ms:.3f}",
                    f"{timing.gb_per_s:.0f}",
                )
    console.print(table)
    return rows
