"""Cases of the routing and combining of experts (kernels/moe.cu)."""

from __future__ import annotations

import numpy as np
from ptx.arguments import CHOICE, Combine, Group, MoeConfig, Route, ToFloat, rounded
from ptx.device import UNIT, Device, both, check_close


def to_float(device: Device, dtype: int) -> None:
    """Rows of either type as float32."""
    x = rounded(np.random.default_rng(9).normal(size=(3, 288)), dtype)
    out = device.out(np.full((3, 272), np.nan, np.float32))
    args = ToFloat(device.rows(x, dtype), 272, out)
    device.launch("moe/to_float_kernel", (3, 2), 256, 0, args)
    assert (device.get(out) == x[:, :272]).all()


def route(device: Device) -> None:
    """The best of 40 by sigmoid and bias, ties to the lower; two shared ones; weights to one."""
    random = np.random.default_rng(10)
    n_experts, n_shared, top_k, stride, scale, global_scale = 40, 2, 3, 64, 2.5, 1.25
    logits = np.zeros((4, stride), np.float32)
    logits[:, : n_experts + n_shared] = random.normal(size=(4, n_experts + n_shared))
    logits[1, [7, 33, 39, 8]] = 4  # a tie: one of four stays out
    logits[2, :n_experts] = -200  # all alike to float32: the bias decides
    bias = 0.2 * random.normal(size=n_experts).astype(np.float32)
    bias[[7, 8, 33, 39]] = 0
    choices = device.out(np.full((4, top_k + n_shared), -1, np.int32).astype(CHOICE))
    config = MoeConfig(n_experts, n_shared, top_k, 16, scale)
    args = Route(config, device.put_late(logits), stride, device.put(bias), global_scale, choices)
    device.launch("moe/route_kernel", (4,), 32, n_experts * 4, args)
    found = device.get(choices)
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        score = 1 / (1 + np.exp(-wide[:, :n_experts])) + bias
    best = np.sort(np.argsort(-score, axis=1, kind="stable")[:, :top_k], axis=1)
    shared = np.tile(np.arange(n_experts, n_experts + n_shared), (4, 1))
    chosen = np.concatenate([best, shared], 1)
    assert (found["expert"] == chosen).all()
    log_weight = -np.logaddexp(0, -np.take_along_axis(wide, chosen, 1))
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    weight *= scale * global_scale / weight.sum(1, keepdims=True)
    check_close(found["weight"], weight, 4 * UNIT * weight + 1e-37)


def group(device: Device) -> None:
    """Pairs sorted by expert, rows ascending; an expert without rows."""
    random = np.random.default_rng(11)
    n_all, per_row, n_rows = 300, 3, 20
    choice = np.zeros((n_rows, per_row), CHOICE)
    for row in choice:
        row["expert"] = np.sort(random.choice(12, per_row, replace=False)) * 27
    n_pairs = choice.size
    choices = device.out(choice)
    pair_row = device.out(np.full(n_pairs, -1, np.int32))
    begin = device.out(np.full(n_all + 1, -1, np.int32))
    args = Group(n_all, n_pairs, per_row, choices, pair_row, begin)
    device.launch("moe/group_kernel", (1,), 256, 0, args)
    expert = choice["expert"].reshape(-1)
    order = np.argsort(expert, kind="stable")
    assert (device.get(pair_row) == order // per_row).all()
    assert (device.get(begin) == np.searchsorted(np.sort(expert), np.arange(n_all + 1))).all()
    place = np.empty(n_pairs, np.int32)
    place[order] = np.arange(n_pairs)
    assert (device.get(choices)["place"].reshape(-1) == place).all()


def combine(device: Device) -> None:
    """Rows of experts by their weights."""
    random = np.random.default_rng(12)
    n_rows, per_row, width = 3, 4, 320
    down = random.normal(size=(n_rows * per_row, width)).astype(np.float32)
    choice = np.zeros((n_rows, per_row), CHOICE)
    choice["place"] = random.permutation(n_rows * per_row).reshape(n_rows, per_row)
    choice["weight"] = random.random((n_rows, per_row))
    y = device.out(np.full((n_rows, width + 64), np.nan, np.float32))
    args = Combine(device.put_late(choice), per_row, device.put_late(down), width, y, width + 64)
    device.launch("moe/combine_kernel", (n_rows,), 256, 0, args)
    terms = choice["weight"][..., None].astype(np.float64) * down[choice["place"]]
    bound = 2 * per_row * UNIT * np.abs(terms).sum(1)
    check_close(device.get(y)[:, :width], terms.sum(1), bound)


CASES = {**both("to_float", to_float), "route": route, "group": group, "combine": combine}
