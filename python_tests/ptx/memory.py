"""The memory that interpreted PTX sees: whatever nobody wrote is 0xff, a NaN in every float type.

Addresses are those of one flat array. Reads outside an allocation, writes to what was given as
read-only, and addresses that are no multiple of the access are errors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UNWRITTEN = 0xFF
GUARD_BYTES = 256  # between two allocations, which begin at multiples of it


class MemoryFault(Exception):
    """An access that a GPU would fault on, or should."""


class GlobalMemory:
    """Allocations, each with a guard behind it."""

    BASE = 0x7F00_0000_0000

    def __init__(self, capacity_bytes: int = 1 << 22) -> None:
        self.bytes = np.full(capacity_bytes, UNWRITTEN, np.uint8)
        self._is_readable = np.zeros(capacity_bytes, np.bool_)
        self._is_writable = np.zeros(capacity_bytes, np.bool_)
        self._is_late = np.zeros(capacity_bytes, np.bool_)
        self._used = GUARD_BYTES
        self._multicast: list[tuple[int, int, list[int]]] = []  # begin, size, members' begins

    def multicast(self, members: list[int], size_bytes: int) -> int:
        """An address that stands for the same place after each of the members."""
        address = self.put(np.full(size_bytes, UNWRITTEN, np.uint8))
        begin = address - self.BASE
        self._is_readable[begin : begin + size_bytes] = False
        self._multicast.append((begin, size_bytes, [member - self.BASE for member in members]))
        return address

    def multicast_places(
        self, address: NDArray[np.uint64], size: int, *, write: bool
    ) -> list[NDArray[np.int64]]:
        """As places(), for each member of the object that the addresses are of."""
        at = address.view(np.int64) - self.BASE
        for begin, length, members in self._multicast:
            if np.all((at >= begin) & (at + size <= begin + length)):
                return [
                    self.places(
                        (at - begin + member + self.BASE).view(np.uint64), size, write=write
                    )
                    for member in members
                ]
        raise MemoryFault(f"no multicast address: {int(at[0]) + self.BASE:#x}")

    def put(self, array: NDArray[np.generic], *, writable: bool = False, late: bool = False) -> int:
        """A copy of the array there; returns its address. What is writable or late may be the work
        of the grid before, so a kernel that begins early must not read it too soon."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        begin, end = self._used, self._used + data.size
        self.bytes[begin:end] = data
        self._is_readable[begin:end] = True
        self._is_writable[begin:end] = writable
        self._is_late[begin:end] = writable or late
        self._used = (end + 2 * GUARD_BYTES - 1) // GUARD_BYTES * GUARD_BYTES
        return self.BASE + begin

    def get(self, address: int, like: NDArray[np.generic]) -> NDArray[np.generic]:
        """What lies there now, in the shape and type of `like`."""
        begin = address - self.BASE
        return self.bytes[begin : begin + like.nbytes].copy().view(like.dtype).reshape(like.shape)

    def check_early(self, at: NDArray[np.int64], *, write: bool) -> None:
        """Of accesses while the grid before may be at work: no write, and no read of its work."""
        if write or self._is_late[at].any():
            kind = "write" if write else "read"
            raise MemoryFault(f"a {kind} at {int(at[0]) + self.BASE:#x} before griddepcontrol.wait")

    def places(self, address: NDArray[np.uint64], size: int, *, write: bool) -> NDArray[np.int64]:
        """Where in `bytes` the accesses of `size` bytes begin."""
        at = address.view(np.int64) - self.BASE
        if np.any(at % size):
            raise MemoryFault(f"an access of {size} bytes at {int(address[at % size != 0][0]):#x}")
        allowed = self._is_writable if write else self._is_readable
        inside = (at >= 0) & (at + size <= self.bytes.size)
        inside[inside] = allowed[at[inside]] & allowed[at[inside] + size - 1]
        if not inside.all():
            kind = "write to" if write else "read of"
            raise MemoryFault(f"{kind} {size} bytes at {int(address[~inside][0]):#x}")
        return at


class SharedMemory:
    """One piece for each thread block."""

    def __init__(self, n_blocks: int, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._stride = (size_bytes + 15) // 16 * 16
        self.bytes = np.full(max(n_blocks * self._stride, 16), UNWRITTEN, np.uint8)

    def places(
        self, address: NDArray[np.uint32], size: int, block: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Where in `bytes` the accesses of `size` bytes by threads of the given blocks begin."""
        at = address.astype(np.int64)
        if np.any(at % size) or np.any(at + size > self._size_bytes):
            raise MemoryFault(f"shared memory: {size} bytes at {int(at.max())}, or not aligned")
        return at + block * self._stride
