"""A rank of a group that is not rank 0: `python -m duplex_engine.parallel.worker`.

Reads one line of JSON from stdin, loads its share of the weights, and does what rank 0 asks for
through shared memory until it is told to end. Says on stdout how loading goes, a line of JSON each:
{"progress": [bytes, of]}, {"loaded": hash of the weights} or {"error": [class, message]}. Ends at
once when the process of rank 0 is gone. Owns no sessions. Started by `ranks.py`.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from duplex_engine import _core
from duplex_engine.checkpoint import Checkpoint
from duplex_engine.core_config import core_config
from duplex_engine.loading import RankShare, load_core

PROGRESS_S = 0.05  # between two reports


def main() -> None:
    """The program."""
    # Whatever else prints does not meet what is said to rank 0.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with, args=(request["leader"],), daemon=True).start()

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers)

    try:
        worker = _load(request, say)
        say(loaded=f"{worker.weights_hash():016x}")
        worker.serve()
    except BaseException as error:
        # Rank 0 knows why it failed or closed; what this rank found is news to it.
        with suppress(OSError):
            say(error=[type(error).__name__, str(error)])
        sys.exit(1)


def _load(request: dict[str, Any], say: Any) -> _core.RankWorker:
    share = RankShare(**request["share"] | {"rank": request["rank"]})
    reported_s = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal reported_s
        if done == total or time.monotonic() - reported_s > PROGRESS_S:
            reported_s = time.monotonic()
            say(progress=[done, total])

    def make(*args: Any, **options: Any) -> _core.RankWorker:
        # A copy each time: after a damaged cache the tensors are loaded.
        return _core.RankWorker(
            *args,
            fd=os.dup(request["fd"]),
            socket=request["socket"],
            rank=share.rank,
            gpu=request["gpus"][share.rank],
            **options,
        )

    folder = request["cache"]
    with Checkpoint.open(request["path"]) as checkpoint:
        return load_core(
            checkpoint,
            core_config(checkpoint.config, request["mtp_layers"]),
            request["options"] | {"progress": progress},
            make,
            folder=None if folder is None else Path(folder),
            share=share,
        )


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
