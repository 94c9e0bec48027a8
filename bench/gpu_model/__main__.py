"""Predicts micro-turns on GPUs: `python -m bench.gpu_model --help`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.gpu_model.cpu import Comparison, compare
from bench.gpu_model.plot import plot_split
from bench.native import Bits
from bench.shapes import DEFAULT_CACHE, SHAPES
from duplex_engine.config import ModelConfig
from duplex_engine.evaluation.machines import MACHINES
from duplex_engine.evaluation.prediction import Variant
from duplex_engine.evaluation.prediction_tables import (
    CONTEXTS,
    RANKS,
    all_reduce_table,
    cases,
    split_table,
    turn_table,
)
from duplex_engine.evaluation.work import INKLING, INKLING_SMALL, RECIPES

PUBLISHED = {"inkling-small": INKLING_SMALL, "inkling": INKLING}
VARIANTS: tuple[Variant, ...] = ("design", "public", "today")
CPU_BITS: tuple[Bits, ...] = ("bf16", "int8")


def _config(model: str) -> ModelConfig:
    """One of the published models, or what a config.json says."""
    if model in PUBLISHED:
        return PUBLISHED[model]
    path = Path(model)
    return ModelConfig.read(path / "config.json" if path.is_dir() else path)


def _known(option: str, given: Iterable[Any], known: Iterable[Any]) -> list[Any]:
    """What was given, refused by name where it is not known."""
    known, given = list(known), list(given)
    for value in given:
        if value not in known:
            names = ", ".join(map(str, known))
            raise typer.BadParameter(f"{option}: expected one of {names}, found {value}")
    return given


def _compare_cpu(console: Console, shapes: list[str], models: Path) -> list[dict[str, Any]]:
    table = Table("shape", "bits", "turn", "read GB/s", "measured ms", "predicted ms", "error %")
    for column in table.columns[3:]:
        column.justify = "right"
    found: list[Comparison] = []
    for shape in shapes:
        for bits in CPU_BITS:
            for one in compare(shape, bits, models):
                found.append(one)
                table.add_row(
                    one.shape,
                    one.bits,
                    one.task,
                    f"{one.read_gb_per_s:.0f}",
                    f"{one.measured_ms:.2f}",
                    f"{one.predicted_ms:.2f}",
                    f"{100 * one.error:+.0f}",
                )
    console.print(table)
    return [asdict(one) | {"error": one.error} for one in found]


def main(
    model: Annotated[
        str, typer.Option(help="inkling-small, inkling, or a config.json.")
    ] = "inkling-small",
    weights: Annotated[str, typer.Option(help=", ".join(RECIPES))] = "nvfp4",
    machine: Annotated[list[str] | None, typer.Option(help=", ".join(MACHINES))] = None,
    gpus: Annotated[list[int] | None, typer.Option(help="GPUs that share the model.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Positions in the sequence.")] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Compare with measurements of this CPU instead.")
    ] = False,
    shape: Annotated[list[str] | None, typer.Option(help="With --cpu: S, M, MOE.")] = None,
    models: Annotated[Path, typer.Option(help="With --cpu: folder of models.")] = DEFAULT_CACHE,
    out: Annotated[Path | None, typer.Option(help="Write all numbers here, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the split here.")] = None,
) -> None:
    """Predicts what micro-turns take on GPUs, and how many sessions they hold.

    Variants: *design*, one graph, starts hidden; *public*, the same kernels, each as fast as the
    best published one; *today*, our kernels and host code as measured on an H200 on 2026-11-27
    with dense models in bfloat16. Experts and several GPUs have not been timed. Nothing here ran
    on those GPUs.
    """
    console = Console(highlight=False, width=140)
    if cpu:
        report: dict[str, Any] = {
            "cpu": _compare_cpu(console, _known("--shape", shape or SHAPES, SHAPES), models)
        }
    else:
        config = _config(model)
        _known("--weights", [weights], RECIPES)
        chosen = (
            _known("--machine", machine or MACHINES, MACHINES),
            _known("--gpus", gpus or RANKS, RANKS),
            list(context or CONTEXTS),
        )
        found = list(cases(config, weights, VARIANTS, *chosen))
        title = f"predicted: {model}, weights {weights}"
        console.print(turn_table(f"{title}: ms of one session's turn, sessions in 200 ms", found))
        context_shown = chosen[2][0]
        split = f"{title}: a silent micro-turn at {context_shown} positions, ms"
        console.print(split_table(split, "silent", context_shown, found))
        console.print(all_reduce_table())
        report = {"model": model, "predicted": [case.as_json() for case in found]}
        if plot is not None:
            plot_split(found, context_shown, plot, title)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
