"""Ten minutes of stream: does the time of a micro-turn stay flat, and what does memory do?

    python bench/stream.py --out out/stream        # writes stream.jsonl and stream.png

The weights are random: time and memory do not depend on their values. Every micro-turn puts out one
token, so each is one pass. The figure in docs/figures/stream.png was made by this command.
"""

from __future__ import annotations

import json
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import soundfile
import typer
from rich.progress import track

from duplex_engine import Engine
from duplex_engine.models import write_random_checkpoint

SAMPLES = 3200  # of a micro-turn
GROUP = 50  # micro-turns of one point in the picture


def measure(preset: str, n_turns: int) -> list[dict[str, float]]:
    """One row per micro-turn: its milliseconds, and bytes held by part."""
    recording = resources.files("duplex_engine") / "examples" / "speech.flac"
    speech, _ = soundfile.read(str(recording), dtype="float32")
    sound = np.resize(speech, n_turns * SAMPLES)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_checkpoint(folder, preset)
        with Engine.load(path, memory="1GiB") as engine, engine.open_session() as session:
            for turn in track(range(n_turns), description=f"{preset}, {engine.description}"):
                start = time.perf_counter()
                session.step(audio=sound[turn * SAMPLES : (turn + 1) * SAMPLES], max_tokens=1)
                ms = 1e3 * (time.perf_counter() - start)
                rows.append({"turn": turn, "ms": ms, "rows": session.length, **session.memory})
    return rows


def picture(rows: list[dict[str, float]], title: str, path: Path) -> None:
    """Time above, memory below."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ms = np.array([row["ms"] for row in rows])
    groups = ms[: len(ms) // GROUP * GROUP].reshape(-1, GROUP)
    minutes = (np.arange(len(groups)) + 0.5) * GROUP * 0.2 / 60
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), layout="tight")
    above.plot(minutes, np.median(groups, axis=1), label=f"median of {GROUP}")
    above.plot(minutes, np.quantile(groups, 0.9, axis=1), label="90 %", linewidth=0.7)
    above.set(ylabel="ms per micro-turn", ylim=(0, None), title=title)
    above.legend()
    every = rows[::10]
    times = [row["turn"] * 0.2 / 60 for row in every]
    for key, label in (("global_bytes", "global layers"), ("local_bytes", "windows")):
        below.plot(times, [row[key] / 2**20 for row in every], label=label)
    below.plot(times, [row["conv_bytes"] / 2**20 for row in every], label="convolutions")
    below.set(xlabel="minutes of stream", ylabel="MiB held", ylim=(0, None))
    below.legend()
    figure.savefig(path, dpi=100)


def main(
    out: Annotated[Path, typer.Option(help="Folder for stream.jsonl and stream.png.")],
    preset: Annotated[str, typer.Option(help="tiny, small or moe.")] = "small",
    turns: Annotated[int, typer.Option(help="Micro-turns of 200 ms.")] = 3000,
) -> None:
    """Streams, measures and draws."""
    out.mkdir(parents=True, exist_ok=True)
    rows = measure(preset, turns)
    with (out / "stream.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    picture(rows, f"preset {preset}, float32, {turns} micro-turns", out / "stream.png")
    ms = np.array([row["ms"] for row in rows])
    tenth = len(ms) // 10
    first, last = (np.median(part) for part in (ms[tenth : 2 * tenth], ms[-tenth:]))
    typer.echo(
        f"median {np.median(ms):.2f} ms, p99 {np.quantile(ms, 0.99):.2f} ms; "
        f"last tenth / second tenth {last / first:.2f}; {rows[-1]['rows']} rows"
    )


if __name__ == "__main__":
    typer.run(main)
