"""A speech bank in memory: two voices that say every text as noise, 0.3 s a word."""

from __future__ import annotations

import numpy as np

from duplex_engine.training import phrases
from duplex_engine.training.bank import Bank, ClipInfo

WORD_S = 0.3
N_WORD = round(WORD_S * 16_000)
CHATTER = ("my brother lost the tickets last night", "we should leave early")


def toy_bank(*, with_times: bool = True) -> Bank:
    """with_times: whether phrases know the ends of their inner words."""
    rng = np.random.default_rng(0)
    audio = rng.integers(-3000, 3000, 16 * N_WORD).astype(np.int16)
    texts = [(text, "word") for text in phrases.WORDS]
    texts += [(text, "phrase") for text in phrases.PHRASES]
    texts += [(word, "mispronounced") for word, _, _ in phrases.MISPRONOUNCED]
    texts += [(text, "chatter") for text in CHATTER]
    texts += [(text, "foreign") for _, text in phrases.FOREIGN]
    infos = []
    for voice in ("first", "second"):
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
            infos.append(ClipInfo(text, words, voice, "train", kind, 0, N_WORD * len(spoken)))
    return Bank(audio, infos)
