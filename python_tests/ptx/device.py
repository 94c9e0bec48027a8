"""What a case of a kernel is written against: memory, launches and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ptx.arguments import BF16, F32, Rows, decode, encode, raw
from ptx.machine import Grid, Machine, Order
from ptx.memory import GlobalMemory
from ptx.program import Kernel

UNIT = 2.0**-24  # of a rounding to float32, as part of the value
BF16_UNIT = 2.0**-8


class Device:
    """Kernels by "file/name" and memory, for one case."""

    def __init__(self, kernels: dict[str, Kernel], order: Order) -> None:
        self._kernels, self._order = kernels, order
        self._memory = GlobalMemory()
        self._outputs: dict[int, NDArray[np.generic]] = {}
        self.launched: set[str] = set()
        self.loops: list[tuple[int, bool]] = []  # what kernels said of a loop of the graph

    def put(self, values: ArrayLike, dtype: type | None = None) -> int:
        """The address of a read-only copy."""
        return self._memory.put(np.asarray(values, dtype))

    def put_late(self, values: ArrayLike, dtype: type | None = None) -> int:
        """The same for what the launch before leaves."""
        return self._memory.put(np.asarray(values, dtype), late=True)

    def out(self, values: NDArray[np.generic]) -> int:
        """The address of a copy that kernels may write."""
        address = self._memory.put(values, writable=True)
        self._outputs[address] = values
        return address

    def get(self, address: int) -> NDArray[np.generic]:
        """What lies there now, in the form of what out() was given."""
        return self._memory.get(address, self._outputs[address])

    def multicast(self, members: list[int], size_bytes: int) -> int:
        """An address that stands for the same place after each of the given ones."""
        return self._memory.multicast(members, size_bytes)

    def rows(self, x: NDArray[np.floating], dtype: int) -> Structure:
        """Read-only rows of a type, as the launch before leaves them."""
        return Rows(self.put_late(encode(x, dtype)), x.shape[1], dtype)

    def out_rows(self, n_rows: int, stride: int, dtype: int) -> Structure:
        """Rows to be written, NaN as yet."""
        return Rows(self.out(encode(np.full((n_rows, stride), np.nan), dtype)), stride, dtype)

    def read(self, rows: Structure) -> NDArray[np.float32]:
        """Rows as numbers."""
        return decode(self.get(rows.data))

    def launch(
        self, name: str, grid: tuple[int, ...], n_threads: int, shared_bytes: int, args: Structure
    ) -> None:
        """Runs a kernel to its end."""
        blocks = (*grid, 1, 1)
        shape = Grid((blocks[0], blocks[1], blocks[2]), n_threads, shared_bytes)
        self.launched.add(name)
        machine = Machine(self._kernels[name], shape, raw(args), self._memory, self._order)
        machine.run()
        self.loops += machine.loops


def check_close(
    found: NDArray[np.floating], expected: NDArray[np.floating], bound: ArrayLike
) -> None:
    """Every element is a number, and no further off than the bound."""
    off = np.abs(found.astype(np.float64) - expected) > np.asarray(bound)
    wrong = off | ~np.isfinite(found)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.size} elements are off, the first at "
        f"{np.argwhere(wrong)[0].tolist()}: expected {expected[wrong][0]}, found {found[wrong][0]}"
    )


Case = Callable[[Device], None]


def both(name: str, run: Callable[..., None], **options: object) -> dict[str, Case]:
    """A case in float32 and in bfloat16."""
    return {
        f"{name}-float32": partial(run, dtype=F32, **options),
        f"{name}-bfloat16": partial(run, dtype=BF16, **options),
    }
