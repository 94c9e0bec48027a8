"""Sounds that are no speech: coughs, clicks, hum, and tones like simple music.

Owns their shapes and levels; each is a short piece to be mixed into a stream. Noise that lies under
a whole stream, rooms and codecs are in ``augment.py``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["SAMPLE_RATE", "cough", "hiss", "knock", "melody", "random_sound"]

SAMPLE_RATE = 16_000  # Hz
Samples = NDArray[np.float32]


def random_sound(rng: np.random.Generator) -> Samples:
    """One of the kinds below, 0.1 to 3 s long, at a random level."""
    make = (cough, knock, hiss, melody)[int(rng.integers(4))]
    samples = make(rng)
    level = 0.06 * float(np.exp(rng.uniform(-1.2, 0.7)))
    return samples * np.float32(level / (float(np.sqrt(np.mean(samples**2))) + 1e-6))


def _times(seconds: float) -> NDArray[np.float64]:
    return np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE


def _smoothed(noise: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    return np.convolve(noise, np.hanning(width + 2), mode="same")


def cough(rng: np.random.Generator) -> Samples:
    """One to three bursts of low-passed noise with a sharp attack."""
    bursts = []
    for _ in range(int(rng.integers(1, 4))):
        t = _times(float(rng.uniform(0.12, 0.3)))
        noise = _smoothed(rng.standard_normal(len(t)), int(rng.integers(3, 16)))
        bursts.append(noise * np.exp(-t * rng.uniform(8, 25)))
        bursts.append(np.zeros(int(rng.uniform(0.03, 0.2) * SAMPLE_RATE)))
    return np.concatenate(bursts).astype(np.float32)


def knock(rng: np.random.Generator) -> Samples:
    """Clicks of damped resonances, as of a door or a key."""
    knocks = []
    for _ in range(int(rng.integers(1, 6))):
        t = _times(float(rng.uniform(0.08, 0.35)))
        tone = np.sin(2 * np.pi * rng.uniform(120, 2500) * t)
        knocks.append(tone * np.exp(-t * rng.uniform(30, 120)))
    return np.concatenate(knocks).astype(np.float32)


def hiss(rng: np.random.Generator) -> Samples:
    """A stretch of coloured noise that swells and fades."""
    t = _times(float(rng.uniform(0.4, 2.5)))
    noise = _smoothed(rng.standard_normal(len(t)), int(rng.integers(1, 40)))
    swell = np.sqrt(np.sin(np.pi * t / (t[-1] + 1e-3)))
    return np.asarray(noise * swell, np.float32)


def melody(rng: np.random.Generator) -> Samples:
    """Notes of a scale with overtones, sometimes as chords."""
    base_hz = rng.uniform(90, 500)
    notes = []
    for _ in range(int(rng.integers(2, 9))):
        t = _times(float(rng.uniform(0.12, 0.4)))
        note = np.zeros(len(t))
        for _ in range(int(rng.integers(1, 4))):
            hz = base_hz * 2 ** (int(rng.integers(0, 16)) / 12)
            for overtone in range(1, int(rng.integers(2, 6))):
                note += np.sin(2 * np.pi * hz * overtone * t) / overtone
        notes.append(note * np.minimum(1, 20 * t) * np.exp(-t * rng.uniform(1, 8)))
    return np.concatenate(notes).astype(np.float32)
