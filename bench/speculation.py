"""Several tokens a pass: what another row costs, and what guessing gains where text repeats.

    python bench/speculation.py    # prints four tables for each type of the weights

The model is the preset `small` with blocks that add a hundredth of what they would: the newest
token decides the next, so greedy output runs into a circle, which is text that repeats as purely as
text can. Its multi-token-prediction layers look at the newest token alone, so they guess as well as
layers can; text for them is drawn at random, so that nothing repeats. Time does not depend on the
values of weights. Arms are run in turns and the best of each is printed, because machines are
shared.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from duplex_engine import Engine
from duplex_engine.models import write_random_checkpoint

ROWS = (1, 2, 3, 5, 9, 17)
SPECULATE = (0, 1, 2, 4, 8, 16)
LAYERS = (0, 1, 2, 4)  # of multi-token prediction
PROMPT = list(range(300, 340))


def write_repeating(folder: Path) -> None:
    """The checkpoint described above."""
    write_random_checkpoint(folder, "small", interaction=False, mtp_layers=max(LAYERS))
    tensors = load_file(folder / "model.safetensors")
    mtp = load_file(folder / "mtp.safetensors")
    final_norm = tensors["model.llm.norm.weight"]
    eye = np.eye(len(final_norm), dtype=final_norm.dtype)
    for depth in range(max(LAYERS)):
        mtp[f"model.mtp.layers.{depth}.embed_norm.weight"] = final_norm
        mtp[f"model.mtp.layers.{depth}.input_proj.weight"] = np.concatenate([0 * eye, eye], axis=1)
    for file, content in ("model.safetensors", tensors), ("mtp.safetensors", mtp):
        for name, tensor in content.items():
            if "wo_ud" in name or "w2_md" in name:
                content[name] = tensor * tensor.dtype.type(0.01)
        save_file(content, folder / file)


def cost_of_rows(engine: Engine, repeats: int) -> list[float]:
    """Best milliseconds of a pass of each of `ROWS` rows."""
    best = [float("inf")] * len(ROWS)
    with engine.open_session() as session:
        session.append(text=PROMPT)
        for _ in range(repeats):
            for i, n_rows in enumerate(ROWS):
                start = time.perf_counter()
                session.append(text=PROMPT[:1] * n_rows)
                best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


Run: TypeAlias = tuple[list[int], float, int, int]


def decode(engine: Engine, speculate: int, n_new: int, n: int, temperature: float = 0.0) -> Run:
    """Decodes `n_new` tokens, then `n` under the clock: those, milliseconds, drafted, accepted."""
    with engine.open_session(speculate=speculate, temperature=temperature) as session:
        session.append(text=PROMPT)
        session.decode(n_new)
        before, start = engine.stats, time.perf_counter()
        ids = session.decode(n)
        ms = 1e3 * (time.perf_counter() - start)
        after = engine.stats
    drafted, accepted = (after[key] - before[key] for key in ("drafted", "accepted"))
    return ids, ms, drafted, accepted


def table(title: str, arm: str, arms: tuple[int, ...], runs: list[list[Run]]) -> Table:
    """A row for each arm: best time, gain over the first arm, guesses. The output is one."""
    rows = Table(arm, "ms", "gain", "drafted", "accepted", title=title)
    assert all(run[0] == runs[0][0][0] for turn in runs for run in turn)
    best = [min(run[1] for run in of_arm) for of_arm in zip(*runs, strict=True)]
    for i, k in enumerate(arms):
        _, _, drafted, accepted = runs[0][i]
        rows.add_row(
            str(k), f"{best[i]:.0f}", f"{best[0] / best[i]:.2f}", str(drafted), str(accepted)
        )
    return rows


def main(
    repeats: Annotated[int, typer.Option(help="Times that each arm is run.")] = 5,
    tokens: Annotated[int, typer.Option(help="Tokens of each half.")] = 150,
    threads: Annotated[int, typer.Option(help="Worker threads.")] = 2,
) -> None:
    """Prints the tables."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        write_repeating(Path(folder))
        for dtype in ("float32", "bfloat16"):
            with Engine.load(folder, dtype=dtype, threads=threads) as engine:
                rows = Table("rows", "ms", "of one row", title=f"{dtype}: a pass")
                costs = cost_of_rows(engine, 10 * repeats)
                for n_rows, ms in zip(ROWS, costs, strict=True):
                    rows.add_row(str(n_rows), f"{ms:.2f}", f"{ms / costs[0]:.2f}")
                console.print(rows)
                for half, n_new in (("new", 0), ("repeated", tokens)):
                    runs = [
                        [decode(engine, k, n_new, tokens) for k in SPECULATE]
                        for _ in range(repeats)
                    ]
                    title = f"{dtype}: {tokens} tokens of {half} text"
                    console.print(table(title, "speculate", SPECULATE, runs))
            with ExitStack() as stack:
                engines = [
                    stack.enter_context(
                        Engine.load(folder, dtype=dtype, threads=threads, mtp_layers=n)
                    )
                    for n in LAYERS
                ]
                runs = [
                    [
                        decode(engine, n, 0, tokens, temperature=1.0)
                        for n, engine in zip(LAYERS, engines, strict=True)
                    ]
                    for _ in range(repeats)
                ]
                title = f"{dtype}: {tokens} tokens drawn at random"
                console.print(table(title, "mtp_layers", LAYERS, runs))


if __name__ == "__main__":
    typer.run(main)
