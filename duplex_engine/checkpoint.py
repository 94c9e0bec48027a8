"""A checkpoint folder, opened: its validated config and every tensor's bytes, mapped, not copied.

Owns the files (`config.json`, `model.safetensors` or an index and its shards, perhaps
`mtp.safetensors`, or packed weights in their place) and the proof that each tensor lies where its
header says. Does not own what the tensors are called or how they are packed: the C++ core checks
names and shapes against the config. Read `config.py` first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from duplex_engine.arguments import file_path
from duplex_engine.config import ModelConfig
from duplex_engine.errors import CheckpointError, InvalidArgument
from duplex_engine.json_input import found, parse_json_object, read_json_object
from duplex_engine.packed import PACKED_FILE, PackedFile

__all__ = ["SHIPPED", "Checkpoint", "TensorEntry", "WeightFile"]

# Checkpoints that come with the package, by the name that stands for their folder.
SHIPPED = {"reference": Path(__file__).parent / "models" / "reference"}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MTP_FILE = "mtp.safetensors"  # beside the others; an index may name it or not
LENGTH_BYTES = 8  # a file begins with the byte length of its JSON header, little-endian
MAX_HEADER_BYTES = 32 * 1024 * 1024  # about 200,000 tensors in one file
SHARD_NAME = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")  # a plain name: no way out of the folder
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True, eq=False, slots=True)
class TensorEntry:
    """One tensor as it lies in the file: row-major, little-endian.

    Attributes:
        name: the name in the file.
        dtype: element type in safetensors' spelling: "F32", "BF16", "F16", ...
        shape: elements along each axis; () is a scalar.
        data: (n_bytes,) uint8, read-only view of the mapped file. It is aligned to one byte only:
            a file may put any tensor at any offset.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False, slots=True)
class WeightFile:
    """One safetensors file, mapped.

    Attributes:
        mtime_ns: its modification time, noted before it was mapped.
        data: (n_bytes,) uint8, the whole file.
        data_begin: where its tensors begin.
        tensors: in the order of their bytes.
    """

    path: Path
    mtime_ns: int
    data: npt.NDArray[np.uint8]
    data_begin: int
    tensors: tuple[TensorEntry, ...]


class Checkpoint:
    """An opened checkpoint: use it as a context manager, or call `close`.

    The files stay mapped while any `TensorEntry.data` lives, so they must not be shortened or
    rewritten in place meanwhile. Replacing a file by renaming another onto it is harmless.

    Attributes:
        path: the folder.
        config: the validated `config.json`.
        packed: the packed weights of a folder that `duplex-engine convert` wrote, else None.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        files: Iterable[WeightFile],
        packed: PackedFile | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.packed = packed
        self._files: tuple[WeightFile, ...] | None = tuple(files)

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Opens the checkpoint in `directory`; reads the headers, maps the tensors.

        directory: a folder, or a name of `SHIPPED`; the folder "./reference" is no name.

        Raises:
            CheckpointError: the folder or one of its files is missing, damaged or contradictory.
            InvalidArgument: `directory` is no path.
        """
        if isinstance(directory, str) and directory in SHIPPED:
            path = SHIPPED[directory]
        else:
            path = file_path(directory, "checkpoint folder")
        try:
            if not path.exists():
                raise CheckpointError(f"{path}: expected a checkpoint folder, found nothing there")
            if not path.is_dir():
                raise CheckpointError(
                    f"{path}: expected a checkpoint folder, found a file; "
                    "pass the folder that holds config.json"
                )
            config_path = path / "config.json"
            if not config_path.is_file():
                raise CheckpointError(f"{path}: expected a config.json in the folder, found none")
            config = ModelConfig.read(config_path)
            if (path / PACKED_FILE).is_file():
                return cls(path, config, (), _read_packed(path))
            return cls(path, config, _read_weights(path))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error

    @property
    def tokenizer_path(self) -> Path | None:
        """The folder's `tokenizer.json`, or None if it has none."""
        path = self.path / "tokenizer.json"
        return path if path.is_file() else None

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """The files of weights by name; none where the weights are packed.

        Raises:
            InvalidArgument: the checkpoint is closed.
        """
        if self._files is None:
            raise InvalidArgument(f"{self.path}: expected an open checkpoint, found a closed one")
        return self._files

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """All tensors, file after file, each file in the order of its bytes.

        Raises:
            InvalidArgument: the checkpoint is closed.
        """
        return tuple(entry for file in self.files for entry in file.tensors)

    def is_unchanged(self) -> bool:
        """Whether the files have the length and modification time that they were opened with."""
        for file in self.files:
            try:
                now = file.path.stat()
            except OSError:
                return False
            if (now.st_size, now.st_mtime_ns) != (file.data.size, file.mtime_ns):
                return False
        return True

    def close(self) -> None:
        """Drops the tensors; the mappings end with the last `data` somebody still holds."""
        self._files = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_packed(folder: Path) -> PackedFile:
    """Reads the header of the packed weights, which must be the folder's only ones."""
    for other in (SINGLE_FILE, INDEX_FILE):
        if (folder / other).exists():
            raise CheckpointError(
                f"{folder}: expected {PACKED_FILE} or {other}, found both; "
                "remove the one that is stale"
            )
    return PackedFile.open(folder / PACKED_FILE)


def _read_weights(folder: Path) -> list[WeightFile]:
    """Finds and reads the folder's weight file or files."""
    single, index, mtp = folder / SINGLE_FILE, folder / INDEX_FILE, folder / MTP_FILE
    match single.is_file(), index.is_file():
        case True, False:
            return [_read_file(file) for file in (single, mtp) if file.is_file()]
        case False, True:
            return _read_shards(index)
        case True, True:
            raise CheckpointError(
                f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found both; "
                "remove the one that is stale"
            )
    suffixes = {entry.suffix for entry in folder.iterdir()}
    if ".safetensors" in suffixes:
        remedy = f"its .safetensors files need that name, or an index called {INDEX_FILE}"
    elif suffixes & {".bin", ".pt", ".pth"}:
        remedy = "convert its PyTorch weights to safetensors"
    else:
        remedy = "the folder has no weights"
    raise CheckpointError(f"{folder}: expected {SINGLE_FILE}, found none; {remedy}")


def _read_shards(index: Path) -> list[WeightFile]:
    """Reads every shard that the index names; file and index must agree on every tensor."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: weight_map: expected an object from tensor to file name, "
            f"found {found(weight_map)}"
        )
    expected_names: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{index}: weight_map: {found(name)}: expected the name of a .safetensors file in "
                f"the same folder, found {found(shard)}"
            )
        expected_names.setdefault(shard, set()).add(name)

    mtp = index.parent / MTP_FILE
    if not mtp.is_file():
        expected_names.pop(MTP_FILE, None)
    absent = [shard for shard in sorted(expected_names) if not (index.parent / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{index}: expected the files it names in the same folder, "
            f"found no {', '.join(absent)}; the download may be incomplete"
        )
    files: list[WeightFile] = []
    if MTP_FILE not in expected_names and mtp.is_file():
        files.append(_read_file(mtp))
    for shard, names in sorted(expected_names.items()):
        path = index.parent / shard
        file = _read_file(path)
        present = {entry.name for entry in file.tensors}
        if absent_names := names - present:
            raise CheckpointError(
                f"{path}: expected the tensor {found(min(absent_names))}, which {INDEX_FILE} puts "
                f"here, found no such tensor ({len(absent_names)} like it)"
            )
        if stray_names := present - names:
            name = min(stray_names)
            place = found(weight_map[name]) if name in weight_map else "no file"
            raise CheckpointError(
                f"{path}: expected only tensors that {INDEX_FILE} puts here, found {found(name)}, "
                f"which it puts into {place}"
            )
        files.append(file)
    return files


def _read_file(path: Path) -> WeightFile:
    """Maps one safetensors file and finds its tensors."""
    status = path.stat()
    n_bytes = status.st_size
    if n_bytes < LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: expected a safetensors file, found only {n_bytes} bytes; "
            "the download may be incomplete"
        )
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    data_begin = LENGTH_BYTES + int.from_bytes(mapped[:LENGTH_BYTES].tobytes(), "little")
    if data_begin > min(mapped.size, LENGTH_BYTES + MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: expected a header inside the file of {mapped.size} bytes and of at most "
            f"{MAX_HEADER_BYTES}, found one of {data_begin - LENGTH_BYTES}"
        )
    try:
        # The format's own reader judges first: it refuses any header that is not the format, in
        # bounded memory. What is checked below is what this module relies on.
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path}: expected a safetensors file, found: {error}") from error
    header = parse_json_object(mapped[LENGTH_BYTES:data_begin].tobytes(), f"{path}: header")
    header.pop("__metadata__", None)
    tensors = _locate_tensors(str(path), header, mapped[data_begin:])
    return WeightFile(path, status.st_mtime_ns, mapped, data_begin, tuple(tensors))


def _locate_tensors(
    source: str, header: dict[str, Any], data: npt.NDArray[np.uint8]
) -> list[TensorEntry]:
    """Returns the tensors that `header` describes as views into `data`, which they must tile."""
    spans: list[tuple[int, int, TensorEntry]] = []
    for name, description in header.items():
        match description:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise CheckpointError(
                    f"{source}: {found(name)}: expected dtype, shape and data_offsets, "
                    f"found {found(description)}"
                )
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{source}: {found(name)}: expected a dtype of {', '.join(DTYPE_BYTES)}, "
                f"found {found(dtype)}"
            )
        if not all(type(extent) is int and extent >= 0 for extent in shape):
            raise CheckpointError(
                f"{source}: {found(name)}: expected a shape of non-negative integers, "
                f"found {found(shape)}"
            )
        if not 0 <= begin <= end <= data.size or end - begin != (
            math.prod(shape) * DTYPE_BYTES[dtype]
        ):
            raise CheckpointError(
                f"{source}: {found(name)}: expected data_offsets around the bytes of {dtype} "
                f"{found(shape)} inside {data.size} bytes of data, found [{begin}, {end}]"
            )
        spans.append((begin, end, TensorEntry(name, dtype, tuple(shape), data[begin:end])))

    spans.sort(key=lambda span: span[:2])
    position = 0
    for begin, end, entry in spans:
        if begin != position:
            raise CheckpointError(
                f"{source}: {found(entry.name)}: expected to begin where the tensor before it "
                f"ends, at byte {position}, found {begin}"
            )
        position = end
    if position != data.size:
        raise CheckpointError(
            f"{source}: expected {position} bytes of tensors, found {data.size} bytes of data"
        )
    return [entry for _, _, entry in spans]
