"""Tensor parallelism: one model on several ranks, used as one engine (docs/PARALLEL.md).

Rank 0 is the process that called `Engine.load`; it alone knows sessions. The others are worker
processes, each with its share of the weights and of every sequence. Read `ranks.py` (their lives),
then `worker.py` (what they run); the work itself is done in `csrc/ranks/`.
"""
