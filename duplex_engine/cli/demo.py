"""`duplex-engine demo`: the sample recording through a small model; also `make run`."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Annotated

import typer

from duplex_engine.cli.live import JsonView, LineView, View
from duplex_engine.cli.run import (
    CheckpointOption,
    JsonOption,
    ThreadsOption,
    checkpoint_or_random,
    turn_duration_ms,
)
from duplex_engine.cli.stream import file_sound, stream
from duplex_engine.engine import Engine

__all__ = ["demo"]


def demo(
    checkpoint: CheckpointOption = None,
    preset: Annotated[
        str, typer.Option(help="Size of the random model: tiny, small or moe.")
    ] = "tiny",
    realtime: Annotated[bool, typer.Option(help="Keep to the clock, or go on at once.")] = True,
    json: JsonOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Stream a recording of a real voice through a small model, live.

    Examples:

    `duplex-engine demo`

    `duplex-engine demo --preset small --no-realtime`
    """
    recording = files("duplex_engine") / "examples" / "speech.flac"
    with (
        checkpoint_or_random(checkpoint, preset) as (folder, note),
        as_file(recording) as path,
        Engine.load(folder, threads=threads, progress=True) as engine,
        engine.open_session() as session,
    ):
        turn_ms = turn_duration_ms(engine.config)
        view: View = JsonView() if json else LineView(turn_ms)
        view.note(engine.description)
        if note:
            view.note(note)
        try:
            stream(session, file_sound(path, turn_ms), view, turn_ms, realtime=realtime)
        finally:
            view.end()
