"""Live sessions in real time: how late their micro-turns are, alone and beside background work.

    python -m bench.live --sessions 4 --seconds 30

Clients push the package's recording in chunks of 100 ms, each at its own phase. In the second arm a
fork of the first session decodes in the background without a pause. Printed for each arm: the time
of a step, how long after it was due its output was there, and which share of the time that no step
needed the background got.
"""

from __future__ import annotations

import threading
import time
from importlib import resources
from typing import Annotated

import numpy as np
import soundfile
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from duplex_engine import Engine, Session
from duplex_engine.live import LiveEngine, LiveSession, LiveTurn
from duplex_engine.live.background import Slices

CHUNK_S = 0.1


def recording() -> NDArray[np.float32]:
    """(n,) at 16 kHz."""
    path = resources.files("duplex_engine") / "examples" / "showcase.flac"
    sound, _ = soundfile.read(str(path), dtype="float32")
    return np.asarray(sound, np.float32)


def push(session: LiveSession, sound: NDArray[np.float32], phase_s: float, end_s: float) -> None:
    """One client, from its phase on until `end_s` by the monotonic clock."""
    size = int(CHUNK_S * 16_000)
    begin_s = time.monotonic() + phase_s
    for n in range(10**9):
        due_s = begin_s + n * CHUNK_S
        if due_s > end_s:
            return
        time.sleep(max(due_s - time.monotonic(), 0))
        at = n * size % (len(sound) - size)
        session.push_audio(sound[at : at + size], n)


def decode(fork: Session) -> Slices:
    """Background work without end."""
    with fork:
        length = fork.length
        while True:
            fork.decode(1)
            if fork.length >= length + 16:
                fork.truncate(length)
            yield


def arm(engine: Engine, n_sessions: int, seconds: float, with_background: bool) -> list[str]:
    """One row of the table."""
    sound, turns = recording(), list[LiveTurn]()
    with LiveEngine(engine) as live:
        sessions = [live.open() for _ in range(n_sessions)]
        for session in sessions:
            session.on_turn(turns.append)
        begin_s = time.monotonic()
        clients = [
            threading.Thread(
                target=push, args=(session, sound, n * 0.2 / n_sessions, begin_s + seconds)
            )
            for n, session in enumerate(sessions)
        ]
        for client in clients:
            client.start()
        if with_background:
            time.sleep(1)
            fork = sessions[0].at_boundary(lambda inner: inner.fork(background=True)).result()
            live.background(sessions[0], decode(fork), gives_way=True)
        for client in clients:
            client.join()
        wall_s = time.monotonic() - begin_s
        counters = dict(live.counters)
    if failures := counters.get("background_failed"):
        raise RuntimeError(f"{failures} background tasks failed")
    steps = {(turn.late_us, turn.turn.timing): turn.turn.timing.total_us for turn in turns}
    idle_s = wall_s - sum(steps.values()) / 1e6 - float(with_background)
    step_ms = np.array([turn.turn.timing.total_us for turn in turns]) / 1000
    ready_ms = np.array([turn.late_us + turn.turn.timing.total_us for turn in turns]) / 1000
    return [
        "with work" if with_background else "alone",
        f"{len(turns)}",
        *(f"{np.percentile(values, p):.1f}" for values in (step_ms, ready_ms) for p in (50, 99)),
        f"{counters.get('merged_turns', 0)}",
        f"{counters.get('background_us', 0) / 1e6 / idle_s:.0%}" if with_background else "",
    ]


def main(
    model: Annotated[str, typer.Option(help="a checkpoint's folder")] = "reference",
    sessions: Annotated[int, typer.Option(min=1)] = 4,
    seconds: Annotated[float, typer.Option(min=2)] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="of both arms, in turns")] = 1,
) -> None:
    """Runs both arms and prints them."""
    columns = ("step ms p50", "p99", "ready ms p50", "p99", "merged", "of idle time")
    table = Table("", "turns", *columns)
    with Engine.load(model, memory="512MiB", max_positions=8192) as engine:
        for _ in range(rounds):
            for with_background in (False, True):
                table.add_row(*arm(engine, sessions, seconds, with_background))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
