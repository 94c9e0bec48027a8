"""Keys and values as int8 codes by the rules of docs/CHECKPOINT.md, and how they lie in a panel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ptx.arguments import BLOCK, Floats, decode

Bytes = NDArray[np.uint8]
SCALES = 2 * BLOCK  # bytes in front of a panel's codes


def from_above(x: Floats) -> NDArray[np.uint16]:
    """The least bfloat16 that is no less than x."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(x < 0, bits >> 16, (bits + 0xFFFF) >> 16).astype(np.uint16)


@dataclass
class Coded:
    """Rows (..., n) as codes, the scale of each row as a bfloat16 (of values: its logarithm), and
    what both stand for."""

    codes: NDArray[np.int8]
    scales: NDArray[np.uint16]
    numbers: Floats


def scale_of(x: Floats) -> Floats:
    """What makes the largest of each row 127."""
    return np.maximum(np.abs(x).max(-1) / np.float32(127), np.float32(2.0**-60))


def codes_of(x: Floats, unit: Floats) -> NDArray[np.int8]:
    """The nearest codes."""
    inverse = (np.float32(1) / unit).astype(np.float32)
    return np.rint(x * inverse[..., None]).astype(np.int8)


def coded_keys(x: Floats) -> Coded:
    scales = from_above(scale_of(x))
    codes = codes_of(x, decode(scales))
    return Coded(codes, scales, codes * decode(scales)[..., None])


def coded_values(x: Floats) -> Coded:
    scales = from_above(np.log2(scale_of(x).astype(np.float64)).astype(np.float32))
    unit = np.exp2(decode(scales).astype(np.float64)).astype(np.float32)
    codes = codes_of(x, unit)
    return Coded(codes, scales, codes * unit[..., None])


def key_places(n: int) -> NDArray[np.int64]:
    """(64, n): the byte of each code behind the scales, four channels of a position together."""
    return np.arange(BLOCK * n).reshape(n // 4, BLOCK, 4).transpose(1, 0, 2).reshape(BLOCK, n)


def value_places(n: int) -> NDArray[np.int64]:
    """The same for values: four positions of a channel together."""
    return np.arange(BLOCK * n).reshape(BLOCK // 4, n, 4).transpose(0, 2, 1).reshape(BLOCK, n)


def panel(coded: Coded, *, is_value: bool) -> Bytes:
    """Up to 64 rows of a block and head; 0xFF wherever there is none."""
    n_rows, n = coded.codes.shape
    out = np.full(SCALES + BLOCK * n, 0xFF, np.uint8)
    out[:SCALES].view(np.uint16)[:n_rows] = coded.scales
    stored = coded.codes.view(np.uint8) if is_value else (coded.codes.view(np.uint8) ^ 0x80)
    places = value_places(n) if is_value else key_places(n)
    out[SCALES + places[:n_rows]] = stored
    return out
