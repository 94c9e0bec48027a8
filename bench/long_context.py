"""What a pass costs behind hundreds of thousands of rows.

    python -m bench.long_context --shape MOE --contexts 1024,65536,262144

Reading so many rows takes hours, since attention is quadratic. So a session reads some, goes into a
file, and the file is made longer: the blocks of the global layers are repeated, and the windows
follow behind them. What a restored session then computes has no meaning, but it reads and computes
as much as one that has read it all; time does not depend on values. Compare figures of one run.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.bench_micro_turn import SPARE_ROWS, ids
from bench.kv import TASKS, milliseconds
from bench.native import Bits
from bench.shapes import DEFAULT_CACHE, SHAPES, ShapeName
from duplex_engine import Engine, Session
from duplex_engine.snapshot import BEGIN, CHECKSUM, MAGIC, PREAMBLE, VERSION

SEED_ROWS = 4096  # that are really read first; more than any window
# Of the core's state: whether it is endless, then max_positions, length, committed, and where the
# local and the convolution windows begin (csrc/sequence/snapshot.cpp).
POSITIONS = struct.Struct("<?5q")
BLOCK_POSITIONS = 64  # csrc/core/types.h
SHOWN = ("decode 1", "silent", "append 20", "turn 20+5")


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """A snapshot file in pieces."""

    header: bytes
    state: bytes
    blocks: bytes

    @classmethod
    def read(cls, path: Path) -> Parts:
        """Of a file that was just written."""
        data = path.read_bytes()
        _, _, n_header, n_state, n_blocks, *_ = PREAMBLE.unpack_from(data)
        begin = BEGIN + n_header
        state = data[begin : begin + n_state]
        return cls(data[BEGIN:begin], state, data[begin + n_state :][:n_blocks])

    def write(self, path: Path) -> None:
        """With the checksums that a restore asks for."""
        body = zlib.crc32(self.state, zlib.crc32(self.header))
        sizes = (len(self.header), len(self.state), len(self.blocks))
        preamble = PREAMBLE.pack(MAGIC, VERSION, *sizes, body, zlib.crc32(self.blocks))
        path.write_bytes(
            preamble + CHECKSUM.pack(zlib.crc32(preamble)) + self.header + self.state + self.blocks
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Seed:
    """A session that can be made longer: by multiples of `step`, whole pages of every tape.

    block_bytes: of one block of the global layers, which come first.
    """

    parts: Parts
    rows: int
    step: int
    block_bytes: int

    @classmethod
    def read(cls, engine: Engine, folder: Path) -> Seed:
        """From snapshots at three lengths, the last two of which have windows of one size."""
        rows = 2 * SEED_ROWS
        with engine.open_session(max_positions=rows + 2 * SEED_ROWS) as session:

            def at(length: int) -> Parts:
                session.append(text=ids(length - session.length, seed=length))
                session.snapshot(folder / "seed")
                return Parts.read(folder / "seed")

            first, second = at(SEED_ROWS), at(rows)
            begins = [POSITIONS.unpack_from(parts.state)[-2:] for parts in (first, second)]
            pages = [math.gcd(*of_tape) or 1 for of_tape in zip(*begins, strict=True)]
            step = math.lcm(BLOCK_POSITIONS, *pages)
            third = at(rows + step)
        n_bytes = len(third.blocks) - len(second.blocks)
        return cls(second, rows, step, n_bytes * BLOCK_POSITIONS // step)

    def rounded(self, context: int) -> int:
        """The next length there is."""
        if context <= self.rows:
            return context
        return self.rows + -(-(context - self.rows) // self.step) * self.step

    def lengthened(self, context: int) -> Parts:
        """The snapshot of a session that has read `context` rows."""
        is_endless, _, length, committed, local, conv = POSITIONS.unpack_from(self.parts.state)
        more = context - length
        assert length == self.rows
        assert more % self.step == 0
        shifted = (context + 2 * SPARE_ROWS, context, committed + more, local + more, conv + more)
        state = POSITIONS.pack(is_endless, *shifted) + self.parts.state[POSITIONS.size :]
        n_blocks = length // BLOCK_POSITIONS
        kept = self.parts.blocks[: n_blocks * self.block_bytes]
        n_wanted = context // BLOCK_POSITIONS * self.block_bytes
        repeated = (kept * (1 + n_wanted // len(kept)))[:n_wanted]
        return Parts(self.parts.header, state, repeated + self.parts.blocks[len(kept) :])


def open_at(engine: Engine, seed: Seed, context: int, folder: Path) -> Session:
    """A session of so many rows and SPARE_ROWS, to which it can be cut back: read where they are
    few, else restored."""
    if context <= seed.rows:
        session = engine.open_session(max_positions=context + 2 * SPARE_ROWS)
        session.append(text=ids(context))
    else:
        seed.lengthened(context).write(folder / "long")
        session = engine.restore(folder / "long")
    session.append(text=ids(SPARE_ROWS))
    return session


def main(
    shape: Annotated[ShapeName, typer.Option(help="MOE has the published mix of layers.")] = "MOE",
    bits: Annotated[Bits, typer.Option(help="Format of the weights.")] = "bf16",
    contexts: Annotated[
        str, typer.Option(help="Rows, by commas; many are rounded up to whole pages.")
    ] = ("1024,8192,65536,262144"),
    rounds: Annotated[int, typer.Option(help="How often each context has its turn.", min=1)] = 15,
    cache: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = DEFAULT_CACHE,
) -> None:
    """Opens a session for each context, with keys and values of either kind, and lets them take
    turns."""
    chosen = SHAPES[shape]
    lengths = sorted(int(part) for part in contexts.split(","))
    console = Console()
    for kv in ("auto", "int8"):
        with (
            tempfile.TemporaryDirectory() as name,
            Engine.load(
                chosen.checkpoint(cache),
                dtype="bfloat16",
                weights="auto" if bits == "bf16" else bits,
                kv_dtype=kv,
                threads=2,
                memory=sum(int(1.2 * chosen.tape_bytes(n)) + (256 << 20) for n in lengths),
                max_positions=2 * max(lengths) + 4 * SEED_ROWS,
            ) as engine,
        ):
            seed = Seed.read(engine, Path(name))
            rows = [seed.rounded(n) for n in lengths]
            sessions = {n: open_at(engine, seed, n, Path(name)) for n in rows}
            times: dict[tuple[int, str], list[float]] = {}
            for _ in track(range(rounds), f"{shape} {bits}, keys and values {kv}", console=console):
                for context, session in sessions.items():
                    for task in SHOWN:
                        times.setdefault((context, task), []).append(
                            milliseconds(session, context + SPARE_ROWS, TASKS[task])
                        )
            console.print(table(shape, bits, kv, rows, times))


def table(
    shape: str, bits: str, kv: str, lengths: list[int], times: dict[tuple[int, str], list[float]]
) -> Table:
    """Medians, and how many times those at the first context."""
    shown = Table(title=f"{shape}, weights {bits}, keys and values {kv}; ms, times the first")
    for column in ("rows", *SHOWN):
        shown.add_column(column, justify="right")
    medians = {case: float(np.median(values)) for case, values in times.items()}
    for n in lengths:
        cells = [
            f"{medians[n, t]:.2f}, {medians[n, t] / medians[lengths[0], t]:.2f}" for t in SHOWN
        ]
        shown.add_row(f"{n:,}", *cells)
    return shown


if __name__ == "__main__":
    typer.run(main)
