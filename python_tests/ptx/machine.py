"""Runs one kernel: all threads of all thread blocks side by side, as rows of NumPy arrays.

Threads stand at different places of the code. Of those that can go on, the ones furthest behind do,
together, until the next label or jump; so threads that parted meet again where their paths do. A
shuffle or a matrix product waits for all lanes of its warp, a barrier for all threads of its block.
Copies to shared memory arrive as late as they may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from ptx.memory import GlobalMemory, SharedMemory
from ptx.operations import TYPES, Array, operation
from ptx.program import Instruction, Kernel, Operand, UnsupportedPtx
from ptx.steps import (
    Copy,
    Lanes,
    Step,
    atomic,
    copy,
    fence,
    load,
    multimem,
    multiply,
    shuffle,
    store,
)
from ptx.warp import WARP

MAX_STEPS = 500_000  # pieces of code that some threads went through: beyond, a loop without end


class Stuck(Exception):
    """Threads that wait for others in vain."""


class Wait(IntEnum):
    """What a thread waits for."""

    NOTHING = 0
    BARRIER = 1
    WARP = 2
    RETURNED = 3


class Order(IntEnum):
    """Which warps of a block go first, from one wait to the next."""

    TOGETHER = 0
    FIRST = 1
    LAST = -1


@dataclass(frozen=True)
class Grid:
    """The shape of a launch."""

    blocks: tuple[int, int, int]
    n_threads: int
    shared_bytes: int


def literal(text: str, kind: str) -> Array:
    """A number of the text, as an array of one element."""
    if text.startswith("0f"):
        return np.array([int(text[2:], 16)], np.uint32).view(TYPES[kind])
    if text.startswith("0d"):
        return np.array([int(text[2:], 16)], np.uint64).view(TYPES[kind])
    if kind == "pred":
        return np.array([int(text) != 0])
    bits = 8 * np.dtype(TYPES[kind]).itemsize
    unsigned = np.array([int(text, 0) % (1 << bits)], np.uint64)
    return unsigned.astype(TYPES[f"u{bits}"]).view(TYPES[kind])


class Machine:
    """One launch of a kernel."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Grid,
        parameter: bytes,
        memory: GlobalMemory,
        order: Order = Order.TOGETHER,
    ) -> None:
        if len(parameter) != kernel.parameter_bytes:
            raise UnsupportedPtx(
                f"{kernel.name}: expected {kernel.parameter_bytes} bytes of arguments, "
                f"found {len(parameter)}"
            )
        n_blocks = int(np.prod(grid.blocks))
        n = n_blocks * grid.n_threads
        self.kernel, self.memory = kernel, memory
        self.shared = SharedMemory(n_blocks, grid.shared_bytes)
        padded = parameter + bytes(-len(parameter) % 16)
        self.parameter = np.frombuffer(padded, np.uint8)
        self._n_threads = grid.n_threads
        self._thread = np.tile(np.arange(grid.n_threads, dtype=np.int64), n_blocks)
        self.block = np.repeat(np.arange(n_blocks, dtype=np.int64), grid.n_threads)
        self._warp = self.block * (-(-grid.n_threads // WARP)) + self._thread // WARP
        self._rank = int(order) * (self._thread // WARP)
        x, y, _ = grid.blocks
        self._special = {
            "%tid.x": self._thread,
            "%ntid.x": np.full(n, grid.n_threads),
            "%ctaid.x": self.block % x,
            "%ctaid.y": self.block // x % y,
            "%ctaid.z": self.block // (x * y),
            "%globaltimer": np.ones(n, np.int64),  # it stands still: a wait in vain has no end
        }
        self._registers: dict[str, Array] = {
            name: np.full(n, -1).astype(TYPES["pred" if width == 1 else f"u{width}"])
            for name, width in kernel.widths.items()
        }
        self.at = np.zeros(n, np.int64)
        self._wait = np.zeros(n, np.int64)
        # A kernel that lets the next grid begin has begun so itself: every thread must wait.
        begins = "griddepcontrol.launch_dependents"
        self._has_waited = np.full(n, all(i.opcode != begins for i in kernel.code))
        self.copies: list[Copy] = []
        self.loops: list[tuple[int, bool]] = []  # what set_loop() said, in order
        self.group = np.zeros(n, np.int64)
        self._steps = [self._decode(instruction) for instruction in kernel.code]
        self._meets = [i.opcode.startswith(("shfl.", "mma.")) for i in kernel.code]
        self._ends = self._block_ends()

    # ---- the order of things

    def _block_ends(self) -> list[int]:
        """For each instruction, the one behind the straight piece of code that it lies in."""
        begins = set(self.kernel.labels.values())
        for i, instruction in enumerate(self.kernel.code):
            if instruction.opcode.split(".")[0] in ("bra", "ret", "bar", "shfl", "mma"):
                begins |= {i, i + 1}
        ends, end = [], len(self.kernel.code)
        for i in reversed(range(len(self.kernel.code))):
            ends.append(end)
            if i in begins:
                end = i
        return ends[::-1]

    def run(self) -> None:
        """To the end of every thread."""
        n_steps = 0
        with np.errstate(all="ignore"):
            while True:
                ready = np.flatnonzero(self._wait == Wait.NOTHING)
                if ready.size == 0:
                    break
                rank = self._rank[ready]
                ready = ready[rank == rank.min()]
                begin = int(self.at[ready].min())
                lanes = ready[self.at[ready] == begin]
                if self._meets[begin]:
                    lanes = self._whole_warps(lanes, begin)
                    if lanes.size == 0:
                        continue
                self._run_block(lanes, begin, self._ends[begin])
                n_steps += 1
                if n_steps > MAX_STEPS:
                    raise Stuck(f"{self.kernel.name}: a loop without end")
        if np.any(self._wait != Wait.RETURNED):
            waiting = np.flatnonzero(self._wait != Wait.RETURNED)
            where = {
                self.kernel.code[i - (self._wait[lane] == Wait.BARRIER)].text
                for lane in waiting
                for i in [int(self.at[lane])]
            }
            raise Stuck(f"{self.kernel.name}: {waiting.size} threads wait at {sorted(where)}")
        if not self._has_waited.all():
            n_wrong = int((~self._has_waited).sum())
            raise Stuck(f"{self.kernel.name}: {n_wrong} threads end without griddepcontrol.wait")

    def _run_block(self, lanes: Lanes, begin: int, end: int) -> None:
        self.at[lanes] = end
        for i in range(begin, end):
            try:
                self._steps[i](lanes)
            except Exception as error:
                error.add_note(f"{self.kernel.name}, instruction {i}: {self.kernel.code[i].text}")
                raise

    def _whole_warps(self, lanes: Lanes, begin: int) -> Lanes:
        """Those of warps that have all come here; the others wait."""
        self._wait[lanes] = Wait.WARP
        here = np.flatnonzero((self._wait == Wait.WARP) & (self.at == begin))
        _, inverse, count = np.unique(self._warp[here], return_inverse=True, return_counts=True)
        whole = here[count[inverse] == WARP]
        self._wait[whole] = Wait.NOTHING
        return whole

    def _release_barriers(self) -> None:
        """note: threads that have returned are not waited for, as on the machine."""
        waits = self._wait.reshape(-1, self._n_threads)
        at_barrier = waits == Wait.BARRIER
        complete = np.all(at_barrier | (waits == Wait.RETURNED), axis=1)
        waits[complete[:, None] & at_barrier] = Wait.NOTHING

    def is_early(self, lanes: Lanes) -> NDArray[np.bool_]:
        """Of each of some threads, whether the grid before may still be at work."""
        return ~self._has_waited[lanes]

    # ---- registers

    def read(self, operand: Operand, kind: str) -> Callable[[Lanes], Array]:
        """How to get the value of a source operand for some lanes."""
        if not isinstance(operand, str):
            raise UnsupportedPtx(f"{self.kernel.name}: {operand} as a number")
        to = TYPES[kind]
        if operand in self._registers:
            register = self._registers[operand]
            if kind == "pred" or np.dtype(to).itemsize == register.dtype.itemsize:
                return lambda lanes: register[lanes].view(to)
            if np.dtype(to).itemsize > register.dtype.itemsize:
                raise UnsupportedPtx(f"{self.kernel.name}: {operand} read as {kind}")
            narrow = TYPES[f"u{8 * np.dtype(to).itemsize}"]
            return lambda lanes: register[lanes].astype(narrow).view(to)
        if operand in self._special:
            special = self._special[operand]
            return lambda lanes: special[lanes].astype(to)
        # The parameter struct and the shared memory are each the first thing of their space.
        is_name = operand in self.kernel.shared or operand == self.kernel.parameter
        value = literal("0" if is_name else operand, kind)
        return lambda lanes: value  # noqa: ARG005

    def write(self, operand: Operand) -> Callable[[Lanes, Array], None]:
        """How to set a register; narrower values are extended by their sign, if they have one."""
        if not isinstance(operand, str) or operand not in self._registers:
            raise UnsupportedPtx(f"{self.kernel.name}: a result in {operand}")
        register = self._registers[operand]

        def write(lanes: Lanes, value: Array) -> None:
            if value.dtype.itemsize < register.dtype.itemsize:
                wide = value.astype(f"{value.dtype.kind}{register.dtype.itemsize}")
                register[lanes] = wide.view(register.dtype)
            elif value.dtype.itemsize == register.dtype.itemsize:
                register[lanes] = value.view(register.dtype)
            else:
                raise UnsupportedPtx(f"{value.dtype} in {operand}")

        return write

    # ---- instructions

    def _decode(self, instruction: Instruction) -> Step:
        """The instruction as a function of the lanes that come to it."""
        family = instruction.opcode.split(".")[0]
        own = {
            "ret": self._return, "bar": self._barrier, "cvta": self._convert_address,
            "trap": self._trap, "griddepcontrol": self._depend, "call": self._call,
        }  # fmt: skip
        shared = {
            "ld": load, "st": store, "cp": copy, "shfl": shuffle, "mma": multiply,
            "multimem": multimem, "atom": atomic, "fence": fence,
        }  # fmt: skip
        if family == "bra":
            return self._branch(instruction)
        if family == "mov" and any(isinstance(part, tuple) for part in instruction.operands):
            step = self._unpack(instruction)
        elif family in shared:
            step = shared[family](self, instruction)
        else:
            step = own.get(family, self._compute)(instruction)
        if instruction.guard is None:
            return step
        name, is_negated = instruction.guard
        guard = self._registers[name]

        def guarded(lanes: Lanes) -> None:
            taken = lanes[guard[lanes] != is_negated]
            if taken.size > 0:
                step(taken)

        return guarded

    def _compute(self, instruction: Instruction) -> Step:
        op = operation(instruction.opcode)
        write = self.write(instruction.operands[0])
        if len(instruction.operands) != 1 + len(op.sources):
            raise UnsupportedPtx(instruction.text)
        reads = [
            self.read(operand, kind)
            for operand, kind in zip(instruction.operands[1:], op.sources, strict=True)
        ]
        return lambda lanes: write(lanes, op.function(*[read(lanes) for read in reads]))

    def _unpack(self, instruction: Instruction) -> Step:
        """mov.b32 {low, high}, register, and the like the other way round."""
        target, source = instruction.operands
        kind = "u" + instruction.opcode.removeprefix("mov.b")
        half = f"u{int(kind[1:]) // 2}"
        if isinstance(target, tuple) and len(target) == 2:
            writes, read = [self.write(part) for part in target], self.read(source, kind)

            def split(lanes: Lanes) -> None:
                halves = read(lanes).view(TYPES[half]).reshape(-1, 2)
                for i, write in enumerate(writes):
                    write(lanes, np.broadcast_to(halves[:, i], lanes.shape).copy())

            return split
        if isinstance(source, tuple) and len(source) == 2:
            write, reads = self.write(target), [self.read(part, half) for part in source]

            def join(lanes: Lanes) -> None:
                parts = [np.broadcast_to(read(lanes), lanes.shape) for read in reads]
                write(lanes, np.stack(parts, 1).view(TYPES[kind]).reshape(-1))

            return join
        raise UnsupportedPtx(instruction.text)

    def _branch(self, instruction: Instruction) -> Step:
        target = self.kernel.labels[str(instruction.operands[0])]

        def jump(lanes: Lanes) -> None:
            self.at[lanes] = target

        if instruction.guard is None:
            return jump
        name, is_negated = instruction.guard
        guard = self._registers[name]
        return lambda lanes: jump(lanes[guard[lanes] != is_negated])

    def _return(self, _: Instruction) -> Step:
        def end(lanes: Lanes) -> None:
            self._wait[lanes] = Wait.RETURNED
            self._release_barriers()

        return end

    def _trap(self, _: Instruction) -> Step:
        def stop(_: Lanes) -> None:
            raise Stuck(f"{self.kernel.name}: it has stopped itself")

        return stop

    def _call(self, instruction: Instruction) -> Step:
        """Only of the function that says whether a graph's loop goes round again."""
        name, arguments = instruction.operands
        if name != "cudaGraphSetConditional" or not isinstance(arguments, tuple):
            raise UnsupportedPtx(instruction.text)
        loop, goes_on = self.read(arguments[0], "u64"), self.read(arguments[1], "u32")

        def call(lanes: Lanes) -> None:
            self.loops += zip(map(int, loop(lanes)), map(bool, goes_on(lanes)), strict=True)

        return call

    def _depend(self, instruction: Instruction) -> Step:
        """The grid before has in truth ended; what may not be known of it yet is_early() says."""
        if instruction.opcode == "griddepcontrol.launch_dependents":
            return lambda lanes: None  # noqa: ARG005
        if instruction.opcode != "griddepcontrol.wait":
            raise UnsupportedPtx(instruction.text)

        def wait(lanes: Lanes) -> None:
            self._has_waited[lanes] = True

        return wait

    def _barrier(self, instruction: Instruction) -> Step:
        if instruction.opcode != "bar.sync" or instruction.operands != ("0",):
            raise UnsupportedPtx(instruction.text)

        def arrive(lanes: Lanes) -> None:
            self._wait[lanes] = Wait.BARRIER
            self._release_barriers()

        return arrive

    def _convert_address(self, instruction: Instruction) -> Step:
        """A generic address of global memory is the address itself."""
        if instruction.opcode != "cvta.to.global.u64":
            raise UnsupportedPtx(instruction.text)
        return self._compute(Instruction("mov.u64", instruction.operands, None, instruction.text))
