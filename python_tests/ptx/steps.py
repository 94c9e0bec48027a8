"""How a machine loads, stores, copies, shuffles and multiplies: instructions as functions of the
threads that come to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from ptx.memory import MemoryFault
from ptx.operations import TYPES
from ptx.program import Address, Instruction, Operand, UnsupportedPtx
from ptx.warp import WARP, multiply_fragments, multiply_integer_fragments, source_lanes

if TYPE_CHECKING:
    from ptx.machine import Machine

Lanes = NDArray[np.int64]
Step = Callable[[Lanes], None]


@dataclass
class Copy:
    """16 bytes for each of some threads, on their way to shared memory."""

    lanes: Lanes
    to: NDArray[np.int64]
    source: NDArray[np.int64]
    group: NDArray[np.int64]


def places(
    m: Machine, address: Operand, space: str, size: int, *, write: bool
) -> Callable[[Lanes], tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Of an address operand: the memory, and where in it."""
    if not isinstance(address, Address):
        raise UnsupportedPtx(f"{m.kernel.name}: {address} as an address")
    if space == "shared":
        read = m.read(address.base, "u32")

        def of_shared(lanes: Lanes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
            at = np.broadcast_to(read(lanes), lanes.shape) + np.array(
                [address.offset % (1 << 32)], np.uint32
            )
            return m.shared.bytes, m.shared.places(at, size, m.block[lanes])

        return of_shared
    read = m.read(address.base, "u64")
    if space == "param":

        def of_parameter(lanes: Lanes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
            at = np.broadcast_to(read(lanes), lanes.shape).astype(np.int64) + address.offset
            if np.any((at < 0) | (at + size > m.kernel.parameter_bytes) | (at % size != 0)):
                raise MemoryFault(f"parameter: {size} bytes at {int(at.max())}")
            return m.parameter, at

        return of_parameter

    def of_global(lanes: Lanes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        at = read(lanes) + np.array([address.offset % (1 << 64)], np.uint64)
        found = m.memory.places(at, size, write=write)
        early = m.is_early(lanes)
        if early.any():
            m.memory.check_early(found[early], write=write)
        return m.memory.bytes, found

    return of_global


def access(instruction: Instruction) -> tuple[str, str, int]:
    """Space, type and number of elements of a load or store."""
    *words, kind = instruction.opcode.split(".")[1:]
    # Says nothing of the value: one grid is interpreted, whose accesses are in order.
    silent = {"nc", "L1::no_allocate", "L2::256B", "relaxed", "acquire", "sys"}
    words = [word for word in words if word not in silent]
    vector = [word for word in words if word in ("v2", "v4")]
    spaces = [word for word in words if word not in vector]
    space = spaces[0] if spaces else "global"  # a generic address: nothing else is given out
    if len(spaces) > 1 or len(vector) > 1 or space not in ("global", "shared", "param"):
        raise UnsupportedPtx(instruction.text)
    return space, kind, int(vector[0][1]) if vector else 1


def load(m: Machine, instruction: Instruction) -> Step:
    space, kind, n = access(instruction)
    target, address = instruction.operands
    writes = [m.write(part) for part in (target if isinstance(target, tuple) else (target,))]
    element = np.dtype(TYPES[kind]).itemsize
    if len(writes) != n:
        raise UnsupportedPtx(instruction.text)
    find = places(m, address, space, n * element, write=False)

    def load(lanes: Lanes) -> None:
        memory, at = find(lanes)
        elements = memory.view(TYPES[kind])
        for i, write in enumerate(writes):
            write(lanes, elements[at // element + i])

    return load


def store(m: Machine, instruction: Instruction) -> Step:
    space, kind, n = access(instruction)
    address, source = instruction.operands
    parts = source if isinstance(source, tuple) else (source,)
    reads = [m.read(part, kind) for part in parts]
    if space == "param" or len(reads) != n:
        raise UnsupportedPtx(instruction.text)
    element = np.dtype(TYPES[kind]).itemsize
    find = places(m, address, space, n * element, write=True)

    def store(lanes: Lanes) -> None:
        memory, at = find(lanes)
        elements = memory.view(TYPES[kind])
        for i, read in enumerate(reads):
            elements[at // element + i] = read(lanes)

    return store


def copy(m: Machine, instruction: Instruction) -> Step:
    """cp.async and its groups; a prefetch, which must lie in memory."""
    if instruction.opcode == "cp.async.bulk.prefetch.L2.global":
        return prefetch(m, instruction)
    if instruction.opcode == "cp.async.commit_group":

        def commit(lanes: Lanes) -> None:
            m.group[lanes] += 1

        return commit
    if instruction.opcode == "cp.async.wait_group":
        n_pending = int(str(instruction.operands[0]))
        return lambda lanes: finish_copies(m, lanes, n_pending)
    to, source, size = instruction.operands
    if instruction.opcode != "cp.async.cg.shared.global" or size != "16":
        raise UnsupportedPtx(instruction.text)
    to_places = places(m, to, "shared", 16, write=True)
    from_places = places(m, source, "global", 16, write=False)

    def begin(lanes: Lanes) -> None:
        group = m.group[lanes]
        m.copies.append(Copy(lanes, to_places(lanes)[1], from_places(lanes)[1], group))

    return begin


def prefetch(m: Machine, instruction: Instruction) -> Step:
    address, size = instruction.operands
    read = m.read(size, "u32")
    first = places(m, address, "global", 16, write=False)

    def check(lanes: Lanes) -> None:
        _, at = first(lanes)
        sizes = np.broadcast_to(read(lanes), lanes.shape).astype(np.int64)
        last = (at + sizes - 16 + m.memory.BASE).view(np.uint64)
        if np.any(sizes % 16) or np.any(sizes == 0):
            raise MemoryFault(f"a prefetch of {sizes.tolist()} bytes")
        m.memory.places(last, 16, write=False)

    return check


# ---- between GPUs


def multimem(m: Machine, instruction: Instruction) -> Step:
    """A store, a sum and a count at the same place of every rank's memory."""
    kind = instruction.opcode.removeprefix("multimem.")
    target, source = instruction.operands
    address = source if kind.startswith("ld_reduce") else target
    if not isinstance(address, Address):
        raise UnsupportedPtx(instruction.text)
    read = m.read(address.base, "u64")
    offset = np.array([address.offset % (1 << 64)], np.uint64)

    def members(lanes: Lanes, size: int, *, write: bool) -> list[NDArray[np.int64]]:
        return m.memory.multicast_places(read(lanes) + offset, size, write=write)

    if kind == "st.relaxed.sys.global.v4.f32" and isinstance(source, tuple):
        values = [m.read(part, "u32") for part in source]

        def store_all(lanes: Lanes) -> None:
            for at in members(lanes, 16, write=True):
                for i, value in enumerate(values):
                    m.memory.bytes.view(np.uint32)[at // 4 + i] = value(lanes)

        return store_all
    if kind == "ld_reduce.relaxed.sys.global.add.v4.f32" and isinstance(target, tuple):
        writes = [m.write(part) for part in target]

        def sum_all(lanes: Lanes) -> None:
            places_of_all = members(lanes, 16, write=False)
            for i, write in enumerate(writes):
                sums = np.zeros(lanes.size, np.float32)
                for at in places_of_all:
                    sums = sums + m.memory.bytes.view(np.float32)[at // 4 + i]
                write(lanes, sums)

        return sum_all
    if kind == "red.release.sys.global.add.u32":
        count = m.read(source, "u32")

        def add_all(lanes: Lanes) -> None:
            for at in members(lanes, 4, write=True):
                np.add.at(m.memory.bytes.view(np.uint32), at // 4, count(lanes))

        return add_all
    raise UnsupportedPtx(instruction.text)


def atomic(m: Machine, instruction: Instruction) -> Step:
    """One lane after the other."""
    spaces = {
        "atom.relaxed.gpu.global.add.u32": "global", "atom.shared.cta.add.u32": "shared",
    }  # fmt: skip
    if instruction.opcode not in spaces:
        raise UnsupportedPtx(instruction.text)
    target, address, source = instruction.operands
    find = places(m, address, spaces[instruction.opcode], 4, write=True)
    read, write = m.read(source, "u32"), m.write(target)

    def add(lanes: Lanes) -> None:
        memory, at = find(lanes)
        words = memory.view(np.uint32)
        counts = np.broadcast_to(read(lanes), lanes.shape)
        for lane, place, count in zip(lanes, at // 4, counts, strict=True):
            before = words[place]
            words[place] = before + count
            write(np.array([lane]), np.array([before]))

    return add


def fence(m: Machine, instruction: Instruction) -> Step:
    """Of other ranks' view of this one, or of one memory's addresses: nothing to do here."""
    if instruction.opcode not in ("fence.acq_rel.sys", "fence.proxy.alias"):
        raise UnsupportedPtx(instruction.text)
    del m
    return lambda lanes: None  # noqa: ARG005


def finish_copies(m: Machine, lanes: Lanes, n_pending: int) -> None:
    """Those of groups that the lanes no longer leave on their way."""
    is_waiting = np.zeros(m.at.size, np.bool_)
    is_waiting[lanes] = True
    left = []
    for copy in m.copies:
        done = is_waiting[copy.lanes] & (copy.group < m.group[copy.lanes] - n_pending)
        words = m.shared.bytes.reshape(-1, 16)
        words[copy.to[done] // 16] = m.memory.bytes.reshape(-1, 16)[copy.source[done] // 16]
        keep = ~done
        if keep.any():
            left.append(Copy(copy.lanes[keep], copy.to[keep], copy.source[keep], copy.group[keep]))
    m.copies = left


# ---- what a warp does together; `lanes` are whole warps, in order


def shuffle(m: Machine, instruction: Instruction) -> Step:
    target, *sources = instruction.operands
    value, argument, clamp, mask = [m.read(part, "u32") for part in sources]
    kind = instruction.opcode.removeprefix("shfl.sync.").removesuffix(".b32")
    writes = [m.write(part) for part in (target if isinstance(target, tuple) else (target,))]

    def shuffle(lanes: Lanes) -> None:
        if np.any(mask(lanes) != 0xFFFFFFFF):
            raise UnsupportedPtx(f"a shuffle of some lanes: {instruction.text}")
        words = [np.broadcast_to(read(lanes), lanes.shape) for read in (value, argument, clamp)]
        values, arguments, clamps = (word.reshape(-1, WARP) for word in words)
        source, is_inside = source_lanes(kind, arguments, clamps)
        writes[0](lanes, np.take_along_axis(values, source, 1).reshape(-1))
        if len(writes) > 1:
            writes[1](lanes, is_inside.reshape(-1))

    return shuffle


# opcode -> the types of its operands, and what it computes
PRODUCTS = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": ("f32", multiply_fragments),
    **{
        f"mma.sync.aligned.m16n8k32.row.col.s32.{a}.{b}.s32": (
            "s32",
            partial(multiply_integer_fragments, codes=(TYPES[a], TYPES[b])),
        )
        for a, b in (("s8", "s8"), ("u8", "s8"), ("s8", "u8"))
    },
}


def multiply(m: Machine, instruction: Instruction) -> Step:
    if instruction.opcode not in PRODUCTS:
        raise UnsupportedPtx(instruction.text)
    kind, function = PRODUCTS[instruction.opcode]
    d, *sources = instruction.operands
    writes = [m.write(part) for part in d]
    reads = [
        [m.read(part, of) for part in parts]
        for parts, of in zip(sources, ("u32", "u32", kind), strict=True)
    ]

    def multiply(lanes: Lanes) -> None:
        fragments = [
            np.stack([np.broadcast_to(read(lanes), lanes.shape) for read in of_operand], 1).reshape(
                -1, WARP, len(of_operand)
            )
            for of_operand in reads
        ]
        result = function(*fragments)
        for i, write in enumerate(writes):
            write(lanes, np.ascontiguousarray(result[:, :, i]).reshape(-1))

    return multiply
