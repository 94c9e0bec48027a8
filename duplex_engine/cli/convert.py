"""`duplex-engine convert`: pack the weights of a checkpoint once, into a folder of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from duplex_engine.cli.run import CheckpointArgument, DtypeOption, ThreadsOption
from duplex_engine.convert import convert as convert_checkpoint
from duplex_engine.packed import PACKED_FILE, PackedFile
from duplex_engine.progress import progress_bar

__all__ = ["convert"]


def convert(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Argument(help="Folder to write; new, or empty.")],
    weights: Annotated[
        Literal["int8", "int4", "bfloat16"],
        typer.Option(help="Format of the matrices: 8.25, 4.5 or 16 bits a weight."),
    ],
    dtype: DtypeOption = "auto",
    mtp_layers: Annotated[
        int, typer.Option(help="Multi-token-prediction layers to pack as well.", min=0)
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier conversion in OUT.")
    ] = False,
    threads: ThreadsOption = None,
) -> None:
    """Pack a checkpoint's weights into a folder that loads without it, faster.

    OUT gets config.json, tokenizer.json and packed.safetensors, which holds the weights in the
    layout that the CPU computes with. Every command takes OUT in place of the checkpoint. It holds
    the one format that it was made for; for another, convert the checkpoint again. A new version of
    the engine may ask for that too, so keep the checkpoint.

    Examples:

    `duplex-engine convert checkpoints/mine checkpoints/mine-int4 --weights int4`

    `duplex-engine run question.wav -c checkpoints/mine-int4`

    `duplex-engine convert checkpoints/mine checkpoints/mine-int8 --weights int8 --force`
    """
    with progress_bar(f"packing {out.name}") as progress:
        convert_checkpoint(
            checkpoint,
            out,
            weights=weights,
            dtype=dtype,
            mtp_layers=mtp_layers,
            force=force,
            threads=threads,
            progress=progress,
        )
    packed = PackedFile.open(out / PACKED_FILE)
    Console(highlight=False, soft_wrap=True).print(
        f"{out}: {packed.n_bytes / 2**20:,.2f} MiB of {packed.weights} weights, "
        f"{packed.dtype} rows",
        markup=False,
    )
