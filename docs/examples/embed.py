"""Embedding in 20 lines: a recorded scene, live, and a background that answers one question.

Run it with `python docs/examples/embed.py`. A live program feeds a microphone's chunks instead and
leaves out the wait: what comes later enters later.
"""

from __future__ import annotations

from importlib.resources import files

import soundfile

from duplex_engine import Engine
from duplex_engine.background import Delegations, Task


async def worker(task: Task) -> str:
    """Whatever takes longer than a micro-turn: a search, a model, a colleague."""
    return {"weather paris": "sunny warm"}[task.text]


with (files("duplex_engine") / "examples" / "showcase.flac").open("rb") as file:
    samples, rate = soundfile.read(file, dtype="float32")
chunk = rate // 5  # 200 ms

with (
    Engine.load("reference") as engine,
    engine.open_session() as session,
    Delegations(session, worker) as background,
):
    for start in range(0, len(samples), chunk):
        turn = background.step(audio=samples[start : start + chunk], sample_rate=rate)
        print(turn.text, end="", flush=True)
        background.wait(timeout_s=1.0)
print()
