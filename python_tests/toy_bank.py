"""A speech bank of voices that say every text as noise, 0.3 s a word: in memory, or on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duplex_engine.training import phrases
from duplex_engine.training.bank import Bank, ClipInfo

WORD_S = 0.3
N_WORD = round(WORD_S * 16_000)
CHATTER = ("my brother lost the tickets last night", "we should leave early")


def toy_bank(*, with_times: bool = True) -> Bank:
    """Two training voices. with_times: whether phrases know the ends of their inner words."""
    return Bank(_audio(), _infos({"first": "train", "second": "train"}, with_times=with_times))


def write_toy_bank(folder: Path, voices: Mapping[str, str]) -> Path:
    """Writes a bank of these voices, name -> group; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _audio().tofile(folder / "audio.i16")
    with (folder / "clips.jsonl").open("w", encoding="utf-8") as index:
        for info in _infos(voices, with_times=True):
            index.write(json.dumps(asdict(info)) + "\n")
    return folder


def _audio() -> NDArray[np.int16]:
    rng = np.random.default_rng(0)
    return rng.integers(-3000, 3000, 16 * N_WORD).astype("<i2")


def _infos(voices: Mapping[str, str], *, with_times: bool) -> list[ClipInfo]:
    texts = [(text, "word") for text in phrases.WORDS]
    texts += [(text, "phrase") for text in phrases.PHRASES]
    texts += [(word, "mispronounced") for word, _, _ in phrases.MISPRONOUNCED]
    texts += [(text, "chatter") for text in CHATTER]
    texts += [(text, "foreign") for _, text in phrases.FOREIGN]
    infos = []
    for voice, group in voices.items():
        for text, kind in texts:
            spoken = text.split()
            last = len(spoken) - 1
            words = tuple(
                (
                    word,
                    WORD_S * i if with_times or i == 0 else None,
                    WORD_S * (i + 1) if with_times or i == last else None,
                )
                for i, word in enumerate(spoken)
            )
            infos.append(ClipInfo(text, words, voice, group, kind, 0, N_WORD * len(spoken)))
    return infos
