"""What a meeting of ranks costs through torch.distributed (gloo over TCP on this machine).

    python -m bench.meetings

A round is what `duplex_tests "[!benchmark]"` measures through shared memory: every rank writes its
slab, the ranks meet, and each adds the slabs of all in order. Run both one after the other.
"""

from __future__ import annotations

import os
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from torch._C._distributed_c10d import PrefixStore, TCPStore

from duplex_engine.parallel import distributed

HOST = "127.0.0.1"
SLAB_KB = (0, 8, 64, 320, 1024)


def rounds_us(rank: int, n_ranks: int, port: int, kilobytes: int, rounds: int) -> list[float]:
    """The rounds of one rank; with 0 KB the slab is a word, which is neither written nor added."""
    store = PrefixStore(f"{n_ranks} ranks, {kilobytes} KB", TCPStore(HOST, port, is_master=False))
    transport = distributed.transport(rank, n_ranks)
    groups = distributed.process_groups(store, HOST, rank, n_ranks, 1)
    transport.connect(groups, lambda rank, reason: sys.exit(f"rank {rank}: {reason}"))
    slabs = [np.zeros(max(256 * kilobytes, 1), np.float32) for _ in range(n_ranks)]
    row, total = np.full_like(slabs[0], 1.5), np.empty_like(slabs[0])
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        if kilobytes:
            slabs[rank][:] = row
        transport.exchange(0, slabs)
        if kilobytes:
            total[:] = slabs[0]
            for slab in slabs[1:]:
                total += slab
        times.append(1e6 * (time.perf_counter() - begin))
    if kilobytes and not np.all(total == 1.5 * n_ranks):
        raise RuntimeError("a meeting has lost what a rank filled")
    return times


def worker(rank: int, n_ranks: int, port: int, rounds: int, done: Connection) -> None:
    """Ranks other than 0."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for kilobytes in SLAB_KB:
        rounds_us(rank, n_ranks, port, kilobytes, rounds)
    done.send(rank)


def main(
    rounds: Annotated[int, typer.Option(help="Of each size.")] = 1000,
    ranks: Annotated[list[int] | None, typer.Option(help="How many.")] = None,
) -> None:
    """Prints the median and the 99th of a hundred, in microseconds."""
    table = Table("ranks", *("none" if kb == 0 else f"{kb} KB" for kb in SLAB_KB))
    table.title = "one round over gloo, us: median (p99)"
    store = distributed.open_store(HOST)
    context = get_context("spawn")
    for n_ranks in ranks or [2, 4]:
        here, there = context.Pipe()
        others = [
            context.Process(target=worker, args=(rank, n_ranks, store.port, rounds, there))
            for rank in range(1, n_ranks)
        ]
        for other in others:
            other.start()
        cells = []
        for kilobytes in SLAB_KB:
            times = rounds_us(0, n_ranks, store.port, kilobytes, rounds)
            cells.append(f"{np.median(times):.0f} ({np.quantile(times, 0.99):.0f})")
        for _ in others:
            here.recv()
        for other in others:
            other.join()
        table.add_row(str(n_ranks), *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
