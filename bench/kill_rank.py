"""Kills a worker of a tensor-parallel group at random moments, and goes on with a new group.

    python -m bench.kill_rank --kills 100
    python -m bench.kill_rank --kills 30 --device cuda_host   # ranks with a pretended GPU each
    python -m bench.kill_rank --device cuda_host --transport nvls,p2p   # drawn for each group

Each group serves some sessions at once (turns of sound, text, results, forgotten ranges; snapshots
every few turns) and a background session that decodes. Then one of its workers is killed by
SIGKILL: while it loads, or after a random number of turns and snapshots, in the middle of the next.
Every call in progress must end within a second with a RankFailed that says what was killed, and so
must the next one; `close` must return, and no process be left. The next group restores the sessions
from their snapshots: every line that comes out must equal the line of a group that was never
disturbed, which for pretended GPUs is one of the CPU.
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
from dataclasses import dataclass, field, replace
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
LONGEST_LIFE = 24  # turns and snapshots of a group's first session
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
    page: str | None = None

    def load(self) -> Engine:
        return Engine.load(
            self.folder,
            memory=self.ranks * 2**26,
            page=self.page,
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
    n_calls: int = 0  # to the group at hand
    saves: bool = False  # whether the call at work is a snapshot
    last_s: dict[bool, float] = field(default_factory=lambda: {False: 0.1, True: 0.01})
    counts: Counter[str] = field(default_factory=Counter)

    def begin(self, engine: Engine) -> None:
        self.n_calls, self.saves = 0, False
        if self.snapshot.exists():
            self.session = engine.restore(self.snapshot)
            self.counts["snapshots restored"] += 1
        else:
            self.session = open_session(engine, self.index)

    def call(self) -> None:
        """A turn, or a snapshot after every few."""
        assert self.session is not None
        began_s, k = time.monotonic(), self.session._core.turn
        if self.saves:
            self.session.snapshot(self.snapshot)
            self.counts["snapshots"] += 1
        else:
            self.lines.append((k, turn(self.session, k)))
        self.last_s[self.saves] = time.monotonic() - began_s
        self.saves = not self.saves and (k + 1) % self.every == 0
        self.n_calls += 1


def children(of_truth: list[int]) -> list[psutil.Process]:
    """The worker processes of the group at hand."""
    return [child for child in psutil.Process().children() if child.pid not in of_truth]


def killed(error: BaseException | None) -> bool:
    """Whether it is the one that was to be raised."""
    return isinstance(error, RankFailed) and "was ended by SIGKILL" in str(error)


def kill_while_loading(
    group: Group, keep: list[int], rng: random.Random, counts: Counter[str]
) -> float:
    """The load must end with an error that tells which rank is gone. Returns the seconds."""
    loader = Caller(lambda: group.load().close())
    while len(found := children(keep)) < group.ranks - 1:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.1))
    try:
        os.kill(rng.choice(found).pid, signal.SIGKILL)
    except ProcessLookupError:
        counts["kills that came too late"] += 1
    killed_s = time.monotonic()
    loader.thread.join(HANG_S)
    counts["hangs"] += loader.thread.is_alive()
    counts["other errors"] += not killed(loader.error)
    counts["kills while loading"] += 1
    return loader.ended_s - killed_s


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
    callers = [Caller(stream.call) for stream in streams]
    callers.append(Caller(lambda: thinker.append(text=[300] * 20) or thinker.decode(5)))
    n_calls = rng.randrange(LONGEST_LIFE)
    while streams[0].n_calls < n_calls and callers[0].thread.is_alive():
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, streams[0].last_s[streams[0].saves]))
    counts["kills in a snapshot"] += any(stream.saves for stream in streams)
    assert engine._ranks is not None
    os.kill(rng.choice(engine._ranks.pids), signal.SIGKILL)
    killed_s = time.monotonic()
    for caller in callers:
        caller.thread.join(HANG_S)
        counts["hangs"] += caller.thread.is_alive()
        counts["other errors"] += not killed(caller.error)
    slowest_s = max(caller.ended_s for caller in callers) - killed_s
    try:
        thinker.append(text=[300])
        counts["later calls without an error"] += 1
    except DuplexError as error:
        counts["other errors"] += not killed(error)
    engine.close()
    return slowest_s


def main(
    kills: Annotated[int, typer.Option(help="how often")] = 100,
    ranks: Annotated[int, typer.Option(help="of each group")] = 2,
    transport: Annotated[
        str, typer.Option(help="of the groups; with commas between several, one is drawn for each")
    ] = "auto",
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
        model = write_random_checkpoint(folder / "model")
        groups = [Group(model, ranks, device, one) for one in transport.split(",")]
        undisturbed = groups[0]
        if device == "cuda_host":
            undisturbed = replace(undisturbed, device="cpu", transport="auto", page="2MiB")
        streams = [Stream(n, folder / f"snapshot{n}", every) for n in range(N_SESSIONS)]
        with undisturbed.load() as engine:
            assert engine._ranks is not None
            keep = engine._ranks.pids
            for _ in bar.track(range(kills), description=f"kills, seed {seed}"):
                counts["kills"] += 1
                group = rng.choice(groups)
                if rng.random() < WHILE_LOADING:
                    ended_s = kill_while_loading(group, keep, rng, counts)
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
                counts.update(stream.counts)
    for what in sorted(counts):
        typer.echo(f"{what}: {counts[what]}")
    typer.echo(f"slowest error after a kill: {slowest_s * 1e3:.0f} ms")
    if any(counts[what] for what in bad) or not counts["turns"]:
        raise typer.Exit(os.EX_SOFTWARE)


if __name__ == "__main__":
    typer.run(main)
