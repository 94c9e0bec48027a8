"""Cases of the router, the choice of experts and their sum (kernels/router.cu, moe.cu)."""

from __future__ import annotations

import numpy as np
from ptx.arguments import (
    BF16,
    CHOICE,
    F32,
    Combine,
    MoeConfig,
    PackedMatrix,
    Route,
    Router,
    packed,
    pad,
)
from ptx.device import UNIT, Device, check_close

SLICE = 128  # columns


def router(device: Device) -> None:
    """Two panels, three slices, the last one short, and more rows than a thread block has."""
    random = np.random.default_rng(9)
    n_out, n_in, n_rows, stride = 70, 304, 37, 128
    w, x = (random.integers(-8, 9, size=(n, n_in)).astype(np.float32) for n in (n_out, n_rows))
    rows = np.concatenate([x, np.full((n_rows, 16), np.nan, np.float32)], 1)
    rows[-1, :n_in] = 0.5  # an odd row
    n_slices = -(-n_in // SLICE)
    parts = device.out(np.full((n_slices, n_rows, stride), np.nan, np.float32))
    matrix = PackedMatrix(device.put(packed(w, F32)), n_out, n_in, F32)
    args = Router(matrix, device.rows(rows, BF16), n_rows, parts, stride)
    shared_bytes = 32 * 4 * (32 + 4) * 4
    device.launch("router/router_kernel", (2, n_slices, 2), 256, shared_bytes, args)
    for i, found in enumerate(device.get(parts)):
        columns = slice(i * SLICE, min((i + 1) * SLICE, n_in))
        assert (found == pad(rows[:, columns] @ w[:, columns].T, stride)).all()


def route(device: Device) -> None:
    """The best of 40 by sigmoid and bias, ties to the lower; two shared ones; weights to one.

    Logits are sums of three slices; those of the last row are no numbers.
    """
    random = np.random.default_rng(10)
    n_experts, n_shared, top_k, stride, scale, global_scale = 40, 2, 3, 64, 2.5, 1.25
    n_rows, n_all, n = 5, n_experts + n_shared, top_k + n_shared
    parts = np.full((3, n_rows, stride), np.nan, np.float32)
    parts[..., :n_all] = random.normal(size=(3, n_rows, n_all))
    parts[:, 1, :n_experts] = -1
    parts[:, 1, [7, 33, 39, 8]] = [[5], [-2], [1]]  # a tie: one of four stays out
    parts[:, 2, :n_experts] = -70  # all alike to float32: the bias decides
    parts[1, -1] = np.nan
    bias = 0.2 * random.normal(size=n_experts).astype(np.float32)
    bias[[7, 8, 33, 39]] = 0
    choices = device.out(np.full((n_rows, n), -1, np.int32).astype(CHOICE))
    config = MoeConfig(n_experts, n_shared, top_k, 16, scale)
    args = Route(
        config, device.put_late(parts), len(parts), n_rows * stride, stride, device.put(bias),
        global_scale, choices,
    )  # fmt: skip
    shared_bytes = n * (2 * 8 + 4) + (n_experts + n_all) * 4
    device.launch("router/route_kernel", (n_rows,), 64, shared_bytes, args)
    found = device.get(choices)
    wide = (parts[0] + parts[1] + parts[2]).astype(np.float64)[:-1]
    with np.errstate(over="ignore"):
        score = 1 / (1 + np.exp(-wide[:, :n_experts])) + bias
    best = np.sort(np.argsort(-score, axis=1, kind="stable")[:, :top_k], axis=1)
    shared = np.tile(np.arange(n_experts, n_all), (n_rows - 1, 1))
    chosen = np.concatenate([best, shared], 1)
    assert (found["expert"][:-1] == chosen).all()
    assert (found["expert"][-1] == [0, 1, 2, 40, 41]).all()
    assert np.isnan(found["weight"][-1]).all()
    log_weight = -np.logaddexp(0, -np.take_along_axis(wide, chosen, 1))
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    weight *= scale * global_scale / weight.sum(1, keepdims=True)
    check_close(found["weight"][:-1], weight, 4 * UNIT * weight + 1e-37)


def combine(device: Device) -> None:
    """Rows of experts by their weights."""
    random = np.random.default_rng(12)
    n_rows, per_row, width = 3, 4, 320
    down = random.normal(size=(n_rows * per_row, width)).astype(np.float32)
    choice = np.zeros((n_rows, per_row), CHOICE)
    choice["weight"] = random.random((n_rows, per_row))
    y = device.out(np.full((n_rows, width + 64), np.nan, np.float32))
    args = Combine(device.put_late(choice), per_row, device.put_late(down), width, y, width + 64)
    device.launch("moe/combine_kernel", (n_rows, 2), 64, 0, args)
    terms = choice["weight"][..., None].astype(np.float64) * down.reshape(n_rows, per_row, width)
    bound = 2 * per_row * UNIT * np.abs(terms).sum(1)
    check_close(device.get(y)[:, :width], terms.sum(1), bound)


CASES = {"router": router, "route": route, "combine": combine}
