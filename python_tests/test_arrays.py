"""What callers pass as sound, pictures and tokens: taken without a copy, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from duplex_engine.arrays import Resampler, checked_rate, rgb_image, samples_1d, token_ids
from duplex_engine.errors import InvalidArgument


class Broken:
    """An array in name only: its own code fails."""

    def __array__(self, *_: object, **__: object) -> None:
        raise RuntimeError("the buffer is gone")


class Mislaid:
    """An array whose description is wrong."""

    __array_interface__: Any = {"version": 3, "shape": (2,), "typestr": "nonsense"}  # noqa: RUF012


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_sound_that_the_core_can_read_is_not_copied(dtype: Any) -> None:
    samples = np.arange(100).astype(dtype)
    assert samples_1d(samples) is samples
    column = samples[:, None]
    assert np.shares_memory(samples_1d(column), samples)
    tensor = torch.from_numpy(samples)
    assert np.shares_memory(samples_1d(tensor), samples)


def test_sound_of_other_kinds_is_converted() -> None:
    for dtype in (np.float64, np.float16):
        converted = samples_1d(np.array([0.5, -0.25], dtype))
        assert converted.dtype == np.float32
        assert converted.tolist() == [0.5, -0.25]
    every_other = np.arange(10, dtype=np.float32)[::2]
    assert samples_1d(every_other).flags.c_contiguous
    assert samples_1d(every_other).tolist() == every_other.tolist()


def test_channels_are_averaged_on_the_same_scale() -> None:
    stereo = np.array([[0.5, 0.25], [-1.0, 0.0]], np.float32)
    assert samples_1d(stereo).tolist() == [0.375, -0.5]
    as_int16 = (stereo * 32768).astype(np.int16)
    assert samples_1d(as_int16).tolist() == [0.375, -0.5]
    assert samples_1d(as_int16).dtype == np.float32


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (
            [0.0, 1.0],
            r"expected a NumPy array or a DLPack tensor, found list; .*np\.asarray\(.*float32\)",
        ),
        (Broken(), "found Broken: the buffer is gone; pass samples as"),
        (Mislaid(), "found Mislaid: .*; pass samples as"),
        (b"\0\0", "found bytes"),
        ("speech.wav", "found str"),
        (np.zeros(4, np.int32), "int16 samples, found int32"),
        (np.zeros(4, np.uint8), "found uint8"),
        (np.zeros(4, np.complex64), "found complex64"),
        (np.zeros(4, np.longdouble), "found longdouble|found float128"),
        (np.zeros((2, 16000), np.float32), r"found \(2, 16000\); samples go first"),
        (np.zeros((4, 0), np.float32), r"found \(4, 0\)"),
        (np.float32(0.5), "found ()"),
        (np.array([0.0, 1.0, np.nan], np.float32), "found nan at index 2"),
        (np.array([0.0, -np.inf], np.float64), "found -inf at index 1"),
        (np.array([[0.0, 0.0], [np.inf, -np.inf]], np.float32), "found nan at index 1"),
        (np.ma.masked_all(4, np.int32), "int16 samples, found int32"),
        (np.ma.masked_array([np.nan], [True]), "found nan at index 0"),
        (torch.zeros(4, requires_grad=True), "found Tensor: .*; detach it"),
        (torch.zeros(4, dtype=torch.bfloat16), "found Tensor"),
    ],
)
def test_other_sound_is_refused(audio: object, message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"audio: .*{message}"):
        samples_1d(audio)


def test_pictures() -> None:
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert rgb_image(picture) is picture
    assert np.shares_memory(rgb_image(torch.from_numpy(picture)), picture)
    assert rgb_image(picture[:, ::2]).tolist() == picture[:, ::2].tolist()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 2, 3), np.float32), "found float32"),
        (np.zeros((2, 2), np.uint8), r"found \(2, 2\)"),
        (np.zeros((2, 2, 4), np.uint8), "transparency"),
        (np.zeros((0, 2, 3), np.uint8), r"found \(0, 2, 3\)"),
        ("board.png", "found str"),
        ([[[0, 0, 0]]], r"found list; pass pixels as np\.asarray\(.*uint8\)"),
    ],
)
def test_other_pictures_are_refused(image: object, message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"image: .*{message}"):
        rgb_image(image)


@pytest.mark.parametrize(
    "ids",
    [[3, 0, 9], (3, 0, 9), np.array([3, 0, 9]), np.array([3, 0, 9], np.uint8), range(3)],
)
def test_token_ids(ids: Any) -> None:
    assert token_ids(ids, 10) == list(ids)
    assert token_ids(torch.tensor([3, 0, 9]), 10) == [3, 0, 9]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([10], r"\[0, 10\), found 10"),
        ([-1], "found -1"),
        ([True], "integer"),
        ([1.0], "integer"),
        ([[1]], "integer|found"),
        (np.zeros((1, 2), int), r"\(1, 2\)"),
        (np.zeros(2), "float64"),
        ("ab", "found str"),
        (5, "expected token ids, found int; pass a list of integers"),
        (bytearray(b"ab"), "found bytearray"),
        (Broken(), "found Broken: the buffer is gone"),
        ([np.zeros((2, 2)), np.zeros((2, 3))], "integer"),
    ],
)
def test_other_token_ids_are_refused(ids: object, message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"stop: .*{message}"):
        token_ids(ids, 10, "stop")


@pytest.mark.parametrize("text", [5, b"hi", (i for i in range(3)), {1, 2}])
@pytest.mark.parametrize("name", ["text", "result"])
def test_text_of_other_kinds_is_refused(text: object, name: str) -> None:
    expected = f"{name}: expected a string or token ids, found {type(text).__name__}; pass a str"
    with pytest.raises(InvalidArgument, match=expected):
        token_ids(text, 10, name)


def _resampled(sound: NDArray[np.float32], rate: int, cuts: list[int]) -> NDArray[np.float32]:
    resampler = Resampler(rate)
    return np.concatenate([resampler.push(piece) for piece in np.split(sound, sorted(cuts))])


@settings(max_examples=20, deadline=None)
@given(
    rate=st.sampled_from([8_000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000, 16_001]),
    cuts=st.lists(st.integers(0, 9_999), max_size=8),
)
def test_resampling_does_not_depend_on_the_cuts(rate: int, cuts: list[int]) -> None:
    sound = np.random.default_rng(rate).standard_normal(10_000).astype(np.float32)
    whole = _resampled(sound, rate, [])
    assert whole.size == 10_000 * 16_000 // rate
    np.testing.assert_array_equal(_resampled(sound, rate, cuts), whole)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_what_is_heard_and_drops_the_rest(rate: int) -> None:
    time_s = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 440 * time_s)
    too_high = np.sin(2 * np.pi * 12_000 * time_s) if rate > 24_000 else 0.0
    resampler = Resampler(rate)
    # Every micro-turn of input gives a micro-turn of output: nothing is ever missing.
    pieces = [resampler.push(p) for p in np.split((tone + too_high).astype(np.float32), 5)]
    assert [len(piece) for piece in pieces] == [3200] * 5

    steady = np.concatenate(pieces)[4000:12_000]
    phase = 2 * np.pi * 440 / 16_000 * np.arange(len(steady))
    basis = np.stack([np.sin(phase), np.cos(phase)], axis=1)
    weights, *_ = np.linalg.lstsq(basis, steady)
    assert np.hypot(*weights) == pytest.approx(1, abs=1e-3)
    assert np.abs(steady - basis @ weights).max() < 1e-4


def test_the_delay_is_the_silence_in_front() -> None:
    click = np.zeros(48_000, np.float32)
    click[9600] = 1
    resampler = Resampler(48_000)
    lead = len(resampler._waiting)  # samples
    assert lead < 15 * 16
    peak = int(np.abs(resampler.push(click)).argmax())
    assert peak == pytest.approx(3200 + lead, abs=3)


def test_int16_and_float32_resample_alike() -> None:
    whole = (np.random.default_rng(0).standard_normal(4800) * 3000).astype(np.int16)
    as_float = (whole / 32768).astype(np.float32)
    np.testing.assert_array_equal(Resampler(48_000).push(whole), Resampler(48_000).push(as_float))


def test_rates_may_be_integers_of_numpy() -> None:
    resampler = Resampler(np.int64(48_000))  # type: ignore[arg-type]
    assert type(resampler.sample_rate) is int
    assert len(resampler.push(np.zeros(480, np.float32))) == 160
    assert checked_rate(np.int32(16_000)) == 16_000


@pytest.mark.parametrize(
    "rate", [0, -16_000, 3_999, 10**9, 44_100.0, "44100", True, np.array([8000, 8000])]
)
def test_impossible_rates_are_refused(rate: Any) -> None:
    with pytest.raises(InvalidArgument, match="sample_rate: expected an integer"):
        Resampler(rate)
