"""Rows and the experts that they chose, for the cases of the experts' products in every format.

A launch has some of the experts and some of the rows. One expert has all of these rows, one every
other, most have none, and one that rows chose belongs to another launch.
"""

from __future__ import annotations

from ctypes import Structure

import numpy as np
from numpy.typing import NDArray
from ptx.arguments import BF16, CHOICE, F32, ExpertLinear, Floats, Rows
from ptx.device import Device

FIRST, N_EXPERTS, PER_ROW = 2, 7, 2
FIRST_ROW = 1  # of the launch
FEW_ROWS, MANY_ROWS = 3, 20  # a thread block for each pair, for each expert
STRIDE = 64  # of y


def chosen(n_rows: int) -> NDArray[np.int32]:
    """The experts of all rows, (FIRST_ROW + n_rows, PER_ROW)."""
    pattern = np.array([[4, 8], [1, 4]], np.int32)
    return pattern[np.arange(FIRST_ROW + n_rows) % 2]


def pairs(n_rows: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """What a launch computes: pairs of a row and an expert, and the number of each one's matrix."""
    matrix = chosen(n_rows).reshape(-1) - FIRST
    is_ours = (matrix >= 0) & (matrix < N_EXPERTS)
    is_ours[: FIRST_ROW * PER_ROW] = False
    return np.flatnonzero(is_ours), matrix[is_ours]


def multiply(
    device: Device,
    kernel: str,
    n_tiles: int,
    shared_bytes: int,
    matrices: tuple[Structure, int],
    x: Structure,
    n_rows: int,
    pairs_of_x: int,
    is_gated: bool = False,
) -> Floats:
    """Launches a kernel and gives back what it wrote for each of its pairs, and for no other.

    matrices: the first of them, and bytes from one to the next. pairs_of_x: that share a row of x.
    is_gated: activated rows in bfloat16.
    """
    choice = np.zeros((FIRST_ROW + n_rows, PER_ROW), CHOICE)
    choice["expert"] = chosen(n_rows)
    y = device.out_rows(choice.size, STRIDE, BF16 if is_gated else F32)
    none = Rows()
    args = ExpertLinear(
        matrices[0], matrices[1], FIRST, N_EXPERTS, device.put_late(choice), FIRST_ROW, n_rows,
        PER_ROW, pairs_of_x, x, 0 if is_gated else y.data, STRIDE, y if is_gated else none,
    )  # fmt: skip
    n_blocks = min(n_rows * PER_ROW, N_EXPERTS)
    room = n_rows * 8 + (n_rows + 1) * 4
    device.launch(kernel, (n_tiles, n_blocks), 256, shared_bytes + room, args)
    found = device.read(y)
    others = np.delete(found, pairs(n_rows)[0], 0)
    assert np.isnan(others).all()
    return found[pairs(n_rows)[0]]
