"""`duplex-engine run`: a sound file or the microphone through a checkpoint, turn by turn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from duplex_engine.checkpoint import Checkpoint
from duplex_engine.cli.live import JsonView, LineView, View
from duplex_engine.cli.stream import file_sound, fitted_image, microphone_sound, stream
from duplex_engine.config import FRAME_MS, ModelConfig
from duplex_engine.engine import Engine
from duplex_engine.errors import InvalidArgument

__all__ = [
    "CheckpointArgument",
    "CheckpointOption",
    "DeviceOption",
    "DtypeOption",
    "JsonOption",
    "KvDtypeOption",
    "TensorParallelOption",
    "ThreadsOption",
    "WeightsOption",
    "run",
    "turn_duration_ms",
]

DEFAULT_TURN_MS = 4 * FRAME_MS  # of a checkpoint without an interaction block

CHECKPOINT_HELP = 'Checkpoint folder, or "reference", the model that comes with the package.'
CheckpointArgument = Annotated[str, typer.Argument(help=CHECKPOINT_HELP)]
CheckpointOption = Annotated[str, typer.Option("--checkpoint", "-c", help=CHECKPOINT_HELP)]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Type of rows, weights and cache; auto follows the checkpoint."),
]
WeightsOption = Annotated[
    Literal["auto", "int8", "int4", "mxfp8", "nvfp4"],
    typer.Option(
        help="Quantise the matrices while loading: less memory; mxfp8 and nvfp4 on a GPU only."
    ),
]
KvDtypeOption = Annotated[
    Literal["auto", "int8"],
    typer.Option(help="Keep keys and values in int8: half the memory, faster on the CPU."),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Worker threads. Default: one per core.")
]
TensorParallelOption = Annotated[
    int,
    typer.Option(min=1, help="Ranks that compute together, each a process (docs/PARALLEL.md)."),
]
DeviceOption = Annotated[
    str, typer.Option(help='"cpu", or "cuda" where there is a GPU (docs/GPU.md).')
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per micro-turn instead of lines.")
]


def run(
    audio: Annotated[
        Path | None, typer.Argument(help="Sound file: WAV, FLAC, OGG, MP3; any rate.")
    ] = None,
    checkpoint: CheckpointOption = "reference",
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture; give several for one per micro-turn, from the first on."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Typed text, in the first micro-turn.")] = None,
    mic: Annotated[
        bool, typer.Option("--mic", help="Listen to the microphone until Ctrl-C.")
    ] = False,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Keep to the clock instead of going on at once.")
    ] = False,
    json: JsonOption = False,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = "auto",
    kv_dtype: KvDtypeOption = "auto",
    threads: ThreadsOption = None,
    tensor_parallel: TensorParallelOption = 1,
    device: DeviceOption = "cpu",
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random numbers.")] = 0,
) -> None:
    """Stream sound through a checkpoint and show each micro-turn as it happens.

    A line shows when the micro-turn began, the level of what was heard, how long it took, what the
    session holds in memory, and what the model put out.

    Examples:

    `duplex-engine run question.wav`

    `duplex-engine run question.wav --image light.png --text "count to ten" --realtime`

    `duplex-engine run question.wav --json | jq .timing.total_us`

    `duplex-engine run --mic`
    """
    if (audio is None) == (not mic):
        raise InvalidArgument(
            "run: expected a sound file or --mic, found " + ("neither" if audio is None else "both")
        )
    with Checkpoint.open(checkpoint) as opened:
        config = opened.config
    turn_ms = turn_duration_ms(config)
    view: View = JsonView() if json else LineView(turn_ms)
    sound = microphone_sound(turn_ms) if audio is None else file_sound(audio, turn_ms)
    images = [fitted_image(path, config, view) for path in image or ()]
    with (
        Engine.load(
            checkpoint,
            device=device,
            dtype=dtype,
            weights=weights,
            kv_dtype=kv_dtype,
            threads=threads,
            tensor_parallel=tensor_parallel,
            progress=True,
        ) as engine,
        engine.open_session(temperature=temperature, seed=seed) as session,
    ):
        try:
            stream(session, sound, view, turn_ms, images=images, text=text, realtime=realtime)
        finally:
            view.end()


def turn_duration_ms(config: ModelConfig) -> int:
    """Milliseconds of a micro-turn."""
    layout = config.interaction
    return DEFAULT_TURN_MS if layout is None else layout.micro_turn_ms
