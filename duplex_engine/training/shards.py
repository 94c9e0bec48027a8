"""Shards: files of ready training episodes, for machines without a speech bank.

Owns their format: bins as half bytes, pictures, and tokens as (episode, micro-turn, token) rows, in
one compressed .npz. ``episodes.py`` writes them, ``train.py`` reads them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duplex_engine.training.rows import Stream
from duplex_engine.training.vocabulary import TOKENS, other_tokens
from duplex_engine.whole_file import whole_file

__all__ = ["load_shard", "save_shard"]

_TOKENS = ("typed", "results", "outputs")


def save_shard(path: Path, streams: list[Stream]) -> None:
    """Writes streams of equal length, whole or not at all; folders are made."""
    bins = np.stack([stream.bins for stream in streams])
    arrays: dict[str, NDArray[np.generic]] = {
        "vocabulary": np.array(TOKENS),
        "bins": (bins[..., ::2] << 4) | bins[..., 1::2],
        "labels": np.stack([stream.labels for stream in streams]),
        "expected": np.stack([stream.expected for stream in streams]),
    }
    for name in _TOKENS:
        entries = [
            (number, turn, token)
            for number, stream in enumerate(streams)
            for turn, tokens in getattr(stream, name).items()
            for token in tokens
        ]
        arrays[name] = np.array(entries, np.int16).reshape(-1, 3)
    pictures = [
        (number, turn, picture)
        for number, stream in enumerate(streams)
        for turn, picture in stream.images.items()
    ]
    arrays["image_turns"] = np.array([p[:2] for p in pictures], np.int16).reshape(-1, 2)
    arrays["images"] = np.stack([np.zeros((40, 39, 3), np.uint8), *(p[2] for p in pictures)])[1:]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished, unfinished.open("xb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_shard(path: Path) -> list[Stream]:
    """Reads what `save_shard` wrote.

    Raises:
        InvalidArgument: its tokens are others than now.
    """
    with np.load(path) as shard:
        # Early ones do not tell.
        if "vocabulary" in shard and tuple(shard["vocabulary"].tolist()) != TOKENS:
            raise other_tokens(path)
        packed, labels, expected = shard["bins"], shard["labels"], shard["expected"]
        tokens = {name: shard[name] for name in _TOKENS}
        image_turns, images = shard["image_turns"], shard["images"]
    bins = np.empty((*packed.shape[:-1], 80), np.uint8)
    bins[..., ::2], bins[..., 1::2] = packed >> 4, packed & 15
    by_turn: dict[str, list[dict[int, list[int]]]] = {
        name: [{} for _ in range(len(bins))] for name in _TOKENS
    }
    for name, entries in tokens.items():
        for number, turn, token in entries.tolist():
            by_turn[name][number].setdefault(turn, []).append(token)
    pictures: list[dict[int, NDArray[np.uint8]]] = [{} for _ in range(len(bins))]
    for (number, turn), picture in zip(image_turns.tolist(), images, strict=True):
        pictures[number][turn] = picture
    return [
        Stream(
            bins=bins[i],
            labels=labels[i],
            expected=expected[i],
            images=pictures[i],
            **{name: by_turn[name][i] for name in _TOKENS},
        )
        for i in range(len(bins))
    ]
