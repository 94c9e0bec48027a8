"""A checkpoint turned into a folder of packed weights that loads by itself, and faster.

Owns what such a folder holds and when one may be written. The engine packs (`engine.py`), and
`packed.py` writes the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from duplex_engine.arguments import check_callable, file_path
from duplex_engine.checkpoint import Checkpoint
from duplex_engine.engine import Engine
from duplex_engine.errors import InvalidArgument
from duplex_engine.packed import PACKED_FILE
from duplex_engine.whole_file import unfinished_files

__all__ = ["convert"]

FILES = ("config.json", "tokenizer.json", PACKED_FILE)


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    weights: Literal["int8", "int4", "bfloat16"],
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    mtp_layers: int = 0,
    force: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes config.json, tokenizer.json and the packed weights of a checkpoint to a folder.

    Args:
        out: a new or empty folder; `Engine.load` takes it in place of the checkpoint.
        weights: format of the matrices; "bfloat16" is for everything.
        dtype: of tables, rows and cache; "auto" follows the checkpoint.
        mtp_layers: of multi-token prediction, packed as well; `Engine.load` then takes this number.
        force: replace what an earlier conversion wrote to `out`.
        progress: called with (bytes done, bytes), first while packing, then while writing.

    Raises:
        InvalidArgument: `out` is no path, holds something or cannot be written, or the types
            contradict each other.
        CheckpointError: not a checkpoint, or one that is packed already.
    """
    out = file_path(out, "out")
    if progress is not None:
        check_callable(progress, "progress")
    if weights == "bfloat16":
        if dtype == "float32":
            raise InvalidArgument(
                "dtype: expected auto or bfloat16 beside bfloat16 weights, found float32"
            )
        dtype = "bfloat16"
    with Checkpoint.open(checkpoint) as opened:
        source = opened.path
        if opened.packed is not None:
            raise InvalidArgument(
                f"{source}: expected a checkpoint with its tensors, found packed "
                f"{opened.packed.weights} weights; convert the checkpoint that they were made of"
            )
        tokenizer = opened.tokenizer_path
    try:
        _check_place(source, out, force)
        with Engine.load(
            checkpoint,
            dtype=dtype,
            weights="auto" if weights == "bfloat16" else weights,
            mtp_layers=mtp_layers,
            threads=threads,
            progress=progress,
        ) as engine:
            out.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                (out / name).unlink(missing_ok=True)  # never beside one of another conversion
            engine.write_weights(out / PACKED_FILE, progress=progress)
            if tokenizer is not None:
                shutil.copyfile(tokenizer, out / "tokenizer.json")
            shutil.copyfile(source / "config.json", out / "config.json")  # last: it is one now
    except OSError as error:
        raise InvalidArgument(
            f"{out}: expected a folder that can be written, found: {error}"
        ) from error
    return out


def _check_place(source: Path, out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InvalidArgument(f"{out}: expected a new or empty folder, found a file")
    held: set[str] = set()
    if out.exists():
        unfinished = unfinished_files(out, PACKED_FILE)  # by a conversion that was killed
        held = {entry.name for entry in out.iterdir() if entry not in unfinished}
    if out.resolve() == source.resolve() or not held <= set(FILES):
        example = min(held - set(FILES), default="the checkpoint itself")
        raise InvalidArgument(
            f"{out}: expected a new or empty folder, found {example} in it; choose another"
        )
    if held and not force:
        raise InvalidArgument(
            f"{out}: expected a new or empty folder, found {min(held)} in it; "
            "--force (force=True) replaces it"
        )
