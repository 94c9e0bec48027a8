"""Snapshots: a session in a file, from which an engine with the same weights goes on.

The file is a preamble of fixed size (lengths and checksums), a header in JSON (whose snapshot it
is, and what Python carries), the core's state, and the bytes of the tapes. Owns that file: writing
it in one step, and refusing one that is not whole or belongs to another model. Does not own what a
session is: see `session.py` and `csrc/engine/snapshot.h`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from duplex_engine import _core
from duplex_engine.arguments import file_path, output_path
from duplex_engine.errors import CheckpointError
from duplex_engine.json_input import found, parse_json_object
from duplex_engine.whole_file import whole_file

__all__ = ["ModelIdentity", "Snapshot", "open_snapshot", "write_snapshot"]

MAGIC = b"duplexSN"
VERSION = 2  # raise it when the header, the state or the order of the blocks changes
# magic, version, bytes of header, state and blocks, CRC-32 of header and state, and of the blocks
PREAMBLE = struct.Struct("<8sIQQQII")
CHECKSUM = struct.Struct("<I")  # of the preamble, behind it
BEGIN = PREAMBLE.size + CHECKSUM.size  # of the header
SINGLE_RANK = {"tensor_parallel": 1, "reduction": "ranks"}  # of files that do not say


class ModelIdentity:
    """What the bits of a session depend on, beside its stream: two engines that agree in it can
    take over each other's sessions."""

    def __init__(
        self,
        core: _core.Engine,
        sizes: dict[str, Any],
        options: dict[str, str | int],
        hashes: list[str],
    ) -> None:
        """options: of `Engine.load`, as they were resolved; hashes: of the workers' weights."""
        self._core = core
        self._sizes = sizes
        self._options = options | {"tensor_parallel": 1 + len(hashes)}
        self._hashes = hashes

    @cached_property
    def fields(self) -> dict[str, str | int]:
        """By name. Reads all weights when it is first asked for."""
        config = json.dumps(self._sizes, sort_keys=True).encode()
        return {
            "config": hashlib.sha256(config).hexdigest()[:16],
            **self._options,
            "page_bytes": self._core.stats()["page_bytes"],
            "instruction set": self._core.description().partition(",")[0],
            "packed weights": "+".join([f"{_core.weights_hash(self._core):016x}", *self._hashes]),
        }

    def check(self, other: dict[str, Any], what: str) -> None:
        """Raises CheckpointError unless `other` are the fields of the same model."""
        other = SINGLE_RANK | other
        for name, expected in self.fields.items():
            if other.get(name) != expected:
                raise CheckpointError(
                    f"{what}: {name}: expected {found(expected)} as this engine has, "
                    f"found {found(other.get(name))}; load the engine that it was made with: "
                    "the same checkpoint, options and kind of machine"
                )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An open snapshot.

    Attributes:
        model: `ModelIdentity.fields` of its engine.
        carried: what Python carries for the session.
        state: the core's.
        read: fills a buffer with the next bytes of the blocks; raises CheckpointError at the last
            of them if they are not those that were written.
        check_at_end: raises CheckpointError unless all blocks were read.
    """

    model: dict[str, Any]
    carried: dict[str, Any]
    state: bytes
    read: Callable[[memoryview], None]
    check_at_end: Callable[[], None]


def write_snapshot(
    path: str | Path, session: _core.Session, model: ModelIdentity, carried: dict[str, Any]
) -> None:
    """Writes a session. Whoever opens `path` sees the whole file, the one before it, or none.

    Raises:
        InvalidArgument: `path` is no path of a file.
        OSError: the folder cannot be written, or the disk is full.
    """
    path = output_path(path, "snapshot: path")
    header = json.dumps({"model": model.fields, "carried": carried}).encode()
    with whole_file(path) as unfinished, _created(unfinished, path) as file:
        n_state = n_blocks = n_written = 0
        state_crc = blocks_crc = 0

        def begin(state: bytes, block_bytes: int) -> None:
            nonlocal n_state, n_blocks, state_crc
            n_state, n_blocks = len(state), block_bytes
            state_crc = zlib.crc32(state, zlib.crc32(header))
            file.write(bytes(BEGIN) + header + state)

        def write(piece: memoryview) -> None:
            nonlocal blocks_crc, n_written
            blocks_crc = zlib.crc32(piece, blocks_crc)
            n_written += file.write(piece)

        _core.write_snapshot(session, begin, write)
        preamble = PREAMBLE.pack(
            MAGIC, VERSION, len(header), n_state, n_blocks, state_crc, blocks_crc
        )
        file.seek(0)
        file.write(preamble + CHECKSUM.pack(zlib.crc32(preamble)))
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


@contextmanager
def open_snapshot(path: str | Path) -> Iterator[Snapshot]:
    """Reads and checks all but the blocks.

    Raises:
        InvalidArgument: `path` is no path.
        CheckpointError: not a snapshot, of another version, cut short, too long, or damaged.
    """
    path = file_path(path, "restore: path")
    try:
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path}: expected a snapshot, found: {error}") from error
    with file:
        try:
            yield _read_head(file, path)
        except OSError as error:
            raise CheckpointError(f"{path}: expected a snapshot, found: {error}") from error


def _preamble(file: BinaryIO, path: Path) -> tuple[int, int, int, int, int]:
    """The lengths of the three parts, and two checksums."""
    begin = file.read(BEGIN)
    if len(begin) < BEGIN or not begin.startswith(MAGIC):
        raise CheckpointError(f"{path}: expected a snapshot of a session, found another file")
    (crc32,) = CHECKSUM.unpack(begin[PREAMBLE.size :])
    if crc32 != zlib.crc32(begin[: PREAMBLE.size]):
        raise CheckpointError(f"{path}: expected a whole snapshot, found a damaged preamble")
    _, version, n_header, n_state, n_blocks, state_crc, blocks_crc = PREAMBLE.unpack(
        begin[: PREAMBLE.size]
    )
    if version != VERSION:
        raise CheckpointError(
            f"{path}: expected a snapshot of version {VERSION}, found version {version}; "
            "restore it with the package that wrote it"
        )
    n_expected = BEGIN + n_header + n_state + n_blocks
    n_found = os.fstat(file.fileno()).st_size
    if n_found != n_expected:
        raise CheckpointError(
            f"{path}: expected {n_expected} bytes, found {n_found}; "
            f"the file is {'cut short' if n_found < n_expected else 'longer than it was written'}"
        )
    return n_header, n_state, n_blocks, state_crc, blocks_crc


def _read_head(file: BinaryIO, path: Path) -> Snapshot:
    n_header, n_state, n_blocks, state_crc, blocks_crc = _preamble(file, path)
    header, state = file.read(n_header), file.read(n_state)
    _check_crc(path, state_crc, zlib.crc32(state, zlib.crc32(header)))
    values = parse_json_object(header, f"{path}: header")
    try:
        model, carried = dict(values["model"]), dict(values["carried"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected a snapshot's header, found: {error}") from error
    n_done = crc32 = 0

    def read(piece: memoryview) -> None:
        nonlocal n_done, crc32
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise CheckpointError(f"{path}: expected {n_blocks} bytes of blocks, found fewer")
        n_done += len(piece)
        crc32 = zlib.crc32(piece, crc32)
        if n_done >= n_blocks:
            check_at_end()

    def check_at_end() -> None:
        if n_done != n_blocks:
            raise CheckpointError(
                f"{path}: expected {n_blocks} bytes of blocks, found a session of {n_done}"
            )
        _check_crc(path, blocks_crc, crc32)

    return Snapshot(model, carried, state, read, check_at_end)


def _check_crc(path: Path, expected: int, crc32: int) -> None:
    if crc32 != expected:
        raise CheckpointError(
            f"{path}: expected the checksum {expected:08x}, found {crc32:08x}; the file is damaged"
        )


@contextmanager
def _created(unfinished: Path, path: Path) -> Iterator[BinaryIO]:
    """A new file for its owner alone, as it holds a conversation; or with the mode of the file
    that it is going to replace."""
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if path.exists():
            os.fchmod(descriptor, path.stat().st_mode & 0o777)
        yield file


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
