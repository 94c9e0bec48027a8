"""Cases of the products that activate gates and ups in pairs, in every format of weights.

Sums are exact or rounded as the kernel rounds them; SiLU is compared in double precision.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from ptx import cases_quantised, experts
from ptx.arguments import (
    BF16,
    F32,
    INT4,
    INT8,
    MXFP8,
    NVFP4,
    Floats,
    Linear,
    Pack,
    PackedMatrix,
    PackShape,
    encode,
    packed,
    paired,
)
from ptx.cases_linear import NAMES, TABLE_BYTES, TILE_ROWS, integers, matrix_of
from ptx.device import BF16_UNIT, UNIT, Case, Device, check_close

UNSCALED = 2.0**-6  # so that gates are neither all nor nothing
OF_GATES, OF_UPS = (0.75 * UNSCALED, False), (0.5 / UNSCALED, True)  # scales in NVFP4
KINDS = {"bfloat16": BF16, "mxfp8": MXFP8, "nvfp4": NVFP4, "int8": INT8, "int4": INT4}


def check_activated(found: Floats, sums: Floats) -> None:
    """Rows in bfloat16 of sums of gates, and of ups behind them; nothing behind the columns."""
    width = sums.shape[1] // 2
    gates, ups = sums[:, :width].astype(np.float64), sums[:, width:]
    expected = gates / (1 + np.exp(-np.maximum(gates, -87.3))) * ups
    check_close(found[:, :width], expected, np.abs(expected) * (12 * UNIT + BF16_UNIT) + 1e-37)
    assert np.isnan(found[:, width:]).all()


def plain_matrix(
    random: np.random.Generator, width: int, n_in: int, dtype: int
) -> tuple[Floats, NDArray[np.generic]]:
    """Gates and ups, and how they lie in pairs."""
    w = matrix_of(random, 2 * width, n_in, dtype) * np.float32(UNSCALED)
    return w, packed(paired(w), dtype, OF_GATES, OF_UPS)


def linear(device: Device, dtype: int, n_tiles: int, width: int, n_in: int, n_rows: int) -> None:
    """By the kernel for so many tiles of bfloat16 rows."""
    random = np.random.default_rng(31)
    w, stored = plain_matrix(random, width, n_in, dtype)
    x = integers(random, n_rows, n_in)
    behind = np.full((1, n_in), np.nan, np.float32)  # a row that is none
    out = device.out_rows(n_rows, width + 16, BF16)
    args = Linear(
        PackedMatrix(device.put(stored), 2 * width, n_in, dtype, True),
        device.rows(np.concatenate([x, behind]), BF16), n_rows, 0, 0, 1, 1, 0, out,
    )  # fmt: skip
    grid = (width // 8, -(-n_rows // (n_tiles * TILE_ROWS)))
    shared = 4 * 8 * n_tiles * TILE_ROWS * 16 + TABLE_BYTES.get(dtype, 0)
    name = f"linear_{NAMES[dtype]}/linear_{NAMES[dtype]}_kernel<{n_tiles}>"
    device.launch(name, grid, 256, shared, args)
    check_activated(device.read(out), x @ w.T)


def linear_large(device: Device, side: int, width: int, n_in: int, n_rows: int) -> None:
    """In squares of outputs by rows."""
    random = np.random.default_rng(32)
    w, stored = plain_matrix(random, width, n_in, BF16)
    x = integers(random, n_rows, n_in)
    out = device.out_rows(n_rows, width + 16, BF16)
    matrix = PackedMatrix(device.put(stored), 2 * width, n_in, BF16, True)
    args = Linear(matrix, device.rows(x, BF16), n_rows, 0, 0, 1, 1, 0, out)
    grid = (-(-2 * width // side), -(-n_rows // side))
    shared = 4 * 2 * side * 64 + 4 * side * side
    device.launch(f"linear_large/linear_large_kernel<{side}>", grid, 2 * side, shared, args)
    check_activated(device.read(out), x @ w.T)


def quantised_matrix(
    random: np.random.Generator, width: int, n_in: int, dtype: int
) -> tuple[tuple[NDArray[np.int8], NDArray[np.uint16]], NDArray[np.uint8]]:
    """Codes and scales of gates and ups, and how they lie in pairs."""
    codes, scales = cases_quantised.random_matrix(random, 2 * width, n_in, dtype)
    scales[: 2 * width] = encode(random.normal(size=(2 * width, scales.shape[1])) / 1024, BF16)
    used = slice(0, 2 * width)
    laid = codes.copy(), scales.copy()
    for of in laid:
        of[used] = paired(of[used])
    return (codes[used], scales[used]), cases_quantised.lay_out(*laid, dtype)


def linear_quantised(device: Device, dtype: int, n_rows: int) -> None:
    """Gates and ups are sums of different warps."""
    random = np.random.default_rng(33)
    width, n_in = 48, 176
    w, stored = quantised_matrix(random, width, n_in, dtype)
    x = cases_quantised.quantise_rows(random.normal(size=(n_rows, n_in)).astype(np.float32), dtype)
    out = device.out_rows(n_rows, width + 16, BF16)
    args = Linear(
        PackedMatrix(device.put(stored), 2 * width, n_in, dtype, True),
        cases_quantised.put_rows(device, x, dtype), n_rows, 0, 0, 1, 1, 0, out,
    )  # fmt: skip
    name = f"linear_quantised/linear_quantised_kernel<{cases_quantised.bits_of(dtype)}>"
    grid = (width // 8, -(-n_rows // 64))
    device.launch(name, grid, 256, cases_quantised.shared_bytes(dtype), args)
    check_activated(device.read(out), cases_quantised.product(x, w, n_in, dtype))


def expert_linear(device: Device, dtype: int, n_rows: int) -> None:
    """Matrices of experts, over the rows that chose them."""
    random = np.random.default_rng(34)
    n_in, width = 48, experts.STRIDE // 2 - 8
    pairs, of_expert = experts.pairs(n_rows)
    numbers = range(experts.N_EXPERTS)
    n_x = experts.FIRST_ROW + n_rows
    of_pairs = pairs // experts.PER_ROW
    if dtype in (INT8, INT4):
        coded = [quantised_matrix(random, width, n_in, dtype) for _ in numbers]
        matrices = np.stack([stored.reshape(-1) for _, stored in coded])
        x = cases_quantised.quantise_rows(random.normal(size=(n_x, n_in)).astype(np.float32), dtype)
        rows = cases_quantised.put_rows(device, x, dtype)
        shared = cases_quantised.shared_bytes(dtype)
        sums = np.concatenate(
            [
                cases_quantised.product(
                    (x[0][row : row + 1], x[1][row : row + 1]), coded[e][0], n_in, dtype
                )
                for row, e in zip(of_pairs, of_expert, strict=True)
            ]
        )
        kernel = f"linear_quantised/expert_quantised_kernel<{cases_quantised.bits_of(dtype)}>"
    else:
        plain = [plain_matrix(random, width, n_in, dtype) for _ in numbers]
        matrices = np.stack([stored.reshape(-1) for _, stored in plain])
        values = integers(random, n_x, n_in)
        rows, shared = device.rows(values, BF16), 4 * 8 * 256 + TABLE_BYTES.get(dtype, 0)
        w = np.stack([one for one, _ in plain])
        sums = np.einsum("pi,poi->po", values[of_pairs], w[of_expert])
        kernel = f"linear_{NAMES[dtype]}/expert_{NAMES[dtype]}_kernel"
    first = PackedMatrix(device.put(matrices), 2 * width, n_in, dtype, True)
    found = experts.multiply(
        device, kernel, width // 8, shared, (first, matrices.shape[1] * matrices.itemsize), rows,
        n_rows, experts.PER_ROW, is_gated=True,
    )  # fmt: skip
    check_activated(found, sums)


def pack(device: Device) -> None:
    """Gates, and ups behind them, of fewer outputs than their padding."""
    random = np.random.default_rng(35)
    width, padded, n_in = 20, 32, 48
    w = integers(random, 2, width, n_in)
    expected = packed(
        paired(np.pad(w, ((0, 0), (0, padded - width), (0, 0))).reshape(-1, n_in)), BF16
    )
    destination = device.out(np.zeros_like(expected))
    shape = PackShape(n_in, n_in, n_in, BF16, padded)
    for i in range(2):
        args = Pack(device.put(w[i]), F32, width, n_in, shape, n_in, i * padded, destination)
        device.launch("pack/pack_kernel", (width, 1), 128, 0, args)
    assert (device.get(destination) == expected).all()


CASES: dict[str, Case] = {
    "pack_gated": pack,
    **{
        f"linear_gated_{n_rows}_rows-{kind}": partial(
            linear, dtype=KINDS[kind], n_tiles=n_tiles, width=48, n_in=n_in, n_rows=n_rows
        )
        for kind, n_tiles, n_in, n_rows in (
            ("bfloat16", 1, 304, 3),
            ("bfloat16", 8, 48, 67),
            ("mxfp8", 1, 48, 3),
            ("nvfp4", 2, 48, 13),
        )
    },
    "linear_gated_large_64": partial(linear_large, side=64, width=48, n_in=304, n_rows=67),
    "linear_gated_large_128": partial(linear_large, side=128, width=80, n_in=48, n_rows=67),
    **{
        f"linear_gated_{n_rows}_rows-{kind}": partial(
            linear_quantised, dtype=KINDS[kind], n_rows=n_rows
        )
        for kind, n_rows in (("int8", 3), ("int4", 67))
    },
    **{
        f"expert_gated-{kind}": partial(expert_linear, dtype=KINDS[kind], n_rows=n_rows)
        for kind, n_rows in (
            ("bfloat16", experts.MANY_ROWS),
            ("mxfp8", experts.FEW_ROWS),
            ("nvfp4", experts.MANY_ROWS),
            ("int8", 67),  # more than a thread block takes at once
            ("int4", experts.FEW_ROWS),
        )
    },
}
