"""Keys and values in int8 against those of the rows' type: one model, two engines that take turns.

    python -m bench.kv --shape S --contexts 2048,8192

Tasks are those of bench_micro_turn.py; a session is cut back before each, untimed. Weights are
random: time does not depend on their values. Compare figures of one run only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.bench_micro_turn import SPARE_ROWS, ids
from bench.shapes import DEFAULT_CACHE, SHAPES, ShapeName
from duplex_engine import Engine, Session

KINDS: tuple[Literal["auto", "int8"], ...] = ("auto", "int8")
FILL_ROWS = 2048  # of a context at once


def turn(session: Session) -> None:
    """Twenty rows in, five tokens out."""
    session.append(text=ids(20))
    session.decode(5)


TASKS: dict[str, Callable[[Session], object]] = {
    "decode 1": lambda session: session.decode(1),
    # Four rows behind the last token: what a silent micro-turn of 200 ms of sound reads.
    "silent": lambda session: session.append(text=ids(4), logits="last"),
    "append 20": lambda session: session.append(text=ids(20), logits="last"),
    "turn 20+5": turn,
}


def grown(sessions: list[Session], contexts: list[int]) -> Iterator[int]:
    """Each context in ascending order, once every session has read as many rows."""
    for context in sorted(contexts):
        for session in sessions:
            while session.length < context:
                n_rows = min(FILL_ROWS, context - session.length)
                session.append(text=ids(n_rows, seed=session.length))
        yield context


def milliseconds(session: Session, context: int, work: Callable[[Session], object]) -> float:
    """Of one task that begins in the middle of a turn, at the context."""
    session.truncate(context)
    session.decode(1)
    start = time.perf_counter()
    work(session)
    elapsed = time.perf_counter() - start
    session.truncate(context)
    return 1e3 * elapsed


def main(
    shape: Annotated[ShapeName, typer.Option(help="See bench/shapes.py.")] = "S",
    weights: Annotated[
        Literal["auto", "int8", "int4"], typer.Option(help="Their format.")
    ] = "auto",
    contexts: Annotated[str, typer.Option(help="Rows in the cache, by commas.")] = "2048",
    rounds: Annotated[int, typer.Option(help="Of every task.")] = 21,
    models: Annotated[Path, typer.Option(help="Folder of models, made once.")] = DEFAULT_CACHE,
) -> None:
    """Measures and prints medians."""
    lengths = [int(n) for n in contexts.split(",")]
    longest = max(lengths) + SPARE_ROWS
    sizes = SHAPES[shape]
    table = Table("context", "task", "ms", "ms, int8", "times", "MB", "MB, int8")
    with ExitStack() as stack:
        sessions = []
        for kind in KINDS:
            engine = Engine.load(
                sizes.checkpoint(models),
                dtype="bfloat16",
                weights=weights,
                kv_dtype=kind,
                memory=(64 << 20) + int(1.1 * sizes.tape_bytes(longest)),
                max_positions=longest,
            )
            stack.callback(engine.close)
            sessions.append(engine.open_session())
        for context in grown(sessions, lengths):
            for task, work in TASKS.items():
                times = np.array(
                    [[milliseconds(s, context, work) for s in sessions] for _ in range(rounds)]
                )
                wide, narrow = np.median(times, axis=0)
                held = [sum(s.memory.values()) / 1e6 for s in sessions]
                table.add_row(
                    str(context),
                    task,
                    *(f"{ms:.2f}" for ms in (wide, narrow)),
                    f"{wide / narrow:.2f}",
                    *(f"{mb:.1f}" for mb in held),
                )
    Console().print(f"{shape}, bfloat16 rows, weights {weights}; medians of {rounds}, in turns")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
