"""The floor program (bench/native/floor.cpp) over our model's matrices and cache."""

from __future__ import annotations

from typing import cast

import numpy as np

from bench.native import Bits, Floor
from bench.peers.worker import Job, Peer, Task
from bench.shapes import SHAPES


class FloorPeer(Peer):
    """Reads and multiplies what a pass must; measures itself, without the start of its threads."""

    def __init__(self, job: Job, option: str) -> None:
        super().__init__(job, option)
        self.shape = SHAPES[job.shape]
        self.context = 0
        self.elapsed = 0.0
        self.rng = np.random.default_rng(0)
        self.floor = Floor(
            self.shape.matrices,
            cast(Bits, job.bits),
            cache_bytes=self.shape.all_cache_bytes(job.max_context, job.kv),
            threads=job.threads,
        )
        self.description = "floor program: weight products and one read of the cache, no more"

    def reset(self, context: int) -> None:
        self.context = context

    def append(self, n: int) -> None:
        self.elapsed += self.floor.milliseconds(
            self.shape.ops(n, self.context, self.rng, self.job.kv)
        )

    def decode(self, n: int) -> None:
        for _ in range(n):
            self.append(1)

    def milliseconds(self, task: Task) -> float:
        self.elapsed = 0
        self.run(task)
        return self.elapsed


def load(job: Job, option: str) -> FloorPeer:
    """The program with the job's shape."""
    return FloorPeer(job, option)
