"""Makes the showcase that `duplex-engine demo` plays, from voices that no training has heard.

python -m duplex_engine.training.showcase duplex_engine/examples --bank out/bank
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import typer

from duplex_engine.evaluation.showcase import RECORDING, SCRIPT, Due, Script
from duplex_engine.training.bank import Bank
from duplex_engine.training.command import run_command
from duplex_engine.training.stage import SAMPLE_RATE, Said, Stage

__all__ = ["write_showcase"]

COUNTER, READER = "recordings/allison", "piper/joe"
SOURCE = (
    "The counting is by Allison Smith, from the Asterisk sound prompts (Digium, CC-BY-SA-3.0); the "
    "rest by the Piper voice 'joe' (CC0 recordings). No training has heard either. Cut together by "
    "duplex_engine/training/showcase.py; the recording may be used under CC-BY-SA-3.0."
)
BACKGROUND = {"weather paris": "sunny warm"}
BACKGROUND_S = 3.0


def write_showcase(folder: Path, bank: Bank) -> Script:
    """Writes the recording and its script into a folder; returns the script."""
    stages = {
        voice: Stage(bank, np.random.default_rng(0), group)
        for voice, group in ((COUNTER, "human"), (READER, "held"))
    }
    heard: list[tuple[str, float]] = []
    due: list[Due] = []
    now_s = 0.7

    def say(voice: str, text: str, pause_s: float, *, wrongly: bool = False) -> Said:
        nonlocal now_s
        stage = stages[voice]
        stage.voice, stage.time_s = voice, now_s
        said = stage.say(text, wrongly=wrongly)
        if all(end_s is not None for _, end_s in said.words):
            heard.extend((word, round(end_s or 0.0, 3)) for word, end_s in said.words)
        else:
            heard.append((text, round(said.end_s, 3)))
        now_s = said.end_s + pause_s
        return said

    def expect(kind: str, why: str, said: Said, words: str) -> None:
        due.append(Due(kind, why, round(said.end_s, 3), words))

    for item in ["one", "two", "three", "five", "six", "seven"]:
        said = say(COUNTER, item, 0.35)
        if item == "five":
            expect("correct", "five instead of four", said, "no four")
    now_s += 1.8
    for word in ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]:
        said = say(READER, word, 0.06, wrongly=word == "lazy")
        if word == "lazy":
            expect("pronounce", "lazy, badly pronounced", said, "say lazy")
    now_s += 1.8
    said = say(READER, "what is the weather in paris", 1.2)
    expect("delegate", "a question it cannot answer", said, "weather paris")
    said = say(READER, "what comes after monday", 3.5)
    expect("answer", "one that it can", said, "tuesday")

    n = round(now_s * SAMPLE_RATE)
    audio = sum(stage.mixed(n) for stage in stages.values())
    noise = np.random.default_rng(1).normal(0, 3e-4, n)
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / RECORDING, (audio + noise).astype(np.float32), SAMPLE_RATE)
    script = Script(SOURCE, tuple(heard), tuple(due), BACKGROUND, BACKGROUND_S)
    (folder / SCRIPT).write_text(json.dumps(asdict(script), indent=1) + "\n", encoding="utf-8")
    return script


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the two files.")],
    bank: Annotated[Path, typer.Option(help="Speech bank.")],
) -> None:
    """Writes showcase.flac and showcase.json."""
    for item in write_showcase(out, Bank.open(bank)).due:
        print(f"{item.time_s:5.2f} s  {item.why}: {item.say}")


if __name__ == "__main__":
    run_command(main)
