"""The native part of the benchmarks: limits of this machine, and the floor program.

`library()` builds bench/native/ with CMake into build/bench on first use, and again whenever a
source changed. Nothing here knows the engine; `shapes.py` says what a model's pass consists of.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"

Bits: TypeAlias = Literal["bf16", "int8", "int4"]
Dot: TypeAlias = Literal["f32", "bf16", "int8"]
FORMATS: dict[Bits, int] = {"bf16": 0, "int8": 1, "int4": 2}
KERNEL_DTYPES = {"f32": 0, "bf16": 1, "int8": 2, "int4": 3}
DOTS: dict[Dot, int] = {"f32": 0, "bf16": 1, "int8": 2}


class NativeError(RuntimeError):
    """The native library could not be built, or cannot run on this machine."""


class FloorOp(NamedTuple):
    """`matrix` times `rows` rows; or, where matrix is -1, a read of `rows` bytes of the cache.

    Operations of one phase may run at the same time; phases follow one another.
    """

    matrix: int
    rows: int
    phase: int


class _FloorOp(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in FloorOp._fields]


class _KernelSizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("rows", "n_out", "n_in")),
        *((name, ctypes.c_int32) for name in ("n_heads", "n_kv_heads", "d_head", "rel_extent")),
        ("context", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("n_experts", "n_shared", "top_k", "d_expert")),
    ]


def _tool(name: str) -> str:
    """The path of cmake or ninja: of this environment, else of the system."""
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        raise NativeError(
            f"expected {name} on the PATH, found none; run `make test`, or install it"
        )
    return path


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise NativeError(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")


@functools.cache
def library() -> ctypes.CDLL:
    """The library, built if need be."""
    ninja = _tool("ninja")
    if not (BUILD / "build.ninja").exists():
        options = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_MAKE_PROGRAM": ninja}
        options |= {"DUPLEX_BENCH": "ON", "DUPLEX_MODULE": "OFF", "DUPLEX_CUDA": "OFF"}
        defined = [f"-D{name}={value}" for name, value in options.items()]
        _run([_tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), *defined])
    _run([ninja, "--quiet", "-C", str(BUILD), "duplex_bench"])
    loaded = ctypes.CDLL(str(BUILD / "libduplex_bench.so"))
    int64s, i32, i64, f64, handle = (
        ctypes.POINTER(ctypes.c_int64),
        ctypes.c_int32,
        ctypes.c_int64,
        ctypes.c_double,
        ctypes.c_void_p,
    )
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "error": (ctypes.c_char_p, []),
        "reader_create": (handle, [i64, i32]),
        "reader_run": (f64, [handle]),
        "reader_destroy": (None, [handle]),
        "dot_peak": (f64, [i32, i32]),
        "floor_create": (handle, [i32, i32, i64, int64s, int64s, i64, i64]),
        "floor_run": (f64, [handle, i64, ctypes.POINTER(_FloorOp)]),
        "floor_destroy": (None, [handle]),
        "kernel_create": (handle, [ctypes.c_char_p, i32, i32, ctypes.POINTER(_KernelSizes)]),
        "kernel_run": (f64, [handle]),
        "kernel_beside": (None, [handle, handle, i64, ctypes.POINTER(f64)]),
        "kernel_bytes": (f64, [handle]),
        "kernel_operations": (f64, [handle]),
        "kernel_destroy": (None, [handle]),
    }
    for name, (returned, taken) in signatures.items():
        function = getattr(loaded, f"duplex_bench_{name}")
        function.restype, function.argtypes = returned, taken
    return loaded


def _created(pointer: int | None) -> ctypes.c_void_p:
    if not pointer:
        raise NativeError(library().duplex_bench_error().decode())
    return ctypes.c_void_p(pointer)


class _Native:
    """Owns one object of the library; a context manager."""

    _kind: str

    def __init__(self, pointer: int | None) -> None:
        self._handle = _created(pointer)

    def close(self) -> None:
        """Frees its memory and threads."""
        getattr(library(), f"duplex_bench_{self._kind}_destroy")(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Reader(_Native):
    """Reads a buffer on 2 MiB pages from end to end."""

    _kind = "reader"

    def __init__(self, n_bytes: int, threads: int = 2) -> None:
        self.n_bytes = n_bytes
        super().__init__(library().duplex_bench_reader_create(n_bytes, threads))

    def gigabytes_per_second(self) -> float:
        """Of one pass."""
        seconds: float = library().duplex_bench_reader_run(self._handle)
        return self.n_bytes / seconds / 1e9


class Floor(_Native):
    """The floor program over the given (n_out, n_in) matrices; see bench/native/floor.cpp."""

    _kind = "floor"

    def __init__(
        self,
        matrices: Sequence[tuple[int, int]],
        bits: Bits,
        *,
        cache_bytes: int,
        max_rows: int = 32,
        threads: int = 2,
    ) -> None:
        n = len(matrices)
        n_out = (ctypes.c_int64 * n)(*(shape[0] for shape in matrices))
        n_in = (ctypes.c_int64 * n)(*(shape[1] for shape in matrices))
        create = library().duplex_bench_floor_create
        super().__init__(create(FORMATS[bits], threads, n, n_out, n_in, max_rows, cache_bytes))

    def milliseconds(self, ops: Sequence[FloorOp]) -> float:
        """Of one pass."""
        array = (_FloorOp * len(ops))(*(_FloorOp(*op) for op in ops))
        seconds: float = library().duplex_bench_floor_run(self._handle, len(ops), array)
        return 1e3 * seconds


class Kernel(_Native):
    """One operation of the CPU backend on inputs of its own; see bench/native/kernels.cpp.

    Args:
        name: linear, attention, kv_append, conv_add_norm, norm, silu_mul or moe.
        dtype: of the weights or of the tape: f32, bf16, int8 or int4.
        threads: of the backend.
        sizes: fields of `KernelSizes` in bench/native/api.h; the others are 0.
    """

    _kind = "kernel"

    def __init__(self, name: str, dtype: str, threads: int = 2, **sizes: int) -> None:
        create = library().duplex_bench_kernel_create
        fields = ctypes.byref(_KernelSizes(**sizes))
        super().__init__(create(name.encode(), KERNEL_DTYPES[dtype], threads, fields))
        self.n_bytes: float = library().duplex_bench_kernel_bytes(self._handle)
        self.operations: float = library().duplex_bench_kernel_operations(self._handle)

    def seconds(self) -> float:
        """Of one call."""
        elapsed: float = library().duplex_bench_kernel_run(self._handle)
        return elapsed

    def seconds_beside(self, other: Kernel, n: int) -> list[float]:
        """Of n calls, each the first of a pass that begins while the background lane runs `other`
        without a pause."""
        seconds = (ctypes.c_double * n)()
        library().duplex_bench_kernel_beside(self._handle, other._handle, n, seconds)
        return list(seconds)


def dot_peak(dot: Dot, threads: int = 2) -> float:
    """Giga-operations per second of dot products on registers alone."""
    with Reader(1):  # says so where the machine lacks the instructions
        peak: float = library().duplex_bench_dot_peak(DOTS[dot], threads)
    return peak / 1e9
