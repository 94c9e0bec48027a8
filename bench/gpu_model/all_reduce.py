"""What our all-reduce should take: its steps, one after the other, at published rates.

    python -m bench.gpu_model.all_reduce

Nothing here was measured. The steps and bytes are those of csrc/backend/cuda/kernels/all_reduce.cu
on float32 parts, with convolution, residual and norm. What a signal takes from one GPU to the other
is what the start of the fastest published all-reduce (machines.py) leaves when its own start, load
and look are taken off.
"""

from __future__ import annotations

from dataclasses import dataclass

import typer
from rich.console import Console
from rich.table import Table

from duplex_engine.evaluation.machines import MACHINES, Machine

COLUMNS, TAPS, BLOCKS = 4096, 4, 64
SIZES = {"8 KB": 8192, "16 KB": 16_384, "64 KB": 65_536, "320 KB": 327_680, "640 KB": 655_360,
         "1 MB": 1 << 20}  # fmt: skip

# Assumed, as for the other kernels (docs/GPU.md).
START_US = 1.0  # to start and end a kernel; ours begin early, which hid as much on an H200
MISS_US, HIT_US = 0.6, 0.2  # a load from memory, and from the second-level cache
BLOCK_BYTES_PER_US = 100e3  # into one multiprocessor
CHAIN_US = 4 / 1750  # a multiply-add that waits for another
NORM_US = 0.1  # besides its chains
LINK = 0.9  # of an NVLink's bytes a second: what two published exchanges of 8 GB300 reach
DIRECT_BYTES = 32 << 10  # parts of one row that one thread block adds alone


@dataclass(frozen=True, slots=True)
class Steps:
    """Microseconds of one all-reduce, by step."""

    exchanges: int
    load: float
    trips: float
    link: float
    parts: float
    sums: float
    norm: float

    @property
    def us(self) -> float:
        """All of them."""
        return self.load + self.trips + self.link + self.parts + self.sums + self.norm


def _trip_us(machine: Machine, n_ranks: int) -> float:
    return machine.all_reduce[n_ranks].start_us - (START_US + MISS_US + HIT_US)


def one_exchange(machine: Machine, n_ranks: int, n_bytes: int) -> Steps:
    """Every rank sends its parts to all and adds the parts of all."""
    n_rows, row_bytes, chain_us = _rows(n_bytes)
    is_direct = n_rows == 1 and n_ranks * row_bytes <= DIRECT_BYTES
    own_blocks = 1 if is_direct else BLOCKS
    return Steps(
        1,
        MISS_US,
        _trip_us(machine, n_ranks),
        1e6 * (n_ranks - 1) * n_bytes / (LINK * machine.nvlink_bytes_per_s),
        n_ranks * n_bytes / own_blocks / BLOCK_BYTES_PER_US,
        0.0 if is_direct else 2 * HIT_US + _looks(n_rows) * row_bytes / BLOCK_BYTES_PER_US,
        chain_us,
    )


def two_exchanges(machine: Machine, n_ranks: int, n_bytes: int) -> Steps:
    """Every rank adds its share of the columns, and sends the sums to all."""
    n_rows, row_bytes, chain_us = _rows(n_bytes)
    fit, trip_us = machine.all_reduce[n_ranks], _trip_us(machine, n_ranks)
    in_bytes = 2 * (n_ranks - 1) * n_bytes / n_ranks
    return Steps(
        2,
        MISS_US,
        trip_us + min(trip_us, fit.start_two_us - fit.start_us),
        1e6 * in_bytes / (LINK * machine.nvlink_bytes_per_s),
        -(-n_rows // BLOCKS) * row_bytes / BLOCK_BYTES_PER_US,
        HIT_US + _looks(n_rows) * row_bytes / BLOCK_BYTES_PER_US,
        chain_us,
    )


def _rows(n_bytes: int) -> tuple[int, int, float]:
    """Rows, bytes of a row, and what norms take: of a row for each that a thread block has."""
    columns = min(COLUMNS, n_bytes // 4)
    n_rows = n_bytes // (4 * columns)
    of_block = -(-n_rows // BLOCKS)
    return n_rows, 4 * columns, of_block * (columns / 16 * CHAIN_US + NORM_US)


def _looks(n_rows: int) -> int:
    """Rows whose sums a thread block reads: its own, and those that their convolutions reach."""
    return -(-n_rows // BLOCKS) * min(n_rows, TAPS)


def fastest(machine: Machine, n_ranks: int, n_bytes: int) -> Steps:
    """Of one exchange and two."""
    both = one_exchange(machine, n_ranks, n_bytes), two_exchanges(machine, n_ranks, n_bytes)
    return min(both, key=lambda steps: steps.us)


def rows() -> list[list[str]]:
    """GPUs, then microseconds for each size; a star marks two exchanges."""
    found = []
    for machine in MACHINES.values():
        for n_ranks in machine.all_reduce:
            steps = [fastest(machine, n_ranks, n_bytes) for n_bytes in SIZES.values()]
            cells = [f"{s.us:.1f}{'*' * (s.exchanges - 1)}" for s in steps]
            found.append([f"{n_ranks} x {machine.name}", *cells])
    return found


def main() -> None:
    """Prints the table, and where the time goes on 8 Blackwell GPUs."""
    table = Table("GPUs", *SIZES, title="predicted: our all-reduce, us (* two exchanges)")
    for row in rows():
        table.add_row(*row)
    parts = Table("GPUs", "size", "exchanges", "load", "trips", "link", "parts", "sums", "norm")
    for name in ("B200", "GB300"):
        for size, n_bytes in SIZES.items():
            s = fastest(MACHINES[name], 8, n_bytes)
            times = (s.load, s.trips, s.link, s.parts, s.sums, s.norm)
            parts.add_row(f"8 x {name}", size, str(s.exchanges), *(f"{us:.2f}" for us in times))
    console = Console(width=120)
    console.print(table)
    console.print(parts)


if __name__ == "__main__":
    typer.run(main)
