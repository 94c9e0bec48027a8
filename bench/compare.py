"""Compares two results of one suite or of compare_peers, and draws them.

    python -m bench.compare out/before.jsonl out/after.jsonl --out out/compare
    python -m bench.compare out/peers/peers.jsonl              # one file: pictures alone

Files are rows (`results.py`) or what pytest-benchmark writes with --benchmark-json. A case whose
median grew by more than the threshold is flagged, and the exit status is 1. Two runs on a shared
machine see different weather: a flag says "measure again, both in one run", not more. Rows of the
engine "floor" tell how much the weather alone changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.plots import plot_contexts, plot_distributions, plot_shares
from bench.results import Row, Summary, read_rows, summarize


def load(path: Path) -> list[Row]:
    """The rows of a file of either kind."""
    if not path.is_file():
        raise typer.BadParameter(f"expected a file of results at {path}, found none")
    text = path.read_text()
    if not text.startswith("{\n") and '"benchmarks":' not in text[:2000]:
        return read_rows(path)
    rows = []
    for item in json.loads(text)["benchmarks"]:
        about = {"task": item["name"]} | item["extra_info"]
        rows += [about | {"ms": 1e3 * seconds} for seconds in item["stats"]["data"]]
    return rows


def print_comparison(
    before: dict[tuple[str, ...], Summary],
    after: dict[tuple[str, ...], Summary],
    threshold: float,
    console: Console,
) -> int:
    """One line per case that both have; returns how many are flagged."""
    table = Table("case", title="median ms, after / before")
    for column in ("before", "after", "ratio", "p90 ratio"):
        table.add_column(column, justify="right")
    n_flagged = 0
    for case, old in before.items():
        new = after.get(case)
        if new is None:
            continue
        ratio = new.median / old.median
        is_slower = ratio > 1 + threshold
        n_flagged += is_slower
        table.add_row(
            " ".join(part for part in case if part),
            f"{old.median:.3f}",
            f"{new.median:.3f}",
            f"{ratio:.2f}" + (" slower" if is_slower else ""),
            f"{new.p90 / old.p90:.2f}",
            style="red" if is_slower else "green" if ratio < 1 - threshold else None,
        )
    console.print(table)
    missing = [case for case in before if case not in after]
    if missing:
        console.print(f"{len(missing)} cases of the first file are not in the second")
    return n_flagged


def main(
    before: Annotated[Path, typer.Argument(help="Results of one run.")],
    after: Annotated[Path | None, typer.Argument(help="Results of another.")] = None,
    threshold: Annotated[float, typer.Option(help="A larger growth is flagged.")] = 0.05,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("out/compare"),
) -> None:
    """Ratios of two runs, and pictures of the last one."""
    console = Console()
    rows = load(before)
    n_flagged = 0
    if after is not None:
        old, rows = summarize(rows), load(after)
        new = summarize(rows)
        if not old.keys() & new.keys():
            raise typer.BadParameter("expected two files with cases in common, found none")
        n_flagged = print_comparison(old, new, threshold, console)
    drawn = (
        plot_distributions(rows, out / "distributions.png"),
        plot_contexts(rows, out / "contexts.png"),
        plot_shares(rows, out / "shares.png"),
    )
    console.print("drawn:", ", ".join(str(path) for path in drawn if path is not None) or "nothing")
    if n_flagged:
        console.print(f"[red]{n_flagged} cases are more than {threshold:.0%} slower[/]")
        raise typer.Exit(1)


app = typer.Typer(add_completion=False)
app.command(help=__doc__)(main)

if __name__ == "__main__":
    app()
