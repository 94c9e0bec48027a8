"""Kills a process at random moments and looks whether its session goes on as if nothing happened.

    python -m bench.crash --kills 200

A worker runs one stream of micro-turns (sound, typed text, results, forgotten ranges, sampled
tokens), takes a snapshot every few turns and writes down what came out of each. It is killed by
SIGKILL: while it starts, while it restores, in a turn, or while it writes a snapshot. The next
worker goes on from the file that is there. Every line that any worker wrote must equal the line of
a run that was never interrupted; a snapshot may never be refused, and never be older than the last
one that was finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress

from duplex_engine import Engine, Session
from duplex_engine.models import write_random_checkpoint

TURN = 3200  # samples of a micro-turn
FIRST_WORD = 264  # token ids from here on are neither control tokens nor bytes
FORGET_EVERY, FORGET_BLOCKS = 40, 6
MAX_POSITIONS = 4096
LONGEST_LIFE_S = 0.25  # after the start, unless the worker is killed before


def load(folder: Path) -> Engine:
    return Engine.load(folder, memory="64MiB", threads=1, rewind_rows=16)


def open_session(engine: Engine) -> Session:
    return engine.open_session(max_positions=MAX_POSITIONS, temperature=0.8, seed=11)


def turn(session: Session, k: int) -> str:
    """Runs micro-turn `k` of the stream; returns one line that tells all of it."""
    rng = np.random.default_rng(k)
    # A part of a frame always waits, and never a whole micro-turn: those would be merged.
    n_samples = TURN + (123 if k == 0 else 0)
    inputs: dict[str, Any] = {"audio": rng.standard_normal(n_samples).astype(np.float32) * 0.1}
    if k % 4 == 1:
        inputs["text"] = rng.integers(FIRST_WORD, 320, 5)
    if k % 6 == 2:
        inputs["result"] = rng.integers(FIRST_WORD, 320, 9)
    if k % FORGET_EVERY == FORGET_EVERY - 1:
        blocks = FORGET_BLOCKS * (k // FORGET_EVERY)
        session.forget(64, 64 * (1 + blocks))
    answer = session.step(**inputs)
    memory = hashlib.sha256(json.dumps(session._core.digests()).encode()).hexdigest()[:16]
    return json.dumps([k, answer.token_ids, answer.text, session.length, session.marks[0], memory])


def work(folder: Path, every: int) -> None:
    """The worker: goes on from the snapshot, if there is one, until it is killed."""
    path = folder / "snapshot"
    with (folder / "log").open("a", buffering=1) as log, load(folder / "model") as engine:
        session = engine.restore(path) if path.exists() else open_session(engine)
        k = session._core.turn
        log.write(json.dumps({"from": k}) + "\n")
        while True:
            log.write(turn(session, k) + "\n")
            k += 1
            if k % every == 0:
                session.snapshot(path)
                log.write(json.dumps({"saved": k}) + "\n")


@dataclass
class Truth:
    """The run that is never interrupted, as far as it was asked for."""

    session: Session
    lines: list[str] = field(default_factory=list)

    def line(self, k: int) -> str:
        while len(self.lines) <= k:
            self.lines.append(turn(self.session, len(self.lines)))
        return self.lines[k]


def kill_one(folder: Path, every: int, rng: random.Random, counts: Counter[str]) -> None:
    """Starts a worker and kills it: soon, or some turns after it has begun."""
    log = folder / "log"
    n_before = log.stat().st_size if log.exists() else 0
    command = [sys.executable, "-m", "bench.crash", "--work", str(folder), "--every", str(every)]
    worker = subprocess.Popen(command, stderr=subprocess.PIPE)
    started = time.monotonic()
    soon = rng.random() < 0.1
    while not soon and (not log.exists() or log.stat().st_size == n_before):
        if worker.poll() is not None or time.monotonic() - started > 60:
            break
        time.sleep(0.001)
    time.sleep(rng.uniform(0, LONGEST_LIFE_S))
    if worker.poll() is not None:
        counts["failed by themselves"] += 1
    worker.send_signal(signal.SIGKILL)
    _, error = worker.communicate()
    if error:
        sys.stderr.write(error.decode())
    counts["kills"] += 1
    counts["kills before the first turn"] += log.exists() and log.stat().st_size == n_before
    n_parts = len(list(folder.glob(".snapshot.*.part")))
    counts["kills in the middle of a snapshot"] = n_parts


def check(folder: Path, truth: Truth, every: int, counts: Counter[str]) -> None:
    """Reads the log of all workers against the truth."""
    saved = 0
    text = (folder / "log").read_text() if (folder / "log").exists() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            counts["lines cut by a kill"] += 1
            continue
        if isinstance(entry, list):
            counts["turns"] += 1
            counts["turns that differ"] += line != truth.line(entry[0])
        elif "saved" in entry:
            counts["snapshots"] += 1
            saved = entry["saved"]
        else:
            # One more may have been finished, and its worker killed before it could say so.
            counts["restarts"] += 1
            counts["restarts from a wrong place"] += entry["from"] not in (saved, saved + every)
            saved = entry["from"]


def main(
    kills: Annotated[int, typer.Option(help="how often")] = 200,
    every: Annotated[int, typer.Option(help="turns between two snapshots")] = 3,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
    worker: Annotated[Path | None, typer.Option("--work", hidden=True)] = None,
) -> None:
    """Kills a worker again and again; fails unless every run went on exactly."""
    if worker is not None:
        work(worker, every)
        return
    counts: Counter[str] = Counter({"turns that differ": 0, "restarts from a wrong place": 0})
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as bar:
        folder = Path(name)
        write_random_checkpoint(folder / "model")
        for _ in bar.track(range(kills), description="kills"):
            kill_one(folder, every, rng, counts)
        with load(folder / "model") as engine, open_session(engine) as session:
            check(folder, Truth(session), every, counts)
    for what in sorted(counts):
        typer.echo(f"{what}: {counts[what]}")
    bad = ("turns that differ", "restarts from a wrong place", "failed by themselves")
    if any(counts[what] for what in bad) or not counts["turns"]:
        raise typer.Exit(os.EX_SOFTWARE)


if __name__ == "__main__":
    typer.run(main)
