"""`duplex-engine demo`: a recorded scene, live, to the model that comes with the package."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from duplex_engine.arguments import found
from duplex_engine.cli.live import JsonView, LineView, View
from duplex_engine.cli.output import check_output
from duplex_engine.cli.run import (
    CheckpointOption,
    DeviceOption,
    JsonOption,
    TensorParallelOption,
    ThreadsOption,
    turn_duration_ms,
)
from duplex_engine.engine import Engine
from duplex_engine.errors import BackendUnavailable, InvalidArgument
from duplex_engine.evaluation.plots import plot_timeline
from duplex_engine.evaluation.showcase import Reaction, react, read_showcase
from duplex_engine.evaluation.streams import Audio, TimedWord, run_stream
from duplex_engine.types import MicroTurn

__all__ = ["demo"]

CAPTION_WIDTH = 30


def demo(
    checkpoint: CheckpointOption = "reference",
    realtime: Annotated[bool, typer.Option(help="Keep to the clock, or go on at once.")] = True,
    picture: Annotated[Path, typer.Option(help="Where the timeline is drawn, as PNG.")] = Path(
        "out/demo.png"
    ),
    json: JsonOption = False,
    threads: ThreadsOption = None,
    tensor_parallel: TensorParallelOption = 1,
    device: DeviceOption = "cpu",
) -> None:
    """Play a recorded scene to a model, live, and measure how fast it reacts.

    A voice counts and skips a number, reads a sentence and mispronounces a word, and asks two
    questions. The model hears the sound alone and decides by itself, every 200 ms, whether to say
    something. One question it hands to a background model (here a function with one answer, which
    comes after three seconds) and goes on listening.

    Examples:

    `duplex-engine demo`

    `duplex-engine demo --no-realtime --picture timeline.png`

    `duplex-engine demo -c checkpoints/mine`
    """
    check_output(picture, "--picture")
    if picture.suffix.lower() != ".png":
        raise InvalidArgument(
            f"--picture: expected a name that ends in .png, found {found(str(picture))}"
        )
    with as_file(files("duplex_engine") / "examples") as folder:
        showcase = read_showcase(folder)
    with (
        Engine.load(
            checkpoint,
            device=device,
            threads=threads,
            tensor_parallel=tensor_parallel,
            progress=True,
        ) as engine,
        engine.open_session() as session,
    ):
        turn_ms = turn_duration_ms(engine.config)
        view: View = JsonView() if json else LineView(turn_ms, CAPTION_WIDTH)
        view.note(engine.description)
        turn_s = turn_ms / 1000
        results: dict[int, str] = {}  # by micro-turn

        def show(sound: Audio, result: object, turn: MicroTurn) -> None:
            if isinstance(result, str):
                results[turn.index] = result
            begin_s, end_s = turn.index * turn_s, (turn.index + 1) * turn_s
            said = [word.text for word in showcase.heard if begin_s < word.end_s <= end_s]
            view.show(turn, sound, " ".join(said))

        try:
            log = run_stream(
                session,
                showcase.audio,
                agent=lambda request: showcase.script.background.get(request, "closed"),
                agent_delay_s=showcase.script.background_s,
                realtime=realtime,
                turn_s=turn_s,
                watch=show,
            )
        finally:
            view.end()
    reactions = react(showcase, log, results)
    if not json:
        _print_reactions(reactions)
    picture.parent.mkdir(parents=True, exist_ok=True)
    due = [reaction.due for reaction in reactions]
    try:
        plot_timeline(
            picture,
            showcase.audio,
            log,
            heard=showcase.heard,
            due=[TimedWord(item.say, item.time_s, item.time_s) for item in due],
        )
    except BackendUnavailable as error:
        view.note(f"no picture: {error}")
    else:
        view.note(f"timeline: {picture}")


def _print_reactions(reactions: Sequence[Reaction]) -> None:
    table = Table("at", "what happened", "due", "reaction", title="reactions", title_justify="left")
    table.columns[3].justify = "right"
    for reaction in reactions:
        due, latency_s = reaction.due, reaction.latency_s
        table.add_row(
            f"{due.time_s:.2f} s",
            due.why,
            f"delegate: {due.say}" if due.kind == "delegate" else due.say,
            "[red]none[/]" if latency_s is None else f"{1000 * latency_s:.0f} ms",
        )
    out = Console(highlight=False)
    out.print(table)
    latencies_ms = [1000 * r.latency_s for r in reactions if r.latency_s is not None]
    if latencies_ms:
        out.print(
            f"{len(latencies_ms)} of {len(reactions)} reactions, "
            f"median {np.median(latencies_ms):.0f} ms after the decisive moment",
            style="bold",
        )
