"""The process of one engine: JSON lines in, JSON lines out, milliseconds measured here.

    {"do": "load", "job": {...}}                       -> {"description": "..."}
    {"do": "measure", "context": 1024, "task": "append", "rows": 20, "tokens": 0, "repeats": 3}
                                                       -> {"ms": [...], "preempted": [...]}

Run by `client.py` as `python -m bench.peers.worker <module of the peer> [option]`. What the engine
prints goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

WARM_UPS = 1  # untimed runs before the timed ones: another engine has just used the caches


@dataclass(frozen=True, slots=True)
class Job:
    """What to load. The sizes are those of a Qwen3 of equal matrices."""

    shape: str
    checkpoint: str  # folder of the Inkling checkpoint
    cache: str  # folder for files that a peer makes
    bits: str  # of a weight
    kv: str  # of a key or value: bf16 or int8
    threads: int
    isa: str | None  # of ours; None takes the best
    max_context: int
    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int


@dataclass(frozen=True, slots=True)
class Task:
    """`append`: `rows` rows in one pass, logits of the last. `decode`: `tokens` passes of one row,
    each greedy. `turn`: the last token of the turn before and `rows` rows in one pass, then tokens
    until there are `tokens` new ones, the last of which is not yet fed."""

    name: str
    rows: int
    tokens: int


class Peer(ABC):
    """One loaded engine with one sequence."""

    description: str

    def __init__(self, job: Job, option: str) -> None:
        self.job, self.option = job, option

    @abstractmethod
    def reset(self, context: int) -> None:
        """Leaves exactly `context` rows in the cache."""

    @abstractmethod
    def append(self, n: int) -> None:
        """n rows in one pass; afterwards the logits of the last are there."""

    @abstractmethod
    def decode(self, n: int) -> None:
        """n times: the likeliest token, then a pass over it."""

    def prepare(self, task: Task) -> None:  # noqa: B027 (most peers need none)
        """What must precede a task, untimed."""

    def run(self, task: Task) -> None:
        """The task itself."""
        if task.name == "append":
            self.append(task.rows)
        elif task.name == "decode":
            self.decode(task.tokens)
        else:
            self.append(1 + task.rows)
            self.decode(task.tokens - 1)

    def milliseconds(self, task: Task) -> float:
        """Of the task, by the clock of this process."""
        start = time.perf_counter()
        self.run(task)
        return 1e3 * (time.perf_counter() - start)


def token_ids(n: int, seed: int = 0) -> list[int]:
    """n ids that every vocabulary has. note: no numpy, which a peer may lack."""
    return [300 + (7919 * (i + seed)) % 3500 for i in range(n)]


def preemptions() -> int:
    """How often the system has taken the processor from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def measure(peer: Peer, request: dict[str, Any]) -> dict[str, Any]:
    """Repeats of one task, each from the same context."""
    task = Task(request["task"], request["rows"], request["tokens"])
    times, preempted = [], []
    for repeat in range(WARM_UPS + request["repeats"]):
        peer.reset(request["context"])
        peer.prepare(task)
        before = preemptions()
        ms = peer.milliseconds(task)
        if repeat >= WARM_UPS:
            times.append(ms)
            preempted.append(preemptions() - before)
    return {"ms": times, "preempted": preempted}


def main() -> None:
    """Answers requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(f"bench.peers.{sys.argv[1]}")
    peer: Peer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                peer = module.load(Job(**request["job"]), sys.argv[2])
                answer = {"description": peer.description}
            elif peer is None:
                answer = {"error": "expected a load first, found none"}
            else:
                answer = measure(peer, request)
        except Exception as error:  # the driver shows it and goes on without this engine
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
