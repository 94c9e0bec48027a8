"""Cases of the matrix products in float32, bfloat16, MXFP8 and NVFP4, and the packing.

The numbers are small integers, so sums of products are exact in any order and the results are
compared by value.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from ptx import experts
from ptx.arguments import (
    BF16,
    E2M1,
    F32,
    MXFP8,
    NVFP4,
    Floats,
    Linear,
    MatrixScale,
    Pack,
    PackedMatrix,
    PackShape,
    encode,
    nvfp4,
    packed,
    round_up,
)
from ptx.device import Device, both

TILE_ROWS = 8
DIVISOR = np.float32(3.5)
NAMES = {BF16: "bf16", MXFP8: "mxfp8", NVFP4: "nvfp4"}
TABLE_BYTES = {NVFP4: 2 * 128 * 16}  # in front of the sums in shared memory
# Of matrices in NVFP4: scales, and whether they divide.
MATRIX_SCALES = ((-3.0, False), (0.75, False), (0.5, True))


def integers(random: np.random.Generator, *shape: int) -> Floats:
    """From -8 to 8."""
    return random.integers(-8, 9, size=shape).astype(np.float32)


def matrix_of(random: np.random.Generator, n_out: int, n_in: int, dtype: int) -> Floats:
    """Integers; in MXFP8 times powers of two, for every 32 columns another; numbers of NVFP4."""
    w = integers(random, n_out, n_in)
    if dtype not in (MXFP8, NVFP4):
        return w
    group = 32 if dtype == MXFP8 else 16
    if dtype == NVFP4:
        w = random.choice(E2M1, size=w.shape) * np.sign(w) * 1.5
        w[:, ::16] = 9 * random.choice([-1, 1], size=w[:, ::16].shape)  # code 6 in each group
    powers = 2.0 ** random.integers(-3, 4, size=(n_out, -(-n_in // group)))
    return (w * np.repeat(powers, group, 1)[:, :n_in]).astype(np.float32)


def pack(device: Device, dtype: int) -> None:
    """Columns in groups of 5, padded to 16; a second source behind the first."""
    random = np.random.default_rng(6)
    group, n_groups, first, second = 5, 3, 37, 44
    w = integers(random, first + second, n_groups * group)
    padded = np.zeros((first + second, n_groups * 16), np.float32)
    for g in range(n_groups):
        padded[:, g * 16 : g * 16 + group] = w[:, g * group : (g + 1) * group]
    expected = packed(padded, dtype)
    destination = device.out(np.zeros_like(expected))
    for source_dtype, begin, end in ((F32, 0, first), (BF16, first, first + second)):
        source = encode(np.pad(w[begin:end], ((0, 0), (0, 2))), source_dtype)
        shape = PackShape(n_groups * group, group, 16, dtype)
        args = Pack(
            device.put(source), source_dtype, end - begin, source.shape[1], shape, n_groups * 16,
            begin, destination,
        )  # fmt: skip
        name = "pack/pack_mxfp8_kernel" if dtype == MXFP8 else "pack/pack_kernel"
        device.launch(name, (end - begin, 1), 128, 0, args)
    assert (device.get(destination) == expected).all()


def pack_nvfp4(device: Device) -> None:
    """Codes as a file has them, every other row of it, behind each other; scales of either sign."""
    random = np.random.default_rng(10)
    first, second, n_in = 48, 37, 56
    w = matrix_of(random, first + second, 64, NVFP4)
    w[:, n_in:] = 0
    expected = packed(w, NVFP4, (0.5, True))
    destination = device.out(np.zeros_like(expected))
    codes, scales = nvfp4(w, (0.5, True))
    # A negative scale over turned signs is the same, but for the columns that are none.
    turned = random.random(scales.shape) < 0.5
    scales = scales + np.uint8(128) * turned
    codes = (codes ^ 8 * np.repeat(turned, 16, 1)).astype(np.uint8)[:, :n_in]
    pairs = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    for begin, end in ((0, first), (first, first + second)):
        n = end - begin
        args = Pack(
            device.put(np.repeat(pairs[begin:end], 2, 0)), NVFP4, n, 2 * n_in,
            PackShape(n_in, n_in, 64, NVFP4), 64, begin, destination,
            device.put(np.repeat(scales[begin:end].astype(np.uint8), 2, 0)), 2 * scales.shape[1],
            MatrixScale(0.5, True),
        )  # fmt: skip
        device.launch("pack/pack_nvfp4_kernel", (n, 1), 128, 0, args)
    assert (device.get(destination) == expected).all()


def linear(device: Device, n_tiles: int, n_in: int, n_rows: int, dtype: int = BF16) -> None:
    """In float32 (n_tiles 0), or by the kernel for so many tiles of bfloat16 rows."""
    random = np.random.default_rng(7)
    n_out = 70
    w, x = matrix_of(random, n_out, n_in, dtype), integers(random, n_rows, n_in)
    stride = round_up(n_out, 64)
    for divisor in (np.float32(1), DIVISOR):
        y = device.out(np.full((n_rows, stride), np.nan, np.float32))
        matrix = PackedMatrix(device.put(packed(w, dtype)), n_out, n_in, dtype)
        behind = np.full((1, n_in), np.nan, np.float32)  # a row that is none
        rows = device.rows(np.concatenate([x, behind]), min(dtype, BF16))
        args = Linear(matrix, rows, n_rows, y, stride, divisor)
        if n_tiles:
            grid = (stride // 16, -(-n_rows // (n_tiles * TILE_ROWS)))
            shared = 4 * 8 * n_tiles * TILE_ROWS * 16 + TABLE_BYTES.get(dtype, 0)
            name = NAMES[dtype]
            device.launch(f"linear_{name}/linear_{name}_kernel<{n_tiles}>", grid, 256, shared, args)
        else:
            device.launch("linear/linear_f32_kernel", (stride // 64, -(-n_rows // 8)), 256, 0, args)
        expected = (x @ w.T) / divisor
        assert (device.get(y)[:, :n_out] == expected).all()
        assert not device.get(y)[:, n_out:].any()


def linear_large(device: Device, side: int, n_in: int, n_out: int, n_rows: int) -> None:
    """In squares of outputs by rows."""
    random = np.random.default_rng(9)
    w, x = integers(random, n_out, n_in), integers(random, n_rows, n_in)
    stride = round_up(n_out, 64)
    for divisor in (np.float32(1), DIVISOR):
        y = device.out(np.full((n_rows, stride), np.nan, np.float32))
        matrix = PackedMatrix(device.put(packed(w, BF16)), n_out, n_in, BF16)
        args = Linear(matrix, device.rows(x, BF16), n_rows, y, stride, divisor)
        grid = (-(-n_out // side), -(-n_rows // side))
        shared = 4 * 2 * side * 64 + 4 * side * side
        device.launch(f"linear_large/linear_large_kernel<{side}>", grid, 2 * side, shared, args)
        assert (device.get(y)[:, :n_out] == (x @ w.T) / divisor).all()
        assert not device.get(y)[:, n_out:].any()


def expert_linear(device: Device, dtype: int, n_rows: int) -> None:
    """Matrices of experts, with the rows and then with a row for each pair."""
    random = np.random.default_rng(8)
    n_in, n_out = 48, experts.STRIDE
    w = np.stack([matrix_of(random, n_out, n_in, dtype) for _ in range(experts.N_EXPERTS)])
    scales = [MATRIX_SCALES[i % len(MATRIX_SCALES)] for i in range(experts.N_EXPERTS)]
    packed_each = zip(w, scales, strict=True)
    matrices = np.stack([packed(one, dtype, scale).reshape(-1) for one, scale in packed_each])
    first = PackedMatrix(device.put(matrices), n_out, n_in, dtype)
    kind = NAMES.get(dtype)
    kernel = f"linear_{kind}/expert_{kind}_kernel" if kind else "linear/expert_f32_kernel"
    n_tiles, shared = (n_out // 16, 4 * 8 * 256 + TABLE_BYTES.get(dtype, 0)) if kind else (1, 0)
    pairs, of_expert = experts.pairs(n_rows)
    for pairs_of_x in (experts.PER_ROW, 1):
        x = integers(random, (experts.FIRST_ROW + n_rows) * experts.PER_ROW // pairs_of_x, n_in)
        y = experts.multiply(
            device, kernel, n_tiles, shared, (first, matrices.shape[1] * matrices.itemsize),
            device.rows(x, min(dtype, BF16)), n_rows, pairs_of_x,
        )  # fmt: skip
        assert (y == np.einsum("pi,poi->po", x[pairs // pairs_of_x], w[of_expert])).all()


CASES = {
    **both("pack", pack),
    "pack-mxfp8": partial(pack, dtype=MXFP8),
    "pack-nvfp4": pack_nvfp4,
    "linear-float32": partial(linear, n_tiles=0, n_in=48, n_rows=15, dtype=F32),
    "linear_few-float32": partial(linear, n_tiles=0, n_in=112, n_rows=3, dtype=F32),
    **{
        # As many rows as two thread blocks take, less one; a reduction with a tail.
        f"linear_{n * TILE_ROWS}_rows-{kind}": partial(
            linear, n_tiles=n, n_in=48, n_rows=2 * n * TILE_ROWS - 1, dtype=dtype
        )
        for kind, dtype in (("bfloat16", BF16), ("mxfp8", MXFP8), ("nvfp4", NVFP4))
        for n in (1, 2, 3, 4, 8)
    },
    # More steps than the warps have in flight.
    "linear_long-bfloat16": partial(linear, n_tiles=1, n_in=1072, n_rows=3),
    "linear_long-mxfp8": partial(linear, n_tiles=1, n_in=1072, n_rows=3, dtype=MXFP8),
    "linear_long-nvfp4": partial(linear, n_tiles=1, n_in=1072, n_rows=3, dtype=NVFP4),
    # More steps than parts, fewer than stages; half a square without outputs, rows behind the last.
    "linear_large_64-bfloat16": partial(linear_large, side=64, n_in=304, n_out=70, n_rows=67),
    "linear_large_128-bfloat16": partial(linear_large, side=128, n_in=48, n_out=150, n_rows=67),
    **{
        f"{name}-{kind}": partial(expert_linear, dtype=dtype, n_rows=n_rows)
        for kind, dtype in (
            ("float32", F32),
            ("bfloat16", BF16),
            ("mxfp8", MXFP8),
            ("nvfp4", NVFP4),
        )
        for name, n_rows in (
            ("expert_linear_few_rows", experts.FEW_ROWS),
            ("expert_linear", experts.MANY_ROWS),
        )
    },
}
