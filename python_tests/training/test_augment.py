"""Augmentation: seeded, in range, and without moving a word in time."""

from __future__ import annotations

import numpy as np
import pytest

from duplex_engine.training import augment as module
from duplex_engine.training.augment import augment, babble_track
from duplex_engine.training.bank import Bank, ClipInfo

RATE = 16_000


@pytest.fixture
def stream() -> np.ndarray:
    """Four seconds of silence with a burst of sound from 1.0 to 1.5 s."""
    samples = np.zeros(4 * RATE, np.float32)
    rng = np.random.default_rng(5)
    samples[RATE : RATE + RATE // 2] = 0.1 * rng.standard_normal(RATE // 2)
    return samples


def power_db(samples: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(samples, dtype=np.float64)) + 1e-20))


def test_same_seed_same_sound(stream: np.ndarray) -> None:
    first, second, other = (augment(stream, np.random.default_rng(s)) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("n", [0, 1, 799, 3200, 50_001])
def test_shape_and_range(n: int) -> None:
    rng = np.random.default_rng(n)
    samples = rng.uniform(-1, 1, n).astype(np.float32)
    for _ in range(20):
        treated = augment(samples, rng, babble=samples[::-1].copy() if n else None)
        assert treated.shape == (n,)
        assert treated.dtype == np.float32
        assert np.isfinite(treated).all()
        assert np.abs(treated).max(initial=0.0) <= 1.0


def test_the_input_is_left_alone(stream: np.ndarray) -> None:
    before = stream.copy()
    for seed in range(10):
        augment(stream, np.random.default_rng(seed))
    np.testing.assert_array_equal(stream, before)


def test_onsets_do_not_move(stream: np.ndarray) -> None:
    for seed in range(30):
        treated = augment(stream, np.random.default_rng(seed))
        before, after = treated[RATE - 480 : RATE - 80], treated[RATE : RATE + 400]
        assert power_db(after) > power_db(before) + 3.0, seed


def test_noise_stays_under_speech(stream: np.ndarray) -> None:
    for seed in range(30):
        treated = augment(stream, np.random.default_rng(seed))
        noise, speech = treated[: RATE // 2], treated[RATE : RATE + RATE // 2]
        assert power_db(speech) - power_db(noise) > 0.0, seed


def test_silence_gets_noise_of_a_quiet_room() -> None:
    levels = [
        power_db(augment(np.zeros(RATE, np.float32), np.random.default_rng(seed)))
        for seed in range(40)
    ]
    assert min(levels) < -60.0
    assert max(levels) < -25.0


def test_band_limit_removes_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("P_ROOM", "P_NOISE", "P_CLIP", "P_WANDER", "P_EQ"):
        monkeypatch.setattr(module, name, 0.0)
    monkeypatch.setattr(module, "P_BAND_LIMIT", 1.0)
    white = 0.1 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    for seed in range(10):  # with the telephone codec and without
        power = np.abs(np.fft.rfft(augment(white, np.random.default_rng(seed)))) ** 2
        assert power[5500:].mean() < 1e-3 * power[:3000].mean()


def test_the_fast_length_is_the_least() -> None:
    def smooth(n: int) -> bool:
        for factor in (2, 3, 5):
            while n % factor == 0:
                n //= factor
        return n == 1

    for n in range(1, 2000):
        expected = next(m for m in range(n, 2 * n + 1) if smooth(m))
        assert module._fast_length(n) == expected


def test_babble_is_made_of_words_where_there_is_nothing_else() -> None:
    spoken = ClipInfo("one", (("one", 0.0, 0.1),), "v", "train", "word", 0, 1600)
    assert babble_track(Bank(np.ones(1600, np.int16), [spoken]), np.random.default_rng(0), 1).any()
    nobody = Bank(np.ones(1600, np.int16), [])
    assert not babble_track(nobody, np.random.default_rng(0), 1.0).any()


def test_babble_is_many_voices_all_the_time() -> None:
    audio = (np.sin(np.arange(RATE)) * 1000).astype(np.int16)
    infos = [ClipInfo("a b", (), f"v{i}", "train", "phrase", 0, RATE) for i in range(3)]
    track = babble_track(Bank(audio, infos), np.random.default_rng(0), 2.5)
    assert track.shape == (round(2.5 * RATE),)
    assert np.abs(track[:RATE].reshape(10, -1)).max(axis=1).min() > 0.0
