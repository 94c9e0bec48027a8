"""Cases of the products with int8 and int4 weights (kernels/linear_quantised.cu, pack.cu).

Codes and scales are computed here by the rules of docs/CHECKPOINT.md's int8 and int4; the sums of a
group are exact integers, and the groups are added in their order with one rounding each, so the
results are compared by value.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from ptx import experts
from ptx.arguments import (
    BF16,
    F32,
    INT4,
    INT8,
    Floats,
    Linear,
    Pack,
    PackedMatrix,
    PackShape,
    QuantiseRows,
    Rows,
    decode,
    encode,
    round_up,
    rounded,
)
from ptx.device import Case, Device
from ptx.operations import fused_float

CHUNK = 128  # columns
Codes = NDArray[np.int8]


def bits_of(dtype: int) -> int:
    """Of a code."""
    return 8 if dtype == INT8 else 4


def group_of(dtype: int) -> int:
    """Columns of a scale."""
    return 64 if dtype == INT8 else 32


def lay_out_rows(codes: Codes, scales: Floats) -> NDArray[np.uint8]:
    """Rows (n, columns of whole chunks) as the products read them: codes of a thread together."""
    n = len(codes)
    # (row, block of 64, instruction, thread, column)
    blocks = codes.reshape(n, -1, 2, 4, 8).transpose(0, 1, 3, 2, 4).reshape(n, -1)
    behind = scales.astype(np.float32).view(np.uint8)
    both = np.concatenate([np.ascontiguousarray(blocks).view(np.uint8), behind], 1)
    return np.pad(both, ((0, 0), (0, -both.shape[1] % 16)))


def lay_out(codes: Codes, scales: NDArray[np.uint16], dtype: int) -> NDArray[np.uint8]:
    """A matrix (outputs of whole panels, columns of whole chunks), scales (outputs, groups)."""
    n_out, n_in = codes.shape
    # (tile, half, g, chunk, block, instruction, t, quad, column)
    parts = codes.reshape(n_out // 16, 2, 8, n_in // CHUNK, 2, 2, 4, 2, 4)
    # -> (tile, chunk, block, instruction, g, t, quad, half, column)
    parts = parts.transpose(0, 3, 4, 5, 2, 6, 7, 1, 8)
    if dtype == INT4:
        low, high = (parts[:, :, :, i].view(np.uint8) & 15 for i in range(2))
        parts = low | high << 4
    words = np.ascontiguousarray(parts).view(np.uint8).reshape(n_out // 16, n_in // CHUNK, -1)
    pairs = scales.reshape(n_out // 16, 2, 8, n_in // CHUNK, -1).transpose(0, 3, 2, 4, 1)
    behind = np.ascontiguousarray(pairs).view(np.uint8).reshape(*words.shape[:2], -1)
    return np.concatenate([words, behind], 2)


def quantise_rows(x: Floats, dtype: int) -> tuple[Codes, Floats]:
    """Codes and scales by the rule: round(x * 127 / max |x|) of each group."""
    full = np.pad(x, ((0, 0), (0, -x.shape[1] % CHUNK))).reshape(len(x), -1, group_of(dtype))
    largest = np.abs(full).max(2)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    codes = np.rint(full * inverse[..., None].astype(np.float32)).astype(np.int8)
    return codes.reshape(len(x), -1), largest / np.float32(127)


def random_matrix(
    random: np.random.Generator, n_out: int, n_in: int, dtype: int
) -> tuple[Codes, NDArray[np.uint16]]:
    """Codes and scales of n_out by n_in weights, zero where they only pad."""
    low, high = (-127, 128) if dtype == INT8 else (-8, 8)
    codes = np.zeros((round_up(n_out, 64), round_up(n_in, CHUNK)), np.int8)
    codes[:n_out, :n_in] = random.integers(low, high, size=(n_out, n_in))
    scales = np.zeros((codes.shape[0], codes.shape[1] // group_of(dtype)), np.uint16)
    used = -(-n_in // group_of(dtype))
    scales[:n_out, :used] = encode(random.normal(size=(n_out, used)), BF16)
    return codes, scales


def product(
    x: tuple[Codes, Floats], w: tuple[Codes, NDArray[np.uint16]], n_in: int, dtype: int
) -> Floats:
    """Rows times outputs: exact sums of a group, then one chain of fused additions."""
    group = group_of(dtype)
    sums = np.zeros((len(x[0]), len(w[0])), np.float32)
    for g in range(-(-n_in // group)):
        part = slice(g * group, (g + 1) * group)
        exact = x[0][:, part].astype(np.int32) @ w[0][:, part].astype(np.int32).T
        scaled = exact.astype(np.float32) * decode(w[1][:, g])
        sums = fused_float(scaled, np.broadcast_to(x[1][:, g, None], sums.shape), sums)
    return sums


def put_rows(device: Device, x: tuple[Codes, Floats], dtype: int) -> object:
    """Quantised rows, and a row behind them that is none."""
    stored = lay_out_rows(*x)
    behind = np.full((1, stored.shape[1]), 0xFF, np.uint8)
    return Rows(device.put_late(np.concatenate([stored, behind])), stored.shape[1], dtype)


def shared_bytes(dtype: int) -> int:
    """Group sums of a round of eight warps, a chunk each, for 256 threads."""
    return 8 * (CHUNK // group_of(dtype)) * 256 * 4


def rows(device: Device, dtype: int, source: int) -> None:
    """Numbers of every size, a group of zeros, a part of a chunk."""
    random = np.random.default_rng(20)
    n_rows, n_in = 3, 592
    x = random.normal(size=(n_rows, n_in)) * 2.0 ** random.integers(-20, 20, size=(n_rows, n_in))
    x[1, 64:128] = 0
    x = rounded(x, source)
    expected = lay_out_rows(*quantise_rows(x, dtype))
    out = device.out(np.full_like(expected, 0xFF))
    args = QuantiseRows(
        device.rows(np.pad(x, ((0, 0), (0, 8))), source), n_in, out, expected.shape[1]
    )
    name = f"linear_quantised/quantise_rows_kernel<{bits_of(dtype)}>"
    device.launch(name, (n_rows, 2), 256, 0, args)
    used = 640 + 640 // group_of(dtype) * 4
    assert (device.get(out)[:, :used] == expected[:, :used]).all()


def linear(device: Device, dtype: int, n_in: int, n_rows: int) -> None:
    """A product, divided or not."""
    random = np.random.default_rng(21)
    n_out = 70
    x = quantise_rows(random.normal(size=(n_rows, n_in)).astype(np.float32), dtype)
    w = random_matrix(random, n_out, n_in, dtype)
    stride = round_up(n_out, 64)
    matrix = PackedMatrix(device.put(lay_out(*w, dtype)), n_out, n_in, dtype)
    for divisor in (np.float32(1), np.float32(3.5)):
        y = device.out(np.full((n_rows, stride), np.nan, np.float32))
        args = Linear(matrix, put_rows(device, x, dtype), n_rows, y, stride, divisor)
        name = f"linear_quantised/linear_quantised_kernel<{bits_of(dtype)}>"
        grid = (stride // 16, -(-n_rows // 64))
        device.launch(name, grid, 256, shared_bytes(dtype), args)
        assert (device.get(y) == product(x, w, n_in, dtype) / divisor).all()


def expert_linear(device: Device, dtype: int, n_rows: int) -> None:
    """Matrices of experts, with the rows and then with a row for each pair."""
    random = np.random.default_rng(22)
    n_in, n_out = 176, experts.STRIDE
    w = [random_matrix(random, n_out, n_in, dtype) for _ in range(experts.N_EXPERTS)]
    matrices = np.stack([lay_out(*one, dtype).reshape(-1) for one in w])
    first = PackedMatrix(device.put(matrices), n_out, n_in, dtype)
    pairs, of_expert = experts.pairs(n_rows)
    for pairs_of_x in (experts.PER_ROW, 1):
        n_x = (experts.FIRST_ROW + n_rows) * experts.PER_ROW // pairs_of_x
        x = quantise_rows(random.normal(size=(n_x, n_in)).astype(np.float32), dtype)
        name = f"linear_quantised/expert_quantised_kernel<{bits_of(dtype)}>"
        y = experts.multiply(
            device, name, n_out // 16, shared_bytes(dtype), (first, matrices.shape[1]),
            put_rows(device, x, dtype), n_rows, pairs_of_x,
        )  # fmt: skip
        for e in set(of_expert):
            chosen = pairs[of_expert == e] // pairs_of_x
            expected = product((x[0][chosen], x[1][chosen]), w[e], n_in, dtype)
            assert (y[of_expert == e] == expected).all()


def quantise_weights(w: Floats, dtype: int) -> tuple[Codes, NDArray[np.uint16]]:
    """Codes and scales of a matrix (whole panels, whole chunks): int8 by the largest value, its
    scale rounded up; int4 by least squares from the codes that give the largest value -8."""
    full = w.reshape(len(w), -1, group_of(dtype))
    if dtype == INT8:
        bits = (np.abs(full).max(2) / np.float32(127)).view(np.uint32)
        scales, low, high = ((bits + 0xFFFF) >> 16).astype(np.uint16), -127, 127
    else:
        at = np.abs(full).argmax(2)[..., None]
        first = nearest(full, np.take_along_axis(full, at, 2)[..., 0] / np.float32(-8), -8, 7)
        up, down = np.zeros((2, *full.shape[:2]), np.float32)
        for i in range(full.shape[2]):  # in order, each sum rounded
            up += full[..., i] * first[..., i].astype(np.float32)
            down += (first[..., i].astype(np.int32) ** 2).astype(np.float32)
        with np.errstate(invalid="ignore"):
            scales = encode(np.where(down > 0, up / down, np.float32(0)), BF16)
        low, high = -8, 7
    return nearest(full, decode(scales), low, high).reshape(len(w), -1), scales


def nearest(values: Floats, scales: Floats, low: int, high: int) -> Codes:
    """The codes next to values by the scales of their groups."""
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales).astype(np.float32)
    return np.rint(np.clip(values * inverse[..., None], low, high)).astype(np.int8)


def pack(device: Device, dtype: int) -> None:
    """Columns in groups of 13, padded to 16; a second source behind the first."""
    random = np.random.default_rng(23)
    group, n_groups, first, second = 13, 11, 37, 44
    w = rounded(random.normal(size=(first + second, n_groups * group)), BF16)
    full = np.zeros((128, round_up(n_groups * 16, CHUNK)), np.float32)
    for g in range(n_groups):
        full[: len(w), g * 16 : g * 16 + group] = w[:, g * group : (g + 1) * group]
    expected = lay_out(*quantise_weights(full, dtype), dtype)
    destination = device.out(np.zeros_like(expected))
    for source_dtype, begin, end in ((F32, 0, first), (BF16, first, first + second)):
        source = encode(np.pad(w[begin:end], ((0, 0), (0, 2))), source_dtype)
        args = Pack(
            device.put(source), source_dtype, end - begin, source.shape[1],
            PackShape(n_groups * group, group, 16, dtype), n_groups * 16, begin, destination,
        )  # fmt: skip
        name = f"pack/pack_quantised_kernel<{bits_of(dtype)}>"
        device.launch(name, (end - begin, 1), 128, 0, args)
    assert (device.get(destination) == expected).all()


CASES: dict[str, Case] = {
    f"{name}-{kind}": partial(run, dtype=dtype, **options)
    for kind, dtype in (("int8", INT8), ("int4", INT4))
    for name, run, options in (
        ("quantise_rows_of_float32", rows, {"source": F32}),
        ("quantise_rows_of_bfloat16", rows, {"source": BF16}),
        ("linear_few_rows", linear, {"n_in": 48, "n_rows": 5}),
        # Two rounds of the warps, the second not for all; a second batch of rows.
        ("linear_long", linear, {"n_in": 1296, "n_rows": 20}),
        ("linear_many_rows", linear, {"n_in": 144, "n_rows": 67}),
        ("expert_linear_few_rows", expert_linear, {"n_rows": experts.FEW_ROWS}),
        ("expert_linear", expert_linear, {"n_rows": 67}),
        ("pack", pack, {}),
    )
}
