"""`duplex-engine worker`: one rank of an engine whose rank 0 is on another machine."""

from __future__ import annotations

import signal
from typing import Annotated

import typer
from rich.console import Console

from duplex_engine.cache import cache_folder
from duplex_engine.checkpoint import Checkpoint
from duplex_engine.cli.run import CheckpointArgument, ThreadsOption
from duplex_engine.parallel.joining import join
from duplex_engine.parallel.worker import serve_remote

__all__ = ["worker"]


def worker(
    checkpoint: CheckpointArgument,
    rank: Annotated[int, typer.Option(min=1, help="1, 2, ...: each worker has its own.")],
    address: Annotated[str, typer.Option(help="host:port that rank 0 was loaded with.")],
    threads: ThreadsOption = None,
    gpu: Annotated[
        int | None, typer.Option(min=0, help="Number of this rank's GPU, where ranks have one.")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Keep the packed weights of this rank in a file.")
    ] = False,
    join_s: Annotated[float, typer.Option(min=1, help="How long to try to reach rank 0.")] = 300.0,
) -> None:
    """Compute as one rank of an engine of several machines (docs/PARALLEL.md).

    All options but these come from rank 0: `Engine.load(checkpoint, tensor_parallel=3,
    address="10.0.0.1:29500")` there waits for ranks 1 and 2. The checkpoint must be the same; its
    folder may be another. Ends with the engine.

    Examples:

    `duplex-engine worker checkpoints/mine --rank 1 --address 10.0.0.1:29500`
    """
    console = Console(stderr=True, highlight=False, markup=False)
    with Checkpoint.open(checkpoint) as opened:
        path = str(opened.path.resolve())
    connection, request = join(address, rank, join_s)
    console.print(f"rank {rank}: all ranks have come to {address}; loading {path}")
    request |= {"path": path, "cache": str(cache_folder(True)) if cache else None}
    if threads is not None:
        request["options"]["n_threads"] = threads
    if gpu is not None:
        request["gpus"][rank] = gpu
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is not ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # from here on hardly any Python runs
    serve_remote(connection, request)
    console.print(f"rank {rank}: the engine was closed")
