"""The engine's dMel bins against transformers' feature extractor and quantiser."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray
from parity import speech

from duplex_engine import _core
from duplex_engine.reference import dmel

Sound = NDArray[np.float32]
ULP = 2.0**-24  # of float32: a rounding errs by at most this, relative
EDGES = -6.7 + 0.6 * np.arange(15)  # between neighbouring bins


def noise(n: int, loudness: float = 0.1) -> Sound:
    return (loudness * np.random.default_rng(n).standard_normal(n)).astype(np.float32)


def tone(hz: float, n: int = 16_000) -> Sound:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(n) / dmel.SAMPLE_RATE_HZ)).astype(np.float32)


def rising_tone(from_hz: float, to_hz: float, n: int = 80_000) -> Sound:
    hz = np.linspace(from_hz, to_hz, n)
    return (0.5 * np.sin(2 * np.pi * np.cumsum(hz) / dmel.SAMPLE_RATE_HZ)).astype(np.float32)


def margin(log_mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each value is from the nearest edge between two bins."""
    return np.abs(log_mel[..., None] - EDGES).min(axis=-1)


def float32_error(samples: Sound, log_mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far a float32 computation of `log_mel` may be off, by the usual error model of an FFT.

    Each of log2(n) stages rounds values whose root mean square is at most that of the spectrum, so
    a magnitude errs by about ULP * log2(n) * |windowed frame|, twice that to be safe, whatever its
    own size: a tone's far bands, tiny beside it, lose most. A mel value errs by its weights' sum
    of these, its logarithm by the relative error, and rounding the logarithm costs 8 ULP.
    """
    n_frames = len(log_mel)
    padded = np.zeros((n_frames + 1) * dmel.HOP)
    padded[dmel.HOP : dmel.HOP + len(samples)] = samples
    frames = np.lib.stride_tricks.sliding_window_view(padded, dmel.WINDOW)[:: dmel.HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(dmel.WINDOW) / dmel.WINDOW)
    loudness = np.linalg.norm(frames * hann, axis=1, keepdims=True)  # (n_frames, 1)
    magnitude_error = 2 * ULP * np.log2(dmel.WINDOW) * loudness
    mel_error = magnitude_error * dmel.mel_filters().sum(axis=1)
    return mel_error / (10**log_mel * np.log(10)) + 8 * ULP


SOUNDS = {
    "the recording": speech(),
    "a loud recording": 30 * speech()[:32_000],
    "a faint recording": 1e-3 * speech()[:32_000],
    "clipping": np.clip(20 * speech()[:32_000], -1, 1),
    "silence": np.zeros(4_000, np.float32),
    "faint noise": noise(16_000, 1e-5),
    "a click": np.eye(1, 4_000, 1_234, dtype=np.float32)[0],
    "a click at a frame's end": np.eye(1, 4_000, 1_599, dtype=np.float32)[0],
} | {f"{n} samples of noise": noise(n) for n in (1, 799, 800, 801, 12_345)}
TONES = {f"{hz} Hz": tone(hz) for hz in (20, 101.7, 440, 997, 1000, 1311.3, 4178.3, 7999)} | {
    "a rising tone": rising_tone(50, 7_900)
}


@pytest.mark.parametrize("name", SOUNDS)
def test_bins_equal_transformers(name: str) -> None:
    samples = SOUNDS[name]
    found = _core.dmel_bins(samples)
    assert found.shape == (-(-len(samples) // dmel.HOP), dmel.N_MELS)
    np.testing.assert_array_equal(found, oracle.dmel_bins(oracle.log_mel(samples)))
    np.testing.assert_array_equal(found, dmel.dmel_bins(samples))


def test_16_bit_samples_are_the_same_sound() -> None:
    integers = np.round(speech() * 32_768).astype(np.int16)
    np.testing.assert_array_equal(integers / np.float32(32_768), speech())
    np.testing.assert_array_equal(_core.dmel_bins(integers), _core.dmel_bins(speech()))


@pytest.mark.parametrize("name", TONES)
def test_bins_of_pure_tones(name: str) -> None:
    """The engine computes in float64. transformers may differ only where its own float32 error,
    which the next test bounds, carries a value over an edge."""
    samples = TONES[name]
    found, exact = _core.dmel_bins(samples), dmel.log_mel(samples)
    np.testing.assert_array_equal(found, dmel.quantise(exact))
    log_mel = oracle.log_mel(samples)
    differs = found != oracle.dmel_bins(log_mel)
    error = np.abs(log_mel - exact) + 8 * ULP  # the second for its distances to the centres
    assert (margin(exact) <= error)[differs].all()
    assert differs.mean() < 0.01


@pytest.mark.parametrize("name", [*SOUNDS, *TONES])
def test_the_error_bound_holds_for_transformers(name: str) -> None:
    samples = (SOUNDS | TONES)[name]
    exact = dmel.log_mel(samples)
    assert (np.abs(oracle.log_mel(samples) - exact) < float32_error(samples, exact)).all()
