"""dMel bins and audio rows of the NumPy twin against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
from transformers import InklingFeatureExtractor

from duplex_engine.reference import dmel, inkling

BOUNDARIES = -6.7 + 0.6 * np.arange(15)  # half-way between neighbouring centres


def _speech_like(n_samples: int, seed: int = 0) -> np.ndarray:
    """A gliding pulse train through moving resonances, with pauses, breath and hiss."""
    rng = np.random.default_rng(seed)
    t = np.arange(n_samples) / dmel.SAMPLE_RATE_HZ
    pitch_hz = 120 + 30 * np.sin(2 * np.pi * 1.3 * t)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / dmel.SAMPLE_RATE_HZ
    voice = np.zeros(n_samples)
    for k in range(1, 40):
        frequency_hz = k * pitch_hz
        formants = [(500 + 250 * np.sin(7 * t), 90), (1500 + 600 * np.sin(5 * t), 140), (2600, 220)]
        gain = sum(1.0 / (1.0 + ((frequency_hz - f) / width) ** 2) for f, width in formants)
        voice += gain * np.sin(k * phase) / k**0.5
    syllables = np.clip(np.sin(2 * np.pi * 2.2 * t) + 0.4, 0, 1)
    breath = 0.05 * rng.standard_normal(n_samples) * (1 - syllables)
    return 0.2 * syllables * voice + breath + 1e-4 * rng.standard_normal(n_samples)


def _tone(n_samples: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(n_samples) / dmel.SAMPLE_RATE_HZ)


RNG = np.random.default_rng(5)
SOUNDS = {
    "speech": _speech_like(48_000),
    "other speech": _speech_like(32_123, seed=1),
    "noise": 0.1 * RNG.standard_normal(16_000),
    "faint noise": 1e-5 * RNG.standard_normal(16_000),
    "silence": np.zeros(4_000),
    "clipping": np.clip(20 * _speech_like(16_000, seed=2), -1, 1),
    "loud": 1000 * RNG.standard_normal(8_000),
    "click": np.eye(1, 4_000, 1_234)[0],
    "one sample": np.array([0.25]),
    "one hop": 0.1 * RNG.standard_normal(dmel.HOP),
    "a hop and a sample": 0.1 * RNG.standard_normal(dmel.HOP + 1),
    "16-bit speech": np.round(_speech_like(16_000, seed=3) * 8000) / 32768,
    "16-bit tone": np.round(_tone(8_000) * 32767) / 32768,
}


@pytest.mark.parametrize("name", SOUNDS)
def test_bins_equal_transformers(name: str) -> None:
    samples = SOUNDS[name].astype(np.float32)
    log_mel = dmel.log_mel(samples)
    found, expected = dmel.dmel_bins(samples), oracle.dmel_bins(oracle.log_mel(samples))
    assert found.shape == expected.shape == (-(-len(samples) // dmel.HOP), dmel.N_MELS)
    margin = np.abs(log_mel[..., None] - BOUNDARIES).min(axis=-1)
    assert margin[found != expected].max(initial=0.0) < 2e-6


def test_mel_filters_equal_transformers() -> None:
    expected = InklingFeatureExtractor().mel_filters.numpy()
    np.testing.assert_allclose(dmel.mel_filters(), expected, rtol=0, atol=1e-8)


def test_bins_are_spread() -> None:
    assert len(np.unique(dmel.dmel_bins(SOUNDS["speech"]))) >= 8, "a narrow test would prove little"


def test_ties_go_to_the_lower_bin() -> None:
    centres = np.linspace(dmel.LOG_MEL_MIN, dmel.LOG_MEL_MAX, dmel.N_BINS)
    np.testing.assert_array_equal(dmel.quantise(centres), np.arange(16))
    exact_tie = (centres[0] + centres[5]) / 2  # -5.5, a sum without rounding
    assert dmel.quantise(exact_tie) == 2
    np.testing.assert_array_equal(dmel.quantise([-99.0, -7.0, 2.0, 99.0]), [0, 0, 15, 15])


def test_no_samples_no_frames() -> None:
    assert dmel.dmel_bins([]).shape == (0, dmel.N_MELS)


def test_frames_look_back_only() -> None:
    whole = dmel.log_mel(SOUNDS["speech"])
    earlier = dmel.log_mel(SOUNDS["speech"][: 9 * dmel.HOP])
    np.testing.assert_allclose(earlier, whole[:9], rtol=0, atol=1e-12)
    carried = dmel.log_mel(SOUNDS["speech"][8 * dmel.HOP : 13 * dmel.HOP])
    np.testing.assert_allclose(carried[1:], whole[9:13], rtol=0, atol=1e-12)


def test_stereo_is_refused() -> None:
    with pytest.raises(ValueError, match="mono"):
        dmel.log_mel(np.zeros((2, 800)))


def test_audio_rows(tmp_path: Path) -> None:
    model = oracle.build("odd_sizes", tmp_path)
    weights, _ = inkling.load(tmp_path)
    bins = dmel.dmel_bins(SOUNDS["speech"])
    expected = oracle.embed(model, [("audio", bins)]).numpy()
    np.testing.assert_allclose(inkling.embed_audio(bins, weights), expected, rtol=1e-5, atol=1e-5)
