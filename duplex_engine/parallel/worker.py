"""A rank of a group that is not rank 0: `python -m duplex_engine.parallel.worker`, started by
`ranks.py`, or `duplex-engine worker` on another machine.

Gets one line of JSON, by stdin or by the connection to rank 0, loads its share of the weights, and
does what rank 0 asks for, through shared memory or torch.distributed, until it is told to end. Says
on stdout or by the connection how that goes, a line of JSON each: {"ready": true} before the ranks
connect, {"progress": [bytes, of]}, {"loaded": hash of the weights, "device": name and instruction
set}, {"failed": [rank, reason]} or {"error": [class, message]}. Ends at once when the process of
rank 0 is gone. Owns no sessions.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from duplex_engine import _core
from duplex_engine.cache import fingerprint
from duplex_engine.checkpoint import Checkpoint
from duplex_engine.core_config import core_config
from duplex_engine.errors import CheckpointError, InvalidArgument
from duplex_engine.loading import RankShare, load_core
from duplex_engine.packed import layout_digest
from duplex_engine.parallel.lines import line

__all__ = ["main", "serve_remote"]

PROGRESS_S = 0.05  # between two reports
Say = Callable[..., None]


def main() -> None:
    """The program that rank 0 starts."""
    # Who ends a service, or a job, says so to every process of it: rank 0 decides.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Whatever else prints does not meet what is said to rank 0.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    words = sys.stdin.buffer.readline()
    if not words:  # rank 0 has gone
        sys.exit(1)
    request = json.loads(words)
    threading.Thread(target=_end_with, args=(request["leader"],), daemon=True).start()

    def say(**answer: Any) -> None:
        answers.write(b"\n" + line(answer))  # behind what was printed before

    try:
        _serve(request, say)
    except BaseException:  # rank 0 has heard of it
        sys.exit(1)
    os._exit(0)  # rank 0 waits for it, and the end of Python with torch takes a second


def serve_remote(connection: socket.socket, request: dict[str, Any]) -> None:
    """The same on another machine, with what `joining.join` returned.

    Args:
        request: with the `path`, `cache` and `options` of this machine.

    Raises:
        DuplexError: it could not load, or a rank is gone.
    """
    is_over = threading.Event()  # it ends by itself, and rank 0 may be faster
    threading.Thread(target=_end_with_connection, args=(connection, is_over), daemon=True).start()
    options = request["torch"]
    options["store"][0] = connection.getpeername()[0]
    options["host"] = connection.getsockname()[0]

    def say(**answer: Any) -> None:
        if "failed" in answer:  # this process is about to end
            print(answer["failed"][1], file=sys.stderr)
        if "error" in answer:
            is_over.set()
        connection.sendall(line(answer))

    _serve(request, say)
    is_over.set()


def _serve(request: dict[str, Any], say: Say) -> None:
    try:
        worker = _load(request, say)
        device = worker.description.partition(",")[0]
        say(loaded=f"{worker.weights_hash():016x}", device=device)
        worker.serve()
    except BaseException as error:
        # Rank 0 knows why it failed or closed; what this rank found is news to it.
        with suppress(OSError):
            say(error=[type(error).__name__, str(error)])
        raise


def _load(request: dict[str, Any], say: Say) -> _core.RankWorker:
    share = RankShare(**request["share"] | {"rank": request["rank"]})
    reported_s = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal reported_s
        if done == total or time.monotonic() - reported_s > PROGRESS_S:
            reported_s = time.monotonic()
            say(progress=[done, total])

    torch = None if request["torch"] is None else _connect(request, say)

    def make(*args: Any, **others: Any) -> _core.RankWorker:
        if torch is not None:
            others["torch"] = torch
        else:  # a copy each time: after a damaged cache the tensors are loaded
            others |= {"fd": os.dup(request["fd"]), "socket": request["socket"]}
        return _core.RankWorker(*args, rank=share.rank, progress=progress, **others)

    folder, options = request["cache"], request["options"]
    if folder is not None and options["device"] != "cpu":
        raise InvalidArgument(
            f"cache: expected none on the device {options['device']!r}, found {folder}"
        )
    with Checkpoint.open(request["path"]) as checkpoint:
        sizes = core_config(checkpoint.config, options["mtp_layers"])
        _check_same(checkpoint, sizes, request["checkpoint"])
        return load_core(
            checkpoint,
            sizes,
            options | {"gpu": request["gpus"][share.rank]},
            make,
            folder=None if folder is None else Path(folder),
            share=share,
        )


def _connect(request: dict[str, Any], say: Say) -> _core.TorchTransport:
    """Connects with the other ranks, when all are ready for it."""
    from duplex_engine.parallel import distributed  # torch takes seconds

    options, share = request["torch"], request["share"]
    rank, n_ranks = request["rank"], share["n_ranks"]
    transport = distributed.transport(rank, n_ranks)
    say(ready=True)
    groups = distributed.process_groups(
        tuple(options["store"]), options["host"], rank, n_ranks, options["n_channels"]
    )

    def give_up(failed: int, reason: str) -> None:
        """Others hear of it by the end of this process, and rank 0 why."""
        with suppress(OSError):
            say(failed=[failed, reason])
        os._exit(1)

    transport.connect(groups, give_up)
    return transport


def _check_same(checkpoint: Checkpoint, sizes: dict[str, Any], expected: str) -> None:
    """Raises CheckpointError unless this is the checkpoint of rank 0: on another machine it may be
    another one, and in the same folder it may have been replaced."""
    if expected != fingerprint(checkpoint, layout_digest(sizes), of_machine=False):
        raise CheckpointError(
            f"{checkpoint.path}: expected the checkpoint that rank 0 has loaded, found another: "
            "config.json, the names of the files or what is in them"
        )


def _end_with_connection(connection: socket.socket, is_over: threading.Event) -> None:
    """Ends this process when rank 0 has ended or cannot be reached. It says nothing any more."""
    with suppress(OSError):
        connection.recv(1)
    if not is_over.is_set():
        print("rank 0 has ended, or cannot be reached", file=sys.stderr)
        os._exit(1)


def _end_with(leader: int) -> None:
    """Ends this process when rank 0 has ended or closed the pipe to it.

    A descriptor of that process, not a signal on its death: that one comes when the thread ends
    that started the worker.
    """
    try:
        descriptor = os.pidfd_open(leader)
    except ProcessLookupError:
        os._exit(1)
    if os.getppid() == leader:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(sys.stdin.fileno(), select.POLLHUP)
        poll.poll()
    os._exit(1)


if __name__ == "__main__":
    main()
