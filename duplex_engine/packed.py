"""Packed weights in a file: the arena of an engine, written once and read back without packing.

The file is a safetensors file of one tensor, `arena`, whose metadata says what it holds. Owns the
file: its header, its checksum, writing it in one step. Does not own what lies where in the arena:
that follows from config.json, the types and `_core.PACKING_VERSION` (`csrc/model/weights.h`).
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeAlias, cast

from safetensors import SafetensorError, safe_open

from duplex_engine import _core
from duplex_engine.errors import CheckpointError
from duplex_engine.json_input import found
from duplex_engine.whole_file import whole_file

__all__ = [
    "PACKED_FILE",
    "Dtype",
    "HasArena",
    "PackedFile",
    "Weights",
    "layout_digest",
    "write_packed",
]

Dtype: TypeAlias = Literal["float32", "bfloat16"]
Weights: TypeAlias = Literal["float32", "bfloat16", "int8", "int4", "mxfp8", "nvfp4"]

PACKED_FILE = "packed.safetensors"
FORMAT = "duplex_engine packed weights"
TENSOR = "arena"
HEADER_BYTES = 4096  # the arena begins at a page
CONFIG_ONLY = ("eos_ids", "interaction")  # what no weight depends on


class HasArena(Protocol):
    """What the core made of a checkpoint: its packed weights can be written to a file."""

    @property
    def arena_bytes(self) -> int: ...
    def write_arena(self, write: Callable[[memoryview], None]) -> None: ...


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file of packed weights, its header read and judged.

    Attributes:
        dtype: type of tables and rows.
        weights: format of the matrices: dtype, "int8" or "int4".
        layout: `layout_digest` of the config that it belongs to.
        source: fingerprint of the checkpoint that it was made of.
        crc32: of the arena.
        n_bytes: of the arena, which begins at `data_begin`.
    """

    path: Path
    dtype: Dtype
    weights: Weights
    layout: str
    source: str
    crc32: int
    n_bytes: int
    data_begin: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads the header.

        Raises:
            CheckpointError: not such a file, cut short, or made by another version.
        """
        try:
            n_file_bytes = path.stat().st_size
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                names = list(file.keys())
                n_bytes = file.get_slice(TENSOR).get_shape()[0] if names == [TENSOR] else 0
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: expected packed weights, found: {error}") from error
        if metadata.get("format") != FORMAT or not n_bytes:
            raise CheckpointError(f"{path}: expected packed weights, found another file")
        if metadata.get("packing") != str(_core.PACKING_VERSION):
            raise CheckpointError(
                f"{path}: expected weights packed by version {_core.PACKING_VERSION} of the "
                f"layout, found {found(metadata.get('packing'))}; "
                "pack the checkpoint again: duplex-engine convert"
            )
        dtype, weights = metadata.get("dtype"), metadata.get("weights")
        if dtype not in ("float32", "bfloat16") or weights not in (dtype, "int8", "int4"):
            raise CheckpointError(
                f"{path}: expected weights of a known type, found {found(dtype)}, {found(weights)}"
            )
        try:
            crc32 = int(metadata["crc32"], 16)
        except (KeyError, ValueError):
            raise CheckpointError(
                f"{path}: expected a checksum, found {found(metadata.get('crc32'))}"
            ) from None
        return cls(
            path=path,
            dtype=cast(Dtype, dtype),
            weights=cast(Weights, weights),
            layout=metadata.get("layout", ""),
            source=metadata.get("source", ""),
            crc32=crc32,
            n_bytes=n_bytes,
            data_begin=n_file_bytes - n_bytes,
        )

    @contextmanager
    def reader(self) -> Iterator[tuple[int, Callable[[memoryview], None]]]:
        """What `_core.Engine` takes as `packed`: the bytes, and what fills a buffer with the next.

        The last call raises CheckpointError if the bytes are not those that were written.

        Raises:
            CheckpointError: the file cannot be read any more: it may just be replaced.
        """
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: expected the packed weights that were there a moment ago, "
                f"found: {error}; load again when whoever replaces them is done"
            ) from error
        with file:
            file.seek(self.data_begin)
            crc32, n_done = 0, 0

            def read(piece: memoryview) -> None:
                nonlocal crc32, n_done
                n_end = n_done + len(piece)
                while n_done < n_end:
                    n = file.readinto(piece[n_done - n_end :])
                    if not n:
                        raise CheckpointError(
                            f"{self.path}: expected {self.n_bytes} bytes of weights, "
                            f"found {n_done}; the file is cut short"
                        )
                    n_done += n
                crc32 = zlib.crc32(piece, crc32)
                if n_done == self.n_bytes and crc32 != self.crc32:
                    raise CheckpointError(
                        f"{self.path}: expected the checksum {self.crc32:08x}, found {crc32:08x}; "
                        "the file is damaged"
                    )

            yield self.n_bytes, read


def layout_digest(core_config: dict[str, Any]) -> str:
    """Names all of a config that the weights depend on. core_config: `core_config.core_config`."""
    values = {key: value for key, value in core_config.items() if key not in CONFIG_ONLY}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_packed(
    path: Path,
    core: HasArena,
    *,
    dtype: Dtype,
    weights: Weights,
    layout: str,
    source: str,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the packed weights of `core`. Whoever opens `path` sees the whole file or none.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    n_bytes = core.arena_bytes
    metadata = {
        "format": FORMAT,
        "packing": str(_core.PACKING_VERSION),
        "dtype": dtype,
        "weights": weights,
        "layout": layout,
        "source": source,
    }
    with whole_file(path) as unfinished, unfinished.open("xb") as file:
        file.write(bytes(HEADER_BYTES))
        crc32 = n_written = 0

        def write(piece: memoryview) -> None:
            nonlocal crc32, n_written
            crc32 = zlib.crc32(piece, crc32)
            n_written += file.write(piece)
            if progress is not None:
                progress(n_written, n_bytes)

        core.write_arena(write)
        file.seek(0)
        file.write(_header({**metadata, "crc32": f"{crc32:08x}"}, n_bytes))


def _header(metadata: dict[str, str], n_bytes: int) -> bytes:
    """The beginning of a safetensors file, padded with spaces as the format allows."""
    tensor = {"dtype": "U8", "shape": [n_bytes], "data_offsets": [0, n_bytes]}
    text = json.dumps({"__metadata__": metadata, TENSOR: tensor}).encode()
    length = HEADER_BYTES - 8
    return length.to_bytes(8, "little") + text.ljust(length)
