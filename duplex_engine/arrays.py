"""Whatever the caller has (NumPy, torch, any DLPack tensor) as the arrays that the core takes.

Owns the checks of type and shape, and the resampling to 16 kHz. Copies nothing that already is
contiguous, mono and of a type that the core reads. Sessions call it: see `session.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import soxr
from numpy.typing import NDArray

from duplex_engine.arguments import found, integer
from duplex_engine.errors import InvalidArgument

__all__ = [
    "MAX_CHANNELS",
    "SAMPLE_RATE",
    "Resampler",
    "Samples",
    "checked_rate",
    "rgb_image",
    "samples_1d",
    "token_ids",
]

SAMPLE_RATE = 16_000  # Hz; what the model hears
MIN_RATE, MAX_RATE = 4_000, 768_000
MAX_CHANNELS = 8  # more is a (channels, n) array given the wrong way round
INT16_SCALE = 1.0 / 32768.0
ENCODED = ("text", "result")  # arguments that may be a string too, which sessions encode first
ARRAY = "a NumPy array or a DLPack tensor"

Samples: TypeAlias = NDArray[np.float32] | NDArray[np.int16]


def samples_1d(audio: object) -> Samples:
    """Returns sound as one contiguous channel, float32 or int16; a view where it can be one.

    audio: (n,) or (n, channels), channels averaged. float32 or int16 cross as they are; float16
    and float64 become float32. int16 spans [-32768, 32767], floats [-1, 1] (more is legal).

    Raises:
        InvalidArgument: another type or shape, or a sample that is not finite.
    """
    remedy = "pass samples as np.asarray(..., np.float32), bytes as np.frombuffer(..., np.int16)"
    array = _as_array(audio, "audio", ARRAY, remedy)
    if array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        with np.errstate(over="ignore"):  # what does not fit is refused below
            array = array.astype(np.float32, copy=False)
    elif array.dtype != np.int16:
        raise InvalidArgument(
            f"audio: expected float32, float64, float16 or int16 samples, found {array.dtype}"
        )
    if array.ndim == 2 and 1 <= array.shape[1] <= MAX_CHANNELS:
        if array.shape[1] > 1:
            scale = INT16_SCALE if array.dtype == np.int16 else 1.0
            with np.errstate(all="ignore"):  # what is not finite is refused below
                array = array.mean(axis=1, dtype=np.float32) * np.float32(scale)
        else:
            array = array[:, 0]
    if array.ndim != 1:
        raise InvalidArgument(
            f"audio: expected (n,) or (n, channels) with at most {MAX_CHANNELS} channels, "
            f"found {array.shape}; samples go first"
        )
    if array.dtype == np.float32 and not np.isfinite(array).all():
        index = int(np.flatnonzero(~np.isfinite(array))[0])
        raise InvalidArgument(
            f"audio: expected finite samples, found {array[index]} at index {index}"
        )
    return np.ascontiguousarray(array)


def rgb_image(image: object) -> NDArray[np.uint8]:
    """Returns a picture as contiguous (height, width, 3) uint8 RGB; a view where it can be one.

    Raises:
        InvalidArgument: another type or shape.
    """
    array = _as_array(image, "image", ARRAY, "pass pixels as np.asarray(..., np.uint8)")
    if array.dtype != np.uint8:
        raise InvalidArgument(f"image: expected uint8 values 0..255, found {array.dtype}")
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InvalidArgument(
            f"image: expected (height, width, 3) RGB, found {array.shape}; "
            "convert grey pictures and pictures with transparency first"
        )
    return np.ascontiguousarray(array)


def token_ids(ids: object, vocab_size: int, name: str = "text") -> list[int]:
    """Returns token ids as a list; takes a sequence of integers or a 1-D integer array.

    Raises:
        InvalidArgument: not integers, or an id outside [0, vocab_size). `name` names the argument.
    """
    if isinstance(ids, Sequence) and not isinstance(ids, str | bytes | bytearray):
        try:
            items = list(ids)
        except Exception as error:  # whatever the sequence's own code raises
            raise InvalidArgument(
                f"{name}: expected integer token ids, found {type(ids).__name__}, whose items "
                f"cannot be read: {error!r}"
            ) from error
        if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in items):
            raise InvalidArgument(f"{name}: expected integer token ids, found {found(ids)}")
        values = [int(i) for i in items]
    else:
        if name in ENCODED:
            expected, remedy = "a string or token ids", "pass a str or a list of integers"
        else:
            expected, remedy = "token ids", "pass a list of integers"
        array = _as_array(ids, name, expected, remedy)
        if array.dtype.kind not in "iu":
            raise InvalidArgument(f"{name}: expected integer token ids, found {array.dtype}")
        if array.ndim != 1:
            raise InvalidArgument(f"{name}: expected (n,) token ids, found {array.shape}")
        values = [int(i) for i in array]
    for i in values:
        if not 0 <= i < vocab_size:
            raise InvalidArgument(f"{name}: expected token ids in [0, {vocab_size}), found {i}")
    return values


def checked_rate(sample_rate: object) -> int:
    """Returns a rate in Hz that sound can have here; takes NumPy's integers.

    Raises:
        InvalidArgument: not an integer, or out of bounds.
    """
    return integer(sample_rate, "sample_rate", MIN_RATE, MAX_RATE)


class Resampler:
    """One stream of sound, brought to 16 kHz with a constant delay.

    After n input samples exactly floor(n * 16000 / rate) samples have come out, so that a
    micro-turn of input is a micro-turn of output: the filter hands its output on in blocks, and a
    short lead of silence covers the most that it ever holds back (13 ms at 44.1 or 48 kHz, 30 ms at
    8 kHz). The output does not depend on how the input was cut.
    """

    def __init__(self, sample_rate: int) -> None:
        sample_rate = checked_rate(sample_rate)
        self.sample_rate = sample_rate
        # note: soxr's variable-rate filter at a constant rate: it holds back a third of what the
        # constant-rate one does, and still is clean to 110 dB.
        self._filter = soxr.ResampleStream(sample_rate, SAMPLE_RATE, 1, dtype="float32", vr=True)
        self._n_in = 0
        self._n_out = 0
        self._waiting = np.zeros(self._most_held_back(), dtype=np.float32)
        self._filter.clear()

    def push(self, samples: Samples) -> NDArray[np.float32]:
        """Takes (n,) samples at `sample_rate`; returns the samples at 16 kHz that are now due."""
        floats = samples.astype(np.float32, copy=False)
        if samples.dtype == np.int16:
            floats = floats * np.float32(INT16_SCALE)
        self._waiting = np.concatenate([self._waiting, self._filter.resample_chunk(floats)])
        self._n_in += len(samples)
        n_due = self._n_in * SAMPLE_RATE // self.sample_rate - self._n_out
        due, self._waiting = self._waiting[:n_due], self._waiting[n_due:]
        self._n_out += n_due
        return due

    def _most_held_back(self) -> int:
        """Feeds a quarter of a second of silence and watches how far the output lags."""
        piece = np.zeros(max(self.sample_rate // 1000, 1), dtype=np.float32)
        lag, n_in, n_out = 0.0, 0, 0
        while n_in < self.sample_rate // 4:
            n_out += len(self._filter.resample_chunk(piece))
            n_in += len(piece)
            lag = max(lag, n_in * SAMPLE_RATE / self.sample_rate - n_out)
        # The lag was looked at once per piece: in between it can be one piece larger.
        return int(lag + len(piece) * SAMPLE_RATE / self.sample_rate) + 1


def _as_array(value: object, name: str, expected: str, remedy: str) -> NDArray[Any]:
    """Views an array of any library as a NumPy array, without copying.

    expected, remedy: what the argument called `name` can be, and what to do with anything else.
    """
    if isinstance(value, np.ndarray):
        return np.asarray(value)  # without what a subclass does in its own way
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        # note: libraries refuse in their own ways: BufferError, RuntimeError, TypeError.
        except Exception as error:
            raise InvalidArgument(
                f"{name}: expected a tensor that NumPy can read in place, found "
                f"{type(value).__name__}: {error}; detach it and move it to the CPU"
            ) from error
    if hasattr(value, "__array_interface__") or hasattr(value, "__array__"):
        try:
            return np.asarray(value)
        except Exception as error:  # whatever the object's own code raises
            raise InvalidArgument(
                f"{name}: expected an array that NumPy can read, found "
                f"{type(value).__name__}: {error}; {remedy}"
            ) from error
    raise InvalidArgument(f"{name}: expected {expected}, found {type(value).__name__}; {remedy}")
