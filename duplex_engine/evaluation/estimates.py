"""Figures with their uncertainty: shares, quantiles, rates, each with count and 95 % interval.

Owns the formulas. Shares have Wilson's interval, which is sensible at 0 and 100 %; everything else
is bootstrapped over streams, because what happens within one stream is not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "bootstrap", "mean", "quantile", "rate", "share"]

Z_95 = 1.959964  # standard normal, two-sided 95 %
N_ROUNDS = 1000
SEED = 0
ZERO_EVENTS_HIGH = 3.0  # upper 95 % limit of a Poisson mean after counting none: -ln 0.05


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, the limits of its 95 % interval, and the number of cases it rests on.

    All three are NaN where there were no cases, the limits where one stream alone says nothing of
    how others would differ.
    """

    value: float
    low: float
    high: float
    n: int


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def share(n_hits: int, n: int) -> Estimate:
    """`n_hits` of `n`, in [0, 1], with Wilson's interval."""
    if n == 0:
        return NOTHING
    p, z2 = n_hits / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(p, max(centre - half, 0.0), min(centre + half, 1.0), n)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of one value per stream."""
    array = np.asarray(values, np.float64)
    if not len(array):
        return NOTHING
    return bootstrap(len(array), lambda rows: float(array[rows].mean()), len(array))


def quantile(streams: Sequence[Sequence[float]], q: float) -> Estimate:
    """The quantile `q` in [0, 1] of all values; `streams` holds those of each stream."""
    arrays = [np.asarray(values, np.float64) for values in streams if len(values)]
    n = sum(len(values) for values in arrays)
    if n == 0:
        return NOTHING
    return bootstrap(
        len(arrays),
        lambda rows: float(np.quantile(np.concatenate([arrays[i] for i in rows]), q)),
        n,
    )


def rate(counts: Sequence[int], durations_min: Sequence[float]) -> Estimate:
    """Events per minute from the count and the minutes of each stream; `n` is all events."""
    count, minutes = np.asarray(counts), np.asarray(durations_min, np.float64)
    total_min = float(minutes.sum())
    if total_min == 0:
        return NOTHING
    if count.sum() == 0:
        return Estimate(0.0, 0.0, ZERO_EVENTS_HIGH / total_min, 0)
    return bootstrap(
        len(count),
        lambda rows: float(count[rows].sum() / max(minutes[rows].sum(), 1e-9)),
        int(count.sum()),
    )


def bootstrap(n_streams: int, statistic: Callable[[NDArray[np.int64]], float], n: int) -> Estimate:
    """The statistic of all streams, with limits from streams drawn with replacement.

    statistic: of the streams with these indices (any number of times each).
    """
    value = statistic(np.arange(n_streams))
    if n_streams == 1:
        return Estimate(value, math.nan, math.nan, n)
    rng = np.random.default_rng(SEED)
    draws = [statistic(rng.integers(0, n_streams, n_streams)) for _ in range(N_ROUNDS)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value, float(low), float(high), n)
