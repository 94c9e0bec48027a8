"""Recordings of people and of music, from the Debian packages of the Asterisk telephone exchange.

One speaker reads numbers, days, months and some five hundred prompts at 16 kHz. File names tell
what is said, so only the single words have a trustworthy text.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from duplex_engine.training import phrases
from duplex_engine.training.speech.sound import SAMPLE_RATE_HZ, Speech, finish, timeless

__all__ = ["MUSIC", "MUSIC_PIECE_S", "PROMPTS", "Recordings", "prompt_words", "speech_prompts"]

PROMPTS = Path("/usr/share/asterisk/sounds")  # asterisk-core-sounds-{en,es,fr,it,ru}-g722
MUSIC = Path("/usr/share/asterisk/moh")  # asterisk-moh-opsound-g722
MUSIC_PIECE_S = 8.0


def prompt_words(speaker: str) -> dict[str, str]:
    """The single words of ``phrases`` that a speaker reads: word -> path of the recording."""
    files = {
        **{word: f"digits/{number}" for number, word in enumerate(phrases.NUMBERS, start=1)},
        **{day: f"digits/day-{(n + 1) % 7}" for n, day in enumerate(phrases.DAYS)},
        **{month: f"digits/mon-{n}" for n, month in enumerate(phrases.MONTHS)},
    }
    return {word: str(PROMPTS / speaker / f"{name}.g722") for word, name in files.items()}


def speech_prompts(speaker: str) -> list[str]:
    """Paths of the other spoken prompts of a speaker, less letters and silences, sorted."""
    known = set(prompt_words(speaker).values())
    folder = PROMPTS / speaker
    found = sorted(str(path) for part in ("", "digits") for path in (folder / part).glob("*.g722"))
    return [path for path in found if path not in known and "beep" not in path]


class Recordings:
    """Plays files; the source is ``text|path`` or ``text|path|start in seconds``."""

    def speak(self, source: str, settings: dict[str, Any], rng: np.random.Generator) -> Speech:  # noqa: ARG002
        """The recording, trimmed and levelled; with a start, MUSIC_PIECE_S of it from there."""
        text, path, *start_s = source.split("|")
        samples = _decode(path)
        if start_s:
            first = round(float(start_s[0]) * SAMPLE_RATE_HZ)
            samples = samples[first : first + round(MUSIC_PIECE_S * SAMPLE_RATE_HZ)]
        return finish(samples, SAMPLE_RATE_HZ, timeless(text))


@lru_cache(maxsize=2)
def _decode(path: str) -> NDArray[np.int16]:
    with av.open(path, format="g722") as container:
        frames = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
    return np.concatenate(frames).astype(np.int16)
