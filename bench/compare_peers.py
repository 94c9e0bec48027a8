"""Compares this engine with others and with the floor program, all in one run.

    python -m bench.compare_peers --shape S --bits bf16,int8,int4 --rounds 15 --out out/peers

What is compared: one sequence; the same matrices (shape S or M: a Qwen3's). Ours is an Inkling of
those matrices, which also has the projection r and the relative bias in place of rotary embedding,
four short convolutions a layer, and an embedding table apart from the head (Qwen3's is tied: equal
bytes are read). "bits" is the format of the weights; each engine's own: of llama.cpp BF16, Q8_0,
Q4_0. The cache has 2 bytes a number; of the engines named -kv8 one, with scales. Weights are
random, logits are not compared. The floor program reads our weights without scales, multiplies
them, and reads the cache (bench/native/floor.cpp).

Tasks: "decode 1", one greedy token; "append n", n rows in one pass, logits of the last; "turn
20+5", a conversation's turn: the last token of the turn before and 20 rows in one pass, then tokens
until there are 5 new ones. Every repeat begins at the same context.

How: each engine is a process that sleeps unless it is asked. In every round each engine in turn
does every task once untimed and then timed, so that all see the same weather on a shared machine:
compare ratios of one run, not milliseconds of two.
"""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.native import NativeError, Reader
from bench.peers.client import PeerError, Worker
from bench.peers.table import ALL_BITS, ENTRIES, FLOOR, FLOOR_KV8, OURS, OURS_KV8, Entry, of_same_kv
from bench.peers.worker import Job, Task
from bench.plots import plot_engines
from bench.results import MIN_CLEAN, Row, Summary, machine, summarize, write_rows
from bench.shapes import DEFAULT_CACHE, SHAPES, Shape, ShapeName

TASKS = {
    "decode 1": Task("decode", 0, 1),
    "append 5": Task("append", 5, 0),
    "append 20": Task("append", 20, 0),
    "turn 20+5": Task("turn", 20, 5),
}
LIMIT_BYTES = 1 << 30  # of the reader: far beyond any cache
HOLD_S, OFFER_S = 60.0, 0.5
PAUSE_S = 0.02  # in which threads of the engine before stop spinning


class MachineLock:
    """A lock file that other users of the machine respect too; without a path it does nothing.

    It is kept from one measurement to the next, but offered to others every HOLD_S seconds.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("w")
        self._held_since: float | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the lock, and afterwards gives it up if it was held long."""
        if self._file is None:
            yield
            return
        if self._held_since is None:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._held_since = time.monotonic()
        yield
        if time.monotonic() - self._held_since > HOLD_S:
            self.release()
            time.sleep(OFFER_S)

    def release(self) -> None:
        """Gives the lock up."""
        if self._file is not None and self._held_since is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._held_since = None


def job_of(
    shape: Shape, bits: str, kv: str, context: int, threads: int, isa: str | None, cache: Path
) -> Job:
    """What a worker loads."""
    preset = shape.preset
    peers = cache / "peers"
    peers.mkdir(parents=True, exist_ok=True)
    return Job(
        shape=shape.name,
        checkpoint=str(shape.checkpoint(cache)),
        cache=str(peers),
        bits=bits,
        kv=kv,
        threads=threads,
        isa=isa,
        max_context=context,
        vocab_size=preset.vocab_size,
        d_model=preset.d_model,
        d_ff=preset.d_ff,
        n_layers=len(shape.layers),
        n_heads=preset.heads[0],
        n_kv_heads=preset.heads[1],
        d_head=preset.d_head,
    )


def listed(option: str, given: str, known: Collection[str]) -> list[str]:
    """What was given by commas, all of it known."""
    names = given.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"{option}: expected names among {', '.join(known)}; found {', '.join(unknown)}"
        )
    return names


def choose(engines: str, shape: Shape) -> list[Entry]:
    """The entries named, in the order of the table."""
    names = list(ENTRIES) if engines == "all" else listed("--engines", engines, ENTRIES)
    return [
        entry for entry in ENTRIES.values() if entry.name in names and shape.name in entry.shapes
    ]


class Run:
    """The engines that could be loaded, and the rows measured so far."""

    def __init__(self, shape: Shape, console: Console, lock: Path | None) -> None:
        self.shape, self.console, self.lock = shape, console, MachineLock(lock)
        self.workers: list[Worker] = []
        self.rows: list[Row] = []

    def skip(self, name: str, why: str) -> None:
        """Says so on the console and in the results."""
        self.console.print(f"[yellow]skipped[/] {name}: {why}")
        self.rows.append({"engine": name, "shape": self.shape.name, "skipped": why})

    def load(self, stack: ExitStack, entry: Entry, job: Job, python: Path, out: Path) -> None:
        """Starts one engine, or notes why it is left out."""
        name = f"{entry.name} {job.bits}"
        log = out / f"{entry.name}-{job.bits}.log"
        try:
            with self.lock.held():
                worker = stack.enter_context(Worker(entry, job.bits, python, log, job.threads))
                worker.load(job)
        except PeerError as error:
            self.skip(name, str(error))
        else:
            self.workers.append(worker)
            self.console.print(f"loaded {name}: {worker.description}")

    def round(self, index: int, context: int, repeats: int, reader: Reader | None) -> None:
        """Every engine does every task."""
        for worker in list(self.workers):
            for task_name, task in TASKS.items():
                with self.lock.held():
                    time.sleep(PAUSE_S)
                    try:
                        measured = worker.measure(task, context, repeats)
                    except PeerError as error:
                        self.skip(worker.name, str(error))
                        self.workers.remove(worker)
                        break
                self.rows += [
                    {
                        "engine": worker.entry.name,
                        "bits": worker.bits,
                        "shape": self.shape.name,
                        "context": context,
                        "task": task_name,
                        "round": index,
                        "ms": ms,
                        "preempted": preempted,
                    }
                    for ms, preempted in measured
                ]
        if reader is not None:
            with self.lock.held():
                speed = reader.gigabytes_per_second()
            self.rows.append({"engine": "memory", "round": index, "gigabytes_per_second": speed})


def ratio(summary: Summary, other: Summary | None) -> str:
    """How many times as long as the other."""
    return "" if other is None else f"{summary.median / other.median:.2f}"


def print_tables(rows: list[Row], console: Console) -> None:
    """One table per context and task."""
    cases = summarize(rows)
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for case in cases:
        groups.setdefault(case[:3], []).append(case)
    for (shape, context, task), members in groups.items():
        table = Table(title=f"{shape}, {task} at {context} rows", title_justify="left")
        for column in ("engine", "best ms", "median", "p90", "p99", "clean", "x ours", "x floor"):
            table.add_column(column, justify="left" if column == "engine" else "right")
        for case in sorted(members, key=lambda case: cases[case].median):
            *_, engine, bits = case
            found = cases[case]
            ours = of_same_kv(engine, OURS, OURS_KV8)
            floor = of_same_kv(engine, FLOOR, FLOOR_KV8)
            table.add_row(
                f"{engine} {bits}",
                f"{found.best:.2f}",
                f"{found.median:.2f}",
                f"{found.p90:.2f}",
                f"{found.p99:.2f}",
                f"{found.n_clean}/{found.n}",
                ratio(found, cases.get((shape, context, task, ours.name, bits))),
                ratio(found, cases.get((shape, context, task, floor.name, bits))),
                style="bold" if engine == ours.name else "dim" if engine == floor.name else None,
            )
        console.print(table)
    speeds = sorted(row["gigabytes_per_second"] for row in rows if "gigabytes_per_second" in row)
    if speeds:
        console.print(
            f"memory read: median {speeds[len(speeds) // 2]:.1f} GB/s, from {speeds[0]:.1f} to "
            f"{speeds[-1]:.1f} over the rounds"
        )
    console.print(
        "x ours, x floor: medians over those of the same bits and cache. clean: measurements in "
        f"which the system took no processor away; where there are {MIN_CLEAN}, they alone count. "
        "p99 of so few is no tail."
    )


def main(
    shape: Annotated[ShapeName, typer.Option(help="S is 26 M, M Qwen3-0.6B's.")] = "S",
    bits: Annotated[str, typer.Option(help="Weight formats, by commas.")] = "bf16,int8,int4",
    contexts: Annotated[str, typer.Option(help="Rows in the cache, by commas.")] = "1024",
    engines: Annotated[
        str, typer.Option(help=f"all, or some of {', '.join(ENTRIES)}, by commas.")
    ] = "all",
    rounds: Annotated[int, typer.Option(help="How often every engine has its turn.", min=1)] = 15,
    repeats: Annotated[int, typer.Option(help="Timed runs of a task in a round.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="Threads of every engine.", min=1)] = 2,
    isa: Annotated[
        str | None,
        typer.Option(help="Instruction set of ours; build the others for the same one."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of peers.jsonl, peers.png and logs.")] = Path(
        "out/peers"
    ),
    cache: Annotated[Path, typer.Option(help="Folder of models, made once.")] = DEFAULT_CACHE,
    peers_python: Annotated[Path, typer.Option(help="Python that has the other engines.")] = Path(
        ".venv-peers/bin/python"
    ),
    lock: Annotated[
        Path | None,
        typer.Option(help="Lock file to hold while measuring, at most a minute each time."),
    ] = None,
) -> None:
    """Loads the engines, measures them round by round, writes rows, prints tables, draws."""
    chosen_bits = listed("--bits", bits, ALL_BITS)
    chosen_contexts = [int(part) for part in contexts.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    run = Run(SHAPES[shape], console, lock)
    run.rows.append({"engine": "machine", "threads": threads, **machine()})
    with ExitStack() as stack:
        for entry in choose(engines, run.shape):
            for kind in chosen_bits:
                if kind in entry.bits:
                    job = job_of(
                        run.shape, kind, entry.kv, max(chosen_contexts), threads, isa, cache
                    )
                    own = Path(sys.executable)
                    python = own if entry.own_environment else peers_python.absolute()
                    run.load(stack, entry, job, python, out)
        if not run.workers:
            console.print("nothing to measure: none of these engines could be loaded", style="red")
            raise typer.Exit(1)
        reader: Reader | None = None
        try:
            reader = stack.enter_context(Reader(LIMIT_BYTES, threads))
        except NativeError as error:
            run.skip("memory", str(error))
        progress = stack.enter_context(Progress(console=console))
        bar = progress.add_task(f"measuring {shape}", total=rounds * len(chosen_contexts))
        for context in sorted(chosen_contexts):
            for index in range(rounds):
                run.round(index, context, repeats, reader)
                progress.advance(bar)
                write_rows(out / "peers.jsonl", run.rows)
    run.lock.release()
    print_tables(run.rows, console)
    plot_engines(run.rows, out / "peers.png")


app = typer.Typer(add_completion=False)
app.command(help=__doc__)(main)

if __name__ == "__main__":
    app()
