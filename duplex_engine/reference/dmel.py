"""Discrete mel audio (dMel): sound to 80 small integers per 50 ms frame. Mirrors dmel.cpp.

A frame looks back only: it sees the hop that it closes and the hop before it. A stream that
carries the last 800 samples over therefore computes the same frames as a whole recording.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

SAMPLE_RATE_HZ = 16_000
HOP = 800  # samples; one frame every 50 ms, 4 frames in a micro-turn of 200 ms
WINDOW = 1600  # samples; also the FFT length
N_MELS = 80
N_BINS = 16
LOG_MEL_MIN, LOG_MEL_MAX = -7.0, 2.0  # log10 of magnitude
POWER_FLOOR = 1e-10  # of |X|^2, before the square root
MEL_FLOOR = 1e-10  # of a mel value, before the logarithm

_LINEAR_HZ_PER_MEL = 200.0 / 3.0  # Slaney's scale is linear up to 1 kHz (15 mel) ...
_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0
_LOG_STEP = np.log(6.4) / 27.0  # ... and logarithmic above: 27 mel for a factor of 6.4


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    logarithmic = _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL))
    return np.where(mel < _BREAK_MEL, mel * _LINEAR_HZ_PER_MEL, logarithmic)


def mel_filters() -> NDArray[np.float64]:
    """Triangular Slaney filters of unit area. Returns (N_MELS, WINDOW // 2 + 1)."""
    nyquist_hz = SAMPLE_RATE_HZ / 2
    top_mel = _BREAK_MEL + np.log(nyquist_hz / _BREAK_HZ) / _LOG_STEP
    edges_hz = _mel_to_hz(np.linspace(0.0, top_mel, N_MELS + 2))
    low, centre, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    fft_hz = np.linspace(0.0, nyquist_hz, WINDOW // 2 + 1)
    rising = (fft_hz - low) / (centre - low)
    falling = (high - fft_hz) / (high - centre)
    return np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (high - low)


def log_mel(samples: ArrayLike) -> NDArray[np.float64]:
    """log10 mel magnitudes, not yet clamped. (n,) samples at 16 kHz -> (ceil(n / HOP), N_MELS)."""
    sound = np.asarray(samples, dtype=np.float64)
    if sound.ndim != 1:
        raise ValueError(f"log_mel: expected mono samples of shape (n,), found {sound.shape}")
    n_frames = -(-len(sound) // HOP)
    if n_frames == 0:
        return np.zeros((0, N_MELS))
    padded = np.zeros(WINDOW - HOP + n_frames * HOP)
    padded[WINDOW - HOP : WINDOW - HOP + len(sound)] = sound
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]  # (n_frames, WINDOW)
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(WINDOW) / WINDOW)  # periodic
    spectrum = np.fft.rfft(frames * hann)
    magnitude = np.sqrt(np.maximum(spectrum.real**2 + spectrum.imag**2, POWER_FLOOR))
    return np.log10(np.maximum(magnitude @ mel_filters().T, MEL_FLOOR))


def quantise(log_mels: ArrayLike) -> NDArray[np.uint8]:
    """Index of the nearest of N_BINS equally spaced centres, ties to the lower. Same shape."""
    clamped = np.clip(np.asarray(log_mels, dtype=np.float64), LOG_MEL_MIN, LOG_MEL_MAX)
    centres = np.linspace(LOG_MEL_MIN, LOG_MEL_MAX, N_BINS)
    distance = np.abs(clamped[..., None] - centres)
    nearest: NDArray[np.intp] = np.argmin(distance, axis=-1)  # the first of equals
    return nearest.astype(np.uint8)


def dmel_bins(samples: ArrayLike) -> NDArray[np.uint8]:
    """(n,) samples at 16 kHz -> (ceil(n / HOP), N_MELS) bins, each in 0 .. N_BINS - 1."""
    return quantise(log_mel(samples))
