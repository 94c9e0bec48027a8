"""Kills a worker of a tensor-parallel group at random moments, and goes on with a new group.

    python -m bench.kill_rank --kills 100
    python -m bench.kill_rank --kills 30 --device cuda_host   # ranks with a pretended GPU each

Each group serves some sessions at once (turns of sound, text, results, forgotten ranges; snapshots
every few turns) and a background session that decodes. Then one of its workers is killed by
SIGKILL: while it loads, in a pass, in a snapshot, between calls. Every call in progress must end
with RankFailed within a second, and so must the next one; `close` must return, and no process be
left. The next group restores the sessions from their snapshots: every line that comes out must
equal the line of a group that was never disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.progress import Progress

from bench.crash import MAX_POSITIONS, Truth, turn
from duplex_engine import DuplexError, Engine, RankFailed, Session
from duplex_engine.models import write_random_checkpoint

N_SESSIONS = 2
LONGEST_LIFE_S = 0.3  # of a group, from its first call on
HANG_S = 10.0
WHILE_LOADING = 0.1  # of the kills
MEMORY_DISK = Path("/dev/shm")  # a disk that takes seconds to sync a snapshot would count as late


@dataclass(frozen=True)
class Group:
    """What is loaded again and again."""

    folder: Path
    ranks: int
    device: str
    transport: str

    def load(self) -> Engine:
        return Engine.load(
            self.folder,
            memory="128MiB",
            threads=1,
            rewind_rows=16,
            tensor_parallel=self.ranks,
            device=self.device,
            transport=self.transport,
        )


def open_session(engine: Engine, index: int) -> Session:
    return engine.open_session(max_positions=MAX_POSITIONS, temperature=0.8, seed=index)


@dataclass
class Caller:
    """A thread that makes calls until one of them fails."""

    call: Callable[[], object]
    error: BaseException | None = None
    ended_s: float = 0.0
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while True:
                self.call()
        except BaseException as error:  # judged by who joins
            self.error, self.ended_s = error, time.monotonic()


@dataclass
class Stream:
    """One session over all groups: its place, its snapshot, and what came out."""

    index: int
    snapshot: Path
    every: int
    lines: list[tuple[int, str]] = field(default_factory=list)
    session: Session | None = None
    n_saved: int = 0

    def begin(self, engine: Engine) -> None:
        if self.snapshot.exists():
            self.session = engine.restore(self.snapshot)
        else:
            self.session = open_session(engine, self.index)

    def step(self) -> None:
        assert self.session is not None
        k = self.session._core.turn
        self.lines.append((k, turn(self.session, k)))
        if (k + 1) % self.every == 0:
            self.session.snapshot(self.snapshot)
            self.n_saved += 1


def children(of_truth: list[int]) -> list[psutil.Process]:
    """The worker processes of the group at hand."""
    return [child for child in psutil.Process().children() if child.pid not in of_truth]


def kill_while_loading(
    group: Group, keep: list[int], rng: random.Random, counts: Counter[str]
) -> None:
    """The load must end with an error that tells which rank is gone."""
    loader = Caller(lambda: group.load().close())
    while len(found := children(keep)) < group.ranks - 1:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.1))
    try:
        os.kill(rng.choice(found).pid, signal.SIGKILL)
    except ProcessLookupError:
        counts["kills that came too late"] += 1
    loader.thread.join(HANG_S)
    counts["hangs"] += loader.thread.is_alive()
    counts["other errors"] += not isinstance(loader.error, RankFailed)
    counts["kills while loading"] += 1


def kill_while_serving(
    group: Group, streams: list[Stream], rng: random.Random, counts: Counter[str]
) -> float:
    """Returns the seconds until the last call in progress had ended."""
    engine = group.load()
    for stream in streams:
        stream.begin(engine)
    first = streams[0].session
    assert first is not None
    thinker = first.fork(max_positions=MAX_POSITIONS, background=True)
    callers = [Caller(stream.step) for stream in streams]
    callers.append(Caller(lambda: thinker.append(text=[300] * 20) or thinker.decode(5)))
    time.sleep(rng.uniform(0, LONGEST_LIFE_S))
    assert engine._ranks is not None
    os.kill(rng.choice(engine._ranks.pids), signal.SIGKILL)
    killed_s = time.monotonic()
    for caller in callers:
        caller.thread.join(HANG_S)
        counts["hangs"] += caller.thread.is_alive()
        counts["other errors"] += not isinstance(caller.error, RankFailed)
    slowest_s = max(caller.ended_s for caller in callers) - killed_s
    try:
        thinker.append(text=[300])
        counts["later calls without an error"] += 1
    except DuplexError as error:
        counts["other errors"] += not isinstance(error, RankFailed)
    engine.close()
    return slowest_s


def main(
    kills: Annotated[int, typer.Option(help="how often")] = 100,
    ranks: Annotated[int, typer.Option(help="of each group")] = 2,
    transport: Annotated[str, typer.Option(help="of each group")] = "auto",
    every: Annotated[int, typer.Option(help="turns between two snapshots")] = 3,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
    limit: Annotated[float, typer.Option(help="seconds from a kill to every error")] = 1.0,
    device: Annotated[str, typer.Option(help="of the ranks")] = "cpu",
) -> None:
    """Kills a worker again and again; fails unless all that is promised holds."""
    bad = ("hangs", "other errors", "calls that ended late", "later calls without an error",
           "processes left", "turns that differ")  # fmt: skip
    counts: Counter[str] = Counter(dict.fromkeys(bad, 0))
    rng = random.Random(seed)
    slowest_s = 0.0
    place = MEMORY_DISK if MEMORY_DISK.is_dir() else None
    with (
        tempfile.TemporaryDirectory(dir=place) as name,
        Progress(console=Console(stderr=True)) as bar,
    ):
        folder = Path(name)
        group = Group(write_random_checkpoint(folder / "model"), ranks, device, transport)
        streams = [Stream(n, folder / f"snapshot{n}", every) for n in range(N_SESSIONS)]
        with group.load() as engine:
            assert engine._ranks is not None
            keep = engine._ranks.pids
            for _ in bar.track(range(kills), description=f"kills, seed {seed}"):
                counts["kills"] += 1
                if rng.random() < WHILE_LOADING:
                    kill_while_loading(group, keep, rng, counts)
                else:
                    ended_s = kill_while_serving(group, streams, rng, counts)
                    slowest_s = max(slowest_s, ended_s)
                    counts["calls that ended late"] += ended_s > limit
                counts["processes left"] += len(children(keep))
            for stream in streams:
                truth = Truth(open_session(engine, stream.index))
                for k, line in stream.lines:
                    counts["turns"] += 1
                    counts["turns that differ"] += line != truth.line(k)
                counts["snapshots"] += stream.n_saved
    for what in sorted(counts):
        typer.echo(f"{what}: {counts[what]}")
    typer.echo(f"slowest error after a kill: {slowest_s * 1e3:.0f} ms")
    if any(counts[what] for what in bad) or not counts["turns"]:
        raise typer.Exit(os.EX_SOFTWARE)


if __name__ == "__main__":
    typer.run(main)
