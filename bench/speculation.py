"""Several tokens a pass: what another row costs, and what guessing gains where text repeats.

    python bench/speculation.py    # prints three tables for each type of the weights

The model is the preset `small` with blocks that add a hundredth of what they would: the newest
token decides the next, so greedy output runs into a circle, which is text that repeats as purely as
text can. Time does not depend on the values of weights. Arms are run in turns and the best of each
is printed, because machines are shared.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from duplex_engine import Engine
from duplex_engine.models import write_random_checkpoint

ROWS = (1, 2, 3, 5, 9, 17)
SPECULATE = (0, 1, 2, 4, 8, 16)
PROMPT = list(range(300, 340))


def write_repeating(folder: Path) -> None:
    """The checkpoint described above."""
    write_random_checkpoint(folder, "small", interaction=False)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "wo_ud" in name or "w2_md" in name:
            tensors[name] = tensor * tensor.dtype.type(0.01)
    save_file(tensors, folder / "model.safetensors")


def cost_of_rows(engine: Engine, repeats: int) -> list[float]:
    """Best milliseconds of a pass of each of `ROWS` rows."""
    best = [float("inf")] * len(ROWS)
    with engine.open_session() as session:
        session.append(text=PROMPT)
        for _ in range(repeats):
            for i, n_rows in enumerate(ROWS):
                start = time.perf_counter()
                session.append(text=PROMPT[:1] * n_rows)
                best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def decode(engine: Engine, speculate: int, n_new: int, n: int) -> tuple[list[int], float, int, int]:
    """Decodes `n_new` tokens, then `n` under the clock: those, milliseconds, drafted, accepted."""
    with engine.open_session(speculate=speculate) as session:
        session.append(text=PROMPT)
        session.decode(n_new)
        before, start = engine.stats, time.perf_counter()
        ids = session.decode(n)
        ms = 1e3 * (time.perf_counter() - start)
        after = engine.stats
    drafted, accepted = (after[key] - before[key] for key in ("drafted", "accepted"))
    return ids, ms, drafted, accepted


def main(
    repeats: Annotated[int, typer.Option(help="Times that each arm is run.")] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens of each half.")] = 150,
    threads: Annotated[int, typer.Option(help="Worker threads.")] = 2,
) -> None:
    """Prints the tables."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        write_repeating(Path(folder))
        for dtype in ("float32", "bfloat16"):
            with Engine.load(folder, dtype=dtype, threads=threads) as engine:
                rows = Table("rows", "ms", "of one row", title=f"{dtype}: a pass")
                costs = cost_of_rows(engine, 10 * repeats)
                for n_rows, ms in zip(ROWS, costs, strict=True):
                    rows.add_row(str(n_rows), f"{ms:.2f}", f"{ms / costs[0]:.2f}")
                console.print(rows)
                for half, n_new in (("new", 0), ("repeated", tokens)):
                    table = Table("speculate", "ms", "gain", "drafted", "accepted")
                    table.title = f"{dtype}: {tokens} tokens of {half} text"
                    runs = [
                        [decode(engine, k, n_new, tokens) for k in SPECULATE]
                        for _ in range(repeats)
                    ]
                    assert all(run[0] == runs[0][0][0] for turn in runs for run in turn)
                    best = [min(run[1] for run in arm) for arm in zip(*runs, strict=True)]
                    for i, k in enumerate(SPECULATE):
                        _, _, drafted, accepted = runs[0][i]
                        gain = f"{best[0] / best[i]:.2f}"
                        table.add_row(str(k), f"{best[i]:.0f}", gain, str(drafted), str(accepted))
                    console.print(table)


if __name__ == "__main__":
    typer.run(main)
