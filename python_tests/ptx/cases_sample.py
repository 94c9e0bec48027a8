"""Cases of the choice of tokens (kernels/sample.cu)."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from ptx.arguments import SAMPLE_ROW, Floats, Sample
from ptx.device import Case, Device

THREADS = 64  # the kernel takes any power of two to 1024
# The two halves of a histogram, sums, the list, the best of each thread, what was found, a number.
SHARED_BYTES = 2 * 4 * 8 * 1028 + 2 * 8 * 1024 + 8 * 8192 + 8 * 1024 + 24 + 8
WEIGHT_BITS = 40
BEST = 0x7FFFFFFF
POLYNOMIAL = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
    5.0000001201e-1,
)  # fmt: skip


def ranks(logits: Floats, best: np.float32, temperature: np.float32) -> NDArray[np.int64]:
    """Larger is better; what is not a number is worst."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = ((logits - best) / temperature).astype(np.float32)
    worse = (scaled.view(np.uint32) & BEST).astype(np.int64)
    return np.where(logits == best, BEST, BEST - worse)


def weights(of_ranks: NDArray[np.int64]) -> list[int]:
    """exp in float32, unfused, as whole numbers."""
    x = -((BEST - of_ranks).astype(np.uint32)).view(np.float32)
    is_seen = x > np.float32(-28)
    x = np.where(is_seen, x, np.float32(0))
    n = np.trunc(x * np.float32(1.44269504088896341) - np.float32(0.5)).astype(np.float32)
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.full_like(r, POLYNOMIAL[0])
    for term in POLYNOMIAL[1:]:
        p = p * r + np.float32(term)
    p = (r * r * p + r) + np.float32(1)
    found = np.ldexp(p.astype(np.float64), n.astype(np.int64) + WEIGHT_BITS)
    return [int(w) if seen else 0 for w, seen in zip(found, is_seen, strict=True)]


def random_bits(seed: int, position: int) -> int:
    """splitmix64."""
    mask = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15 * (position + 1)) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


def choose(logits: Floats, row: np.void) -> int:
    """The token by definition: all ids sorted, the kept ones added up."""
    best = np.nanmax(logits)
    if row["temperature"] == 0:
        return int(np.flatnonzero(logits == best)[0])
    of = ranks(logits, best, row["temperature"])
    weight = weights(of)
    order = sorted(range(len(logits)), key=lambda i: (-of[i], i))
    if row["top_k"] > 0:
        order = order[: row["top_k"]]
    if row["top_p"] < 1:
        share = int(row["top_p"] * np.float32(2**32)) << 32
        wanted = max(share * sum(weight[i] for i in order) >> 64, 1)
        mass = np.cumsum([weight[i] for i in order], dtype=object)
        order = order[: next(n for n, m in enumerate(mass, 1) if m >= wanted)]
    left = random_bits(int(row["seed"]), int(row["position"])) * sum(weight[i] for i in order) >> 64
    for i in sorted(order):
        if left < weight[i]:
            return i
        left -= weight[i]
    raise AssertionError("the weights do not add up")


def sample(device: Device, logits: Floats, ways: list[tuple[float, int, float]]) -> None:
    """Rows of one vocabulary, each chosen from in its own way."""
    rows = np.zeros(len(ways), SAMPLE_ROW)
    for i, (temperature, top_k, top_p) in enumerate(ways):
        rows[i] = (2**63 + i, temperature, top_k, top_p, 0, 1 << 33 | i)
    stride = logits.size // 16 * 16 + 16
    padded = np.full((len(ways), stride), 1e30, np.float32)
    padded[:, : logits.size] = logits
    tokens = device.out(np.full(len(ways), -1, np.int32))
    args = Sample(device.put(padded), stride, logits.size, len(ways), device.put(rows), tokens)
    device.launch("sample/sample_kernel", (len(ways),), THREADS, SHARED_BYTES, args)
    expected = [choose(logits, row) for row in rows]
    assert device.get(tokens).tolist() == expected


def flat() -> Floats:
    """So many that are nearly alike, or alike, that they are not listed."""
    return np.random.default_rng(7).integers(0, 99, 8400).astype(np.float32) / 64


def last() -> Floats:
    """The last bin of ids ends behind the row, where nothing may be read."""
    logits = np.full(32785, -20, np.float32)
    logits[-1] = 0
    return logits


def varied() -> Floats:
    """Logits with ties among the best, and some that are not numbers."""
    logits = np.random.default_rng(6).normal(size=150).astype(np.float32) * 2
    logits[[20, 70, 130]] = logits.max()
    logits[[3, 149]] = np.nan
    logits[8] = -np.inf
    return logits


CASES: dict[str, Case] = {
    "sample-greedy": partial(sample, logits=varied(), ways=[(0.0, 0, 1.0)]),
    "sample-temperature": partial(
        sample, logits=varied(), ways=[(1.0, 0, 1.0), (3.0, 0, 1.0), (1e-40, 0, 1.0)]
    ),
    "sample-kept": partial(sample, logits=varied(), ways=[(3.0, 2, 1.0), (2.0, 40, 0.6)]),
    "sample-last": partial(sample, logits=last(), ways=[(1.0, 0, 1.0)]),
    "sample-not-listed": partial(sample, logits=flat(), ways=[(1.0, 8300, 0.99)]),
}
