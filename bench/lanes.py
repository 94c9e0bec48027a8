"""What background work costs the micro-turns, and what they leave to it.

    python -m bench.lanes --shape M --bits int8

A session steps every 200 ms, five rows and one token, first alone, then while a background session
of the same engine decodes without a pause, then while one reads a long text. Weights are random.
The share of the idle time is the background's own rate against what it reaches with no micro-turns
beside it, divided by the part of the time that micro-turns leave over. Background work stays
between 1,024 and 2,048 positions, and each kind of micro-turn begins at 1,024, because a longer
context is slower.

`--park` measures instead how long a pass that begins waits for the background to stand still: how
much longer its first matrix takes beside each operation of 64 rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.native import Bits, Kernel
from bench.shapes import DEFAULT_CACHE, SHAPES, ShapeName
from duplex_engine import DuplexError, Engine, Session

PERIOD_S = 0.2
TURN = [11, 12, 13, 14]  # and the token of the turn before: five rows
CONTEXT = 1024  # positions before anything is measured
BACKGROUND = 1024  # positions that background work adds before it begins anew
WORK: dict[str, Callable[[Session], Any]] = {
    "decoding": lambda session: session.decode(4),
    "reading": lambda session: session.append(text=[7] * 64),
}


class Worker:
    """Works in a background session without a pause, and counts the positions it adds."""

    def __init__(self, engine: Engine, work: Callable[[Session], Any]) -> None:
        self._work = work
        self._start = engine.open_session(background=True, max_positions=CONTEXT + BACKGROUND + 64)
        self._start.append(text=[5] * CONTEXT)
        self._n_added = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.error: Exception | None = None

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                with self._start.fork(background=True) as session:
                    while session.length < CONTEXT + BACKGROUND and not self._is_over.is_set():
                        before = session.length
                        self._work(session)
                        self._n_added += session.length - before
        except DuplexError as error:
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def finish(self, seconds: float) -> float:
        """Positions a second; the session is closed."""
        if self.error is not None:
            raise self.error
        self._start.close()
        return self._n_added / seconds


def micro_turns(session: Session, n: int, name: str) -> tuple[NDArray[np.float64], float]:
    """Milliseconds of each of n micro-turns, one every 200 ms, and the seconds of all.

    They run in a fork of the session, so that each kind begins at the same context."""
    times = np.zeros(n)
    with session.fork() as fork:
        start = time.perf_counter()
        for turn in track(range(n), description=name, transient=True):
            time.sleep(max(0.0, start + turn * PERIOD_S - time.perf_counter()))
            begin = time.perf_counter()
            fork.step(text=TURN, max_tokens=1)
            times[turn] = 1e3 * (time.perf_counter() - begin)
    time.sleep(max(0.0, start + n * PERIOD_S - time.perf_counter()))
    return times, time.perf_counter() - start


def park(shape: str, bits: Bits, n: int) -> Table:
    """How much longer the first matrix of a pass takes beside each background operation."""
    p = SHAPES[shape].preset
    heads = {"n_heads": p.heads[0], "n_kv_heads": p.heads[1], "d_head": p.d_head}
    qkvr, (gate_up, down) = SHAPES[shape].attention_matrices[0], SHAPES[shape].mlp_matrices(" d")
    cases: dict[str, tuple[str, str, dict[str, int]]] = {
        name: ("linear", bits, {"n_out": n_out, "n_in": n_in})
        for name, (n_out, n_in) in {"qkvr": qkvr, "gate and up": gate_up, "down": down}.items()
    }
    for context in (1024, 32768):
        sizes = {**heads, "rel_extent": 512, "context": context}
        cases[f"attention at {context:,}"] = ("attention", "bf16", sizes)
    cases["append"] = ("kv_append", "bf16", {**heads, "context": 1024})
    cases["convolution, norm"] = ("conv_add_norm", "bf16", {"n_in": p.d_model})
    table = Table("beside 64 rows of", "median us", "p90 us", "p99 us", title=f"{shape} {bits}")
    quantiles = [0.5, 0.9, 0.99]
    with Kernel("linear", bits, rows=5, n_out=qkvr[0], n_in=qkvr[1]) as first:
        alone = np.zeros(n)
        for i in range(n):
            time.sleep(0.005)
            alone[i] = first.seconds()
        table.add_row("nothing", *(f"{1e6 * us:.0f}" for us in np.quantile(alone, quantiles)))
        for name, (kernel, dtype, sizes) in track(cases.items(), transient=True):
            with Kernel(kernel, dtype, rows=64, **sizes) as other:
                longer = np.array(first.seconds_beside(other, n)) - np.median(alone)
            table.add_row(name, *(f"{1e6 * us:+.0f}" for us in np.quantile(longer, quantiles)))
    return table


def main(
    shape: Annotated[Literal[ShapeName, "reference"], typer.Option(help="Of the model.")] = "M",
    bits: Annotated[Bits, typer.Option(help="Format of the weights.")] = "int8",
    n: Annotated[int, typer.Option("--turns", help="Micro-turns of each kind.")] = 150,
    cache: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = DEFAULT_CACHE,
    is_parking: Annotated[bool, typer.Option("--park", help="Measure parking instead.")] = False,
) -> None:
    """Measures the micro-turns alone and beside background work, in turns, in one process."""
    if is_parking:
        Console().print(park(shape, bits, n))
        return
    options: dict[str, Any] = {} if bits == "bf16" else {"weights": bits}
    path = "reference" if shape == "reference" else SHAPES[shape].checkpoint(cache)
    table = Table("beside", "median ms", "p99 ms", "p99 / alone", "background /s", "of idle time")
    with Engine.load(path, memory="6GiB", progress=True, **options) as engine:
        session = engine.open_session(max_positions=CONTEXT + 20 * n)
        session.append(text=[3] * CONTEXT)
        micro_turns(session, 10, "warming up")
        alone, _ = micro_turns(session, n, "alone")
        p99 = float(np.quantile(alone, 0.99))
        table.add_row("nothing", f"{np.median(alone):.2f}", f"{p99:.2f}", "1.00", "", "")
        for name, work in WORK.items():
            seconds = n * PERIOD_S / 4
            with Worker(engine, work) as worker:
                time.sleep(seconds)
            free = worker.finish(seconds)
            with Worker(engine, work) as worker:
                times, seconds = micro_turns(session, n, name)
            rate = worker.finish(seconds)
            idle = 1 - times.sum() / 1e3 / seconds
            beside = float(np.quantile(times, 0.99))
            table.add_row(
                name,
                f"{np.median(times):.2f}",
                f"{beside:.2f}",
                f"{beside / p99:.2f}",
                f"{rate:.0f} of {free:.0f}",
                f"{rate / free / idle:.0%}",
            )
        table.title = f"{shape} {bits}, {engine.description}, {n} micro-turns of 200 ms"
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
