"""Our own engine."""

from __future__ import annotations

from typing import Any

from bench.peers.worker import Job, Peer, Task, token_ids
from duplex_engine import Engine

SPARE_ROWS = 64  # behind the longest context


class Duplex(Peer):
    """One session; bfloat16 activations, weights and cache as the job says."""

    def __init__(self, job: Job, option: str) -> None:
        super().__init__(job, option)
        options: dict[str, Any] = {}
        if job.bits != "bf16":
            options["weights"] = job.bits
        if job.kv != "bf16":
            options["kv_dtype"] = job.kv
        self.engine = Engine.load(
            job.checkpoint,
            dtype="bfloat16",
            threads=job.threads,
            isa=job.isa,
            max_positions=job.max_context + SPARE_ROWS,
            memory=self._memory(job),
            **options,
        )
        self.session = self.engine.open_session()
        self.description = f"duplex_engine, {self.engine.description}"

    @staticmethod
    def _memory(job: Job) -> int:
        per_row = 2 * 2 * job.n_layers * job.n_kv_heads * job.d_head
        return (256 << 20) + int(1.1 * per_row * (job.max_context + SPARE_ROWS))

    def reset(self, context: int) -> None:
        """Truncates where it can, else reads what is missing, from nothing if need be."""
        if self.session.length > context and context not in self.session.marks:
            self.session.close()
            self.session = self.engine.open_session()
        if self.session.length > context:
            self.session.truncate(context)
        elif self.session.length < context:
            self.session.append(text=token_ids(context - self.session.length))

    def prepare(self, task: Task) -> None:
        """A newest token that is not yet fed, as in the middle of a conversation."""
        if task.name != "append":
            self.session.decode(1)

    def append(self, n: int) -> None:
        self.session.append(text=token_ids(n, seed=n), logits="last")

    def decode(self, n: int) -> None:
        self.session.decode(n)

    def run(self, task: Task) -> None:
        """note: the token that `prepare` left is fed together with the rows."""
        if task.name == "turn":
            self.session.append(text=token_ids(task.rows))
            self.session.decode(task.tokens)
        else:
            super().run(task)


def load(job: Job, option: str) -> Duplex:
    """The engine with the job's checkpoint."""
    return Duplex(job, option)
