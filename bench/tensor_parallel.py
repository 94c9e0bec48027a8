"""What ranks cost and gain on one machine: the same turn with one rank and with two.

    python -m bench.tensor_parallel --shape S --shape M

A turn appends 20 rows and decodes 5 tokens behind 1,024 others: six passes, each of which meets
twice in every layer, and five meetings for logits. All engines of a shape are loaded at once and
take turns, so that the machine's swings reach all alike; ratios are of medians. Weights are random.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.native import Bits
from bench.shapes import DEFAULT_CACHE, SHAPES
from duplex_engine import Engine, Session

CONTEXT = 1024
ROWS, TOKENS = 20, 5
KINDS: dict[str, dict[str, Any]] = {
    "1 rank x 1 thread": {"threads": 1},
    "1 rank x 2 threads": {"threads": 2},
    "2 ranks x 1 thread": {"threads": 2, "tensor_parallel": 2},
    "2 ranks x 1 thread, torch.distributed": {
        "threads": 2,
        "tensor_parallel": 2,
        "transport": "torch.distributed",
    },
    "1 rank x 2 threads, invariant": {"threads": 2, "reduction": "invariant"},
    "2 ranks x 1 thread, invariant": {
        "threads": 2,
        "tensor_parallel": 2,
        "reduction": "invariant",
    },
}


def turn_ms(session: Session) -> float:
    """One turn; the session is as before."""
    rng = np.random.default_rng(0)
    session.truncate(CONTEXT)
    session.decode(1)
    begin = time.perf_counter()
    session.append(text=rng.integers(300, 4096, ROWS).tolist())
    session.decode(TOKENS)
    return 1e3 * (time.perf_counter() - begin)


def measure(name: str, bits: Bits, turns: int, cache: Path) -> Table:
    """All kinds of engine of one shape."""
    shape = SHAPES[name]
    path = shape.checkpoint(cache)
    options: dict[str, Any] = {} if bits == "bf16" else {"weights": bits}
    memory = (256 << 20) + int(1.5 * shape.tape_bytes(CONTEXT + 64))
    with ExitStack() as stack:
        sessions = []
        for kind in KINDS.values():
            engine = Engine.load(
                path, dtype="bfloat16", memory=memory, max_positions=CONTEXT + 64,
                progress=True, **kind, **options,
            )  # fmt: skip
            session = stack.enter_context(stack.enter_context(engine).open_session())
            session.append(text=[5] * CONTEXT)
            turn_ms(session)
            sessions.append(session)
        times = np.array(
            [
                [turn_ms(session) for session in sessions]
                for _ in track(range(turns), description=name, transient=True)
            ]
        )
    medians = np.median(times, axis=0)
    table = Table("engine", "median ms", "p90 ms", "of the first", "of the second")
    table.title = f"{name} {bits}: turn {ROWS}+{TOKENS} behind {CONTEXT}, {turns} turns"
    for engine_name, column, median in zip(KINDS, times.T, medians, strict=True):
        p90 = np.quantile(column, 0.9)
        table.add_row(
            engine_name, f"{median:.2f}", f"{p90:.2f}",
            f"{median / medians[0]:.2f}", f"{median / medians[1]:.2f}",
        )  # fmt: skip
    return table


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = None,
    bits: Annotated[Bits, typer.Option(help="Format of the weights.")] = "bf16",
    turns: Annotated[int, typer.Option(help="Of each engine.")] = 20,
    cache: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = DEFAULT_CACHE,
) -> None:
    """Prints a table for each shape."""
    names = shape or ["S", "M"]
    if unknown := set(names) - set(SHAPES):
        raise typer.BadParameter(f"--shape: of {', '.join(SHAPES)}, found {min(unknown)!r}")
    for name in names:
        Console().print(measure(name, bits, turns, cache))


if __name__ == "__main__":
    typer.run(main)
