"""Packed weights kept beside the checkpoints they were made of, to load faster the next time.

Owns where such a file lies and when it may be used: a fingerprint names the checkpoint it was made
of. A file that is stale or damaged is made again; a folder that cannot be written is a warning.
Does not own the file itself: see `packed.py`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from duplex_engine.arguments import file_path, found
from duplex_engine.checkpoint import Checkpoint
from duplex_engine.errors import CheckpointError, InvalidArgument
from duplex_engine.packed import Dtype, HasArena, PackedFile, Weights, write_packed
from duplex_engine.whole_file import remove_abandoned

__all__ = ["cache_folder", "fingerprint", "load_cached"]

SAMPLES = 64  # pieces of each file that the fingerprint reads
SAMPLE_BYTES = 4096
Core = TypeVar("Core", bound=HasArena)


def cache_folder(cache: bool | str | Path) -> Path | None:
    """The folder that the option `cache` of `Engine.load` names; None: no cache.

    Raises:
        InvalidArgument: neither a boolean nor a folder; or True, and this user has no home.
    """
    if cache is False:
        return None
    if cache is True:
        try:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError as error:
            raise InvalidArgument(
                f"cache: expected a user with a home folder, found: {error}; "
                "set XDG_CACHE_HOME, or name a folder"
            ) from error
        return Path(home) / "duplex_engine"
    # note: `Path.is_file` raises where a folder above cannot be searched; that is only a warning.
    if not isinstance(cache, str | Path) or not str(cache) or os.path.isfile(cache):  # noqa: PTH113
        raise InvalidArgument(f"cache: expected True, False or a folder, found {found(cache)}")
    return file_path(cache, "cache")


def fingerprint(checkpoint: Checkpoint, layout: str, *, of_machine: bool = True) -> str:
    """Names the content of a checkpoint: what follows from its sizes, and of each file of weights
    name, length, modification time (not where another machine is asked), header and 64 evenly
    spread samples.

    An edit that keeps length and modification time and misses every sample is not seen.
    """
    digest = hashlib.sha256(layout.encode())
    for file in checkpoint.files:
        time = file.mtime_ns if of_machine else 0
        digest.update(json.dumps([file.path.name, file.data.size, time]).encode())
        digest.update(file.data[: file.data_begin].tobytes())
        last = max(file.data.size - SAMPLE_BYTES, 0)
        for i in range(SAMPLES):
            begin = last * i // (SAMPLES - 1)
            digest.update(file.data[begin : begin + SAMPLE_BYTES].tobytes())
    return digest.hexdigest()


def load_cached(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    dtype: Dtype,
    weights: Weights,
    layout: str,
    share: str,
    from_packed: Callable[[PackedFile], Core],
    from_tensors: Callable[[], Core],
) -> Core:
    """Loads the weights from the cache, or from the checkpoint and then fills the cache. `share`
    names what part of the weights this is; "" for all."""
    source = fingerprint(checkpoint, layout)
    place = checkpoint.path.resolve()
    key = hashlib.sha256(os.fsencode(place)).hexdigest()[:12]
    path = folder / f"{place.name}-{dtype}-{weights}-{key}{share and '-' + share}.safetensors"
    remove_abandoned(folder, glob.escape(path.name))
    try:
        packed = PackedFile.open(path)
        if (packed.source, packed.dtype, packed.weights) == (source, dtype, weights):
            return from_packed(packed)
    except (CheckpointError, OSError):
        pass  # absent, stale or damaged
    core = from_tensors()
    if checkpoint.is_unchanged():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_packed(path, core, dtype=dtype, weights=weights, layout=layout, source=source)
        except OSError as error:
            warnings.warn(
                f"cache: {folder}: expected a folder that can be written, found: {error}; "
                "the checkpoint is loaded without it",
                RuntimeWarning,
                stacklevel=3,
            )
    return core
