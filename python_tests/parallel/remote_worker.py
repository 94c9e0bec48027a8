"""`duplex-engine worker` as a process: a worker of another machine, which is this one here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["worker"]

COMMAND = [sys.executable, "-c", "from duplex_engine.cli import main; main()"]


@contextmanager
def worker(
    checkpoint: str | Path, rank: int, address: str, *options: str
) -> Iterator[subprocess.Popen[str]]:
    """One that comes to the address; it is gone in the end."""
    process = subprocess.Popen(
        [*COMMAND, "worker", str(checkpoint), "--rank", str(rank), "--address", address,
         "--threads", "1", "--join-s", "20", *options],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
