"""Ten minutes of stream: does the time of a micro-turn stay flat, and what does memory do?

Two models are streamed: the preset, and the same with sliding windows in every layer. The second
shows what stays flat; the difference is the reading of the global layers' keys and values.

    python bench/stream.py --out out/stream    # writes stream.jsonl and stream.png

The weights are random: time and memory do not depend on their values. Every micro-turn puts out one
token, so each is one pass. The figure in docs/figures/stream.png was made by this command.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import matplotlib as mpl
import numpy as np
import soundfile
import typer
from numpy.typing import NDArray
from rich.progress import track

from duplex_engine import Engine
from duplex_engine.models import PRESETS, write_random_checkpoint
from duplex_engine.models.random import Dtype, Preset

SAMPLES = 3200  # of a micro-turn
GROUP = 50  # micro-turns of one point in the picture


def measure(preset: Preset, dtype: Dtype, n_turns: int) -> list[dict[str, float]]:
    """One row per micro-turn: its milliseconds, and bytes held by part."""
    recording = resources.files("duplex_engine") / "examples" / "speech.flac"
    speech, _ = soundfile.read(str(recording), dtype="float32")
    sound = np.resize(speech, n_turns * SAMPLES)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_checkpoint(folder, preset)
        with (
            Engine.load(path, dtype=dtype, memory="1GiB") as engine,
            engine.open_session() as session,
        ):
            for turn in track(range(n_turns), description=engine.description):
                start = time.perf_counter()
                session.step(audio=sound[turn * SAMPLES : (turn + 1) * SAMPLES], max_tokens=1)
                ms = 1e3 * (time.perf_counter() - start)
                rows.append({"turn": turn, "ms": ms, "rows": session.length, **session.memory})
    return rows


def grouped(rows: list[dict[str, float]]) -> NDArray[np.float64]:
    """(groups, GROUP) milliseconds."""
    ms = np.array([row["ms"] for row in rows])
    return ms[: len(ms) // GROUP * GROUP].reshape(-1, GROUP)


def picture(runs: dict[str, list[dict[str, float]]], title: str, path: Path) -> None:
    """Time above, memory of the first run below."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), layout="tight")
    for name, rows in runs.items():
        groups = grouped(rows)
        minutes = (np.arange(len(groups)) + 0.5) * GROUP * 0.2 / 60
        above.plot(minutes, np.median(groups, axis=1), label=f"{name}: median of {GROUP}")
    above.set(ylabel="ms per micro-turn", ylim=(0, None), title=title)
    above.legend()
    every = next(iter(runs.values()))[::10]
    times = [row["turn"] * 0.2 / 60 for row in every]
    for key, label in (("global_bytes", "global layers"), ("local_bytes", "windows")):
        below.plot(times, [row[key] / 2**20 for row in every], label=label)
    below.plot(times, [row["conv_bytes"] / 2**20 for row in every], label="convolutions")
    below.set(xlabel="minutes of stream", ylabel="MiB held", ylim=(0, None))
    below.legend()
    figure.savefig(path, dpi=100)


def main(
    out: Annotated[Path, typer.Option(help="Folder for stream.jsonl and stream.png.")],
    preset: Annotated[Literal["tiny", "small", "moe"], typer.Option(help="The model.")] = "small",
    dtype: Annotated[Dtype, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    turns: Annotated[int, typer.Option(help="Micro-turns of 200 ms.")] = 3000,
) -> None:
    """Streams, measures and draws."""
    out.mkdir(parents=True, exist_ok=True)
    sizes = PRESETS[preset]
    local = replace(sizes, layers=sizes.layers.replace("g", "l"))
    runs = {}
    for name, model in ((preset, sizes), (f"{preset}, windows only", local)):
        rows = runs[name] = measure(model, dtype, turns)
        ms = np.array([row["ms"] for row in rows])
        tenth = len(ms) // 10
        second, last = (np.median(part) for part in (ms[tenth : 2 * tenth], ms[-tenth:]))
        typer.echo(
            f"{name}: median {np.median(ms):.2f} ms, p99 {np.quantile(ms, 0.99):.2f} ms; "
            f"last tenth / second tenth {last / second:.2f}; {rows[-1]['rows']} rows"
        )
    with (out / "stream.jsonl").open("w") as file:
        for name, rows in runs.items():
            file.writelines(json.dumps({"model": name, **row}) + "\n" for row in rows)
    picture(runs, f"{turns} micro-turns, {dtype}", out / "stream.png")


if __name__ == "__main__":
    typer.run(main)
