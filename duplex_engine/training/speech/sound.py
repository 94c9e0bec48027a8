"""What every source of speech shares: the spoken result, and how a raw sound becomes one.

Owns trimming, resampling and level. Does not own who speaks or what; read ``voices.py`` next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import soxr
from numpy.typing import NDArray

__all__ = [
    "SAMPLE_RATE_HZ",
    "Samples",
    "Speech",
    "Synthesiser",
    "Unspeakable",
    "Word",
    "finish",
    "timeless",
]

SAMPLE_RATE_HZ = 16_000
FRAME = 80  # samples: 5 ms, the grain of trimming
TRIM_DB = -40.0  # a frame this far under the loudest one is taken for silence
END_DB = -30.0  # where a word is over, if the synthesiser does not tell: the rest is breath
SPEECH_RMS = 0.05  # -26 dB of full scale, over the frames that are not silence
PEAK_MAX = 0.95

Samples = NDArray[np.float32]  # (n,), mono at SAMPLE_RATE_HZ, full scale is 1
Word = tuple[str, float | None, float | None]  # the word, its start and its end in seconds


class Unspeakable(ValueError):
    """A voice makes no sound of a text."""


@dataclass(frozen=True)
class Speech:
    """A spoken text: it starts with its first sound and ends with its last."""

    samples: Samples
    words: tuple[Word, ...]


class Synthesiser(Protocol):
    """Whatever turns a text into sound."""

    def speak(self, source: str, settings: dict[str, Any], rng: np.random.Generator) -> Speech:
        """Speaks ``source``, varied a little by ``rng``. Raises ``Unspeakable``."""
        ...  # pragma: no cover


def timeless(text: str) -> list[Word]:
    """The words of a text whose times the synthesiser does not tell."""
    return [(word, None, None) for word in text.split()]


def _sounding(samples: Samples, threshold_db: float = TRIM_DB) -> NDArray[np.bool_]:
    """Which frames of FRAME samples are not silence. (n,) -> (n // FRAME,)."""
    n_frames = len(samples) // FRAME
    frames = samples[: n_frames * FRAME].reshape(n_frames, FRAME).astype(np.float64)
    power = np.mean(frames**2, axis=1)
    least = max(float(power.max(initial=0.0)) * 10.0 ** (threshold_db / 10.0), 1e-8)
    return np.asarray(power > least)


def finish(samples: NDArray[Any], rate_hz: int, words: list[Word]) -> Speech:
    """Trims, resamples and levels a raw sound.

    Args:
        samples: (n,) mono, any scale.
        rate_hz: of ``samples``.
        words: with times in seconds from the first raw sample; ``None`` where unknown.

    The first word's unknown start becomes the clip's; the last word's unknown end becomes the last
    moment that is not much softer than the loudest.

    Raises:
        Unspeakable: nothing is heard.
    """
    sound = np.asarray(samples, dtype=np.float32)
    peak = float(np.abs(sound).max(initial=0.0))
    if peak > 0:
        sound = sound / peak
    if rate_hz != SAMPLE_RATE_HZ:
        sound = soxr.resample(sound, rate_hz, SAMPLE_RATE_HZ)
    heard = np.flatnonzero(_sounding(sound))
    if peak == 0 or len(heard) < 4:
        raise Unspeakable(
            f"speech: expected sound for {[word for word, _, _ in words]}, found none"
        )
    first, last = int(heard[0]) * FRAME, (int(heard[-1]) + 1) * FRAME
    sound = sound[first:last]
    loud = np.repeat(_sounding(sound), FRAME)
    rms = float(np.sqrt(np.mean(np.square(sound[: len(loud)][loud], dtype=np.float64))))
    gain = min(SPEECH_RMS / rms, PEAK_MAX / float(np.abs(sound).max()))
    loud_end = (int(np.flatnonzero(_sounding(sound, END_DB))[-1]) + 1) * FRAME
    timed = _shifted(words, first, len(sound), loud_end)
    return Speech((sound * gain).astype(np.float32), timed)


def _shifted(words: list[Word], first: int, n: int, loud_end: int) -> tuple[Word, ...]:
    """Times from the clip's first sample on; ``first``, ``n`` and ``loud_end`` are in samples."""
    seconds = n / SAMPLE_RATE_HZ

    def moved(time_s: float | None) -> float | None:
        if time_s is None:
            return None
        return round(min(max(time_s - first / SAMPLE_RATE_HZ, 0.0), seconds), 4)

    shifted = [(word, moved(start), moved(end)) for word, start, end in words]
    if shifted:
        word, start, end = shifted[0]
        shifted[0] = (word, 0.0 if start is None else start, end)
        word, start, end = shifted[-1]
        shifted[-1] = (word, start, round(loud_end / SAMPLE_RATE_HZ, 4) if end is None else end)
    return tuple(shifted)
