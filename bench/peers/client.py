"""Starts the processes of the engines and asks them; see worker.py."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.native import ROOT
from bench.peers.table import Entry
from bench.peers.worker import Job, Task

LOAD_TIMEOUT_S = 600.0
MEASURE_TIMEOUT_S = 300.0


class PeerError(RuntimeError):
    """An engine could not be started, loaded or measured; the message says why."""


class Worker:
    """One engine's process; a context manager."""

    def __init__(self, entry: Entry, bits: str, python: Path, log: Path, threads: int) -> None:
        self.name, self.entry, self.bits = f"{entry.name} {bits}", entry, bits
        self.description = ""
        if not python.exists():
            raise PeerError(
                f"expected a Python at {python}, found none; run `make bench-peers`, or say "
                "--peers-python"
            )
        command = [str(python), "-m", "bench.peers.worker", entry.module, entry.option]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)},
            )
        self._log = log

    def load(self, job: Job) -> None:
        """Loads the model."""
        fields = {name: getattr(job, name) for name in job.__slots__}
        answer = self._ask({"do": "load", "job": fields}, LOAD_TIMEOUT_S)
        self.description = answer["description"]

    def measure(self, task: Task, context: int, repeats: int) -> list[tuple[float, int]]:
        """(milliseconds, preemptions) of each repeat."""
        request = {"do": "measure", "context": context, "task": task.name, "rows": task.rows}
        request |= {"tokens": task.tokens, "repeats": repeats}
        answer = self._ask(request, MEASURE_TIMEOUT_S)
        return list(zip(answer["ms"], answer["preempted"], strict=True))

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"{self.name} ended: {self._last_words()}") from None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                self.close()
                raise PeerError(f"{self.name}: no answer within {timeout_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self.name} ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.poll()}"

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
