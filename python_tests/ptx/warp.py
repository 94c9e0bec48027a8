"""What the lanes of a warp do together, in the words of the PTX manual: shfl.sync and mma.sync."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from ptx.program import UnsupportedPtx

WARP = 32  # lanes


def source_lanes(
    kind: str, argument: NDArray[np.uint32], clamp: NDArray[np.uint32]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The lane that each lane reads, and whether that is inside its group; (n_warps, 32) each.

    `clamp` holds the last lane of a group (bits 0 to 4) and a mask of the group (bits 8 to 12).
    """
    lane = np.arange(32)
    bits, bound = argument.astype(np.int64) & 31, clamp.astype(np.int64) & 31
    group = clamp.astype(np.int64) >> 8 & 31
    last = (lane & group) | (bound & ~group)
    if kind == "down":
        source = lane + bits
    elif kind == "bfly":
        source = lane ^ bits
    elif kind == "idx":
        source = (lane & group) | (bits & ~group)
    else:
        raise UnsupportedPtx(f"shfl.sync.{kind}")
    is_inside = source <= last
    return np.where(is_inside, source, lane), is_inside


def bfloat16_pairs(words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The two numbers of each word, the lower half first."""
    halves = np.stack([words << 16, words & np.uint32(0xFFFF0000)], -1)
    return np.ascontiguousarray(halves).view(np.float32).astype(np.float64)


def multiply_fragments(
    a: NDArray[np.uint32], b: NDArray[np.uint32], c: NDArray[np.float32]
) -> NDArray[np.float32]:
    """mma.m16n8k16 in bfloat16: c + A B of every warp, rounded to float32 once.

    a (n_warps, 32, 4), b (n_warps, 32, 2), c and the result (n_warps, 32, 4). Element i of a lane's
    A, of eight, is row g for i in 0, 1, 4, 5 and row g + 8 else, column 2 t + i % 2, plus 8 from
    i = 4 on; of its B, of four, row 2 t + i % 2, plus 8 from i = 2 on, and column g; of its C, row
    g for i < 2 and row g + 8 else, column 2 t + i % 2; where g = lane / 4 and t = lane % 4.
    """
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    n = len(a)
    of_a, of_b = bfloat16_pairs(a).reshape(n, 32, 8), bfloat16_pairs(b).reshape(n, 32, 4)
    left, right = np.zeros((n, 16, 16)), np.zeros((n, 16, 8))
    for i in range(8):
        left[:, g + (0 if i in (0, 1, 4, 5) else 8), 2 * t + i % 2 + (8 if i >= 4 else 0)] = of_a[
            :, :, i
        ]
    for i in range(4):
        right[:, 2 * t + i % 2 + (8 if i >= 2 else 0), g] = of_b[:, :, i]
    product = left @ right
    rows = [(g + (0 if i < 2 else 8), 2 * t + i % 2) for i in range(4)]
    sums = [
        c[:, :, i].astype(np.float64) + product[:, row, col] for i, (row, col) in enumerate(rows)
    ]
    return np.stack(sums, -1).astype(np.float32)


def multiply_integer_fragments(
    a: NDArray[np.uint32],
    b: NDArray[np.uint32],
    c: NDArray[np.int32],
    codes: tuple[type[np.generic], type[np.generic]],
) -> NDArray[np.int32]:
    """mma.m16n8k32 in int8, or uint8, of A and of B: c + A B of every warp, exactly.

    a (n_warps, 32, 4), b (n_warps, 32, 2), c and the result (n_warps, 32, 4). Byte i of a lane's A,
    of sixteen, is row g for i in 0 to 3 and 8 to 11 and row g + 8 else, column 4 t + i % 4, plus 16
    from i = 8 on; of its B, of eight, row 4 t + i % 4, plus 16 from i = 4 on, and column g; C as
    above.
    """
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    n = len(a)
    of_a = np.ascontiguousarray(a).view(codes[0]).reshape(n, 32, 16)
    of_b = np.ascontiguousarray(b).view(codes[1]).reshape(n, 32, 8)
    left, right = np.zeros((n, 16, 32), np.int32), np.zeros((n, 32, 8), np.int32)
    for i in range(16):
        left[:, g + (0 if i % 8 < 4 else 8), 4 * t + i % 4 + (16 if i >= 8 else 0)] = of_a[:, :, i]
    for i in range(8):
        right[:, 4 * t + i % 4 + (16 if i >= 4 else 0), g] = of_b[:, :, i]
    product = left @ right
    parts = [product[:, g + (0 if i < 2 else 8), 2 * t + i % 2] for i in range(4)]
    return np.stack(parts, -1) + c
