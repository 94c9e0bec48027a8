"""What int8 and int4 weights, and keys and values in int8, cost in quality, on the model that comes
with the package.

    python -m bench.quality

The float32 engine listens to the package's recordings and answers; then every format reads the same
sound and the same answers, and is asked for its logits at each place where a token was put out.
Printed: the perplexity of the float32 engine's own tokens, how often the most likely token is the
same, and the mean Kullback-Leibler divergence from float32, in nats.
"""

from __future__ import annotations

from importlib import resources
from typing import Any, Literal

import numpy as np
import soundfile
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from duplex_engine import Engine

SAMPLES = 3200  # of a micro-turn
RECORDINGS = ("showcase.flac", "speech.flac")
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8, float32 rows": {"dtype": "float32", "weights": "int8"},
    "int4, float32 rows": {"dtype": "float32", "weights": "int4"},
    "int8": {"dtype": "bfloat16", "weights": "int8"},
    "int4": {"dtype": "bfloat16", "weights": "int4"},
}
CACHES: tuple[Literal["auto", "int8"], ...] = ("auto", "int8")

Turns = list[tuple[NDArray[np.float32], list[int]]]  # sound heard, tokens put out


def answers(engine: Engine) -> list[Turns]:
    """What the engine puts out to each recording, micro-turn by micro-turn."""
    streams = []
    for name in RECORDINGS:
        path = resources.files("duplex_engine") / "examples" / name
        sound, _ = soundfile.read(str(path), dtype="float32")
        with engine.open_session() as session:
            pieces = [
                sound[at : at + SAMPLES] for at in range(0, len(sound) - SAMPLES + 1, SAMPLES)
            ]
            streams.append([(piece, list(session.step(piece).token_ids)) for piece in pieces])
    return streams


def log_probabilities(engine: Engine, streams: list[Turns]) -> NDArray[np.float64]:
    """(tokens put out, vocabulary): before each of them, given all that came earlier."""
    rows = []
    for turns in streams:
        with engine.open_session() as session:
            for sound, tokens in turns:
                rows.append(session.append(audio=sound, logits="last"))
                behind = session.append(text=tokens, logits="all")
                rows.append(behind[:-1])  # the last is behind `listen`
    logits: NDArray[np.float64] = np.concatenate(rows).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_sums: NDArray[np.float64] = np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits - log_sums


def main() -> None:
    """Measures every format against float32."""
    with Engine.load("reference", dtype="float32") as engine:
        streams = answers(engine)
    tokens = np.array([t for turns in streams for _, out in turns for t in out])
    table = Table("weights and rows", "cache", "perplexity", "same most likely token", "KL, nats")
    reference = None
    for name, options in FORMATS.items():
        for kv_dtype in CACHES:
            with Engine.load("reference", kv_dtype=kv_dtype, **options) as engine:
                log_p = log_probabilities(engine, streams)
                cache = engine.kv_dtype
            reference = log_p if reference is None else reference
            perplexity = np.exp(-log_p[np.arange(len(tokens)), tokens].mean())
            same = (log_p.argmax(axis=1) == reference.argmax(axis=1)).mean()
            divergence = (np.exp(reference) * (reference - log_p)).sum(axis=1).mean()
            figures = f"{perplexity:.4f}", f"{100 * same:.2f} %", f"{divergence:.6f}"
            table.add_row(name, cache, *figures)
    Console().print(f"{len(tokens)} tokens of {len(streams)} recordings")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
