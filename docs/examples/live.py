"""A live session in real time: a microphone's thread, a reader's thread, an interruption, a trace.

    python docs/examples/live.py --seconds 10

The "microphone" is a recording that comes with the package, in chunks of 100 ms, some of them lost,
late or sent twice, as over a network.
"""

from __future__ import annotations

import random
import threading
import time
from importlib import resources
from pathlib import Path
from typing import Annotated

import soundfile
import typer

from duplex_engine import Engine
from duplex_engine.live import LiveEngine, LiveSession, LiveTurn

CHUNK_S = 0.1


def microphone(session: LiveSession, seconds: float) -> None:
    """Pushes numbered chunks at the pace of real time, badly."""
    path = resources.files("duplex_engine") / "examples" / "showcase.flac"
    sound, rate = soundfile.read(str(path), dtype="float32", frames=int(seconds * 16_000))
    size, chance = int(CHUNK_S * rate), random.Random(0)
    for seq in range(len(sound) // size):
        time.sleep(CHUNK_S)
        chunk = sound[seq * size : (seq + 1) * size]
        if chance.random() < 0.03:
            continue  # lost: silence takes its place
        session.push_audio(chunk, seq, sample_rate=rate)
        if chance.random() < 0.1:
            session.push_audio(chunk, seq, sample_rate=rate)  # sent twice: appended once


def show(out: LiveTurn) -> None:
    """One line per micro-turn that says something."""
    if out.turn.text or out.events:
        print(f"{out.turn.index:4d}  epoch {out.epoch}  {out.turn.text!r}  {list(out.events)}")


def main(
    seconds: Annotated[float, typer.Option()] = 10.0,
    trace: Annotated[Path | None, typer.Option(help="write a trace for ui.perfetto.dev")] = None,
) -> None:
    """Talks to the model that comes with the package."""
    with Engine.load("reference") as engine, LiveEngine(engine) as live:
        with live.open() as session:
            reader = session.on_turn(show)
            speaker = threading.Thread(target=microphone, args=(session, seconds))
            speaker.start()
            time.sleep(seconds / 2)
            session.playback_ack(0)  # nothing but the first micro-turn was really played
            session.interrupt()
            speaker.join()
            session.push_text("hello", op_id="greeting")
            session.push_text("hello", op_id="greeting")  # a retry: not typed twice
            time.sleep(0.5)
        reader.join()
        print(dict(live.counters))
        if trace is not None:
            live.trace.save(trace)


if __name__ == "__main__":
    typer.run(main)
