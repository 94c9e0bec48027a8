"""The data of a training run: batches from a speech bank, or from ready shards.

Owns their order, their seeds and the processes that compose them. What a stream holds is decided in
``episodes.py``; its rows are in ``rows.py``.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from duplex_engine.training.model import Batch, collate
from duplex_engine.training.rows import Stream, layout, mask_bins, spoil
from duplex_engine.training.settings import Settings
from duplex_engine.training.shards import load_shard

__all__ = ["batches", "streams", "validation"]

N_WAITING = 64  # episodes that wait to be learnt again


def streams(settings: Settings, rng: np.random.Generator) -> Iterator[Stream]:
    """Endless training streams; what is composed comes again `replays` times, some steps later."""
    if settings.bank is None:
        assert settings.shards is not None
        ready = [s for path in sorted(settings.shards.glob("*.npz")) for s in load_shard(path)]
        if not ready:
            raise FileNotFoundError(f"shards: expected *.npz in {settings.shards}, found none")
        while True:
            yield from (ready[number].copy() for number in rng.permutation(len(ready)))
    # Here, because composing loads much that a run from shards does not need.
    from duplex_engine.training.episodes import train_streams

    waiting: list[Stream] = []
    seed = int(rng.integers(2**31))
    for stream in train_streams(settings.bank, seed, settings.turns, settings.p_drill):
        yield stream.copy()
        waiting.extend(stream.copy() for _ in range(settings.replays))
        while len(waiting) > N_WAITING * settings.replays:
            yield waiting.pop(int(rng.integers(len(waiting))))


def batches(settings: Settings, rank: int, first_step: int) -> Iterable[Batch]:
    """This process's share of every batch, with mistakes and masks; endless."""
    own = _Batches(settings, rank, first_step)
    if settings.workers == 0:
        return own
    return DataLoader(
        own,
        batch_size=None,
        num_workers=settings.workers,
        worker_init_fn=_leave_signals,
        pin_memory=settings.device != "cpu",
    )


class _Batches(IterableDataset[Batch]):
    """What one process composes: other streams in every worker."""

    def __init__(self, settings: Settings, rank: int, first_step: int) -> None:
        self._settings = settings
        self._seed = [settings.seed, first_step, rank]

    def __iter__(self) -> Iterator[Batch]:
        settings, worker = self._settings, get_worker_info()
        rng = np.random.default_rng([*self._seed, *([] if worker is None else [worker.id])])
        drawn = streams(settings, rng)
        while True:
            share = [next(drawn) for _ in range(settings.share)]
            for stream in share:
                stream.bins = mask_bins(stream.bins, rng)
            yield collate([layout(stream, spoil(stream, rng)) for stream in share], settings.n_rows)


def _leave_signals(_worker: int) -> None:
    """A worker ends when its run tells it to; the handlers of the run are not for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def validation(settings: Settings, n: int, p_drill: float) -> list[Batch]:
    """Episodes of the held-out voices as they are; none without a bank that has such voices."""
    if settings.bank is None:
        return []
    from duplex_engine.training.bank import Bank
    from duplex_engine.training.episodes import MIX, compose, to_stream

    bank = Bank.open(settings.bank)
    if not bank.voices("held"):
        return []
    rng = np.random.default_rng(1)
    episodes = [compose(MIX, bank, rng, "held", settings.turns, p_drill=p_drill) for _ in range(n)]
    laid = [layout(to_stream(episode)) for episode in episodes]
    share = min(settings.share, len(laid))
    return [
        collate(laid[begin : begin + share], settings.n_rows)
        for begin in range(0, len(laid) - share + 1, share)
    ]
