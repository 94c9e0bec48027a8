"""Figures with their uncertainty."""

from __future__ import annotations

import math

import numpy as np
import pytest

from duplex_engine.evaluation.estimates import mean, quantile, rate, share


def test_a_share_has_wilsons_interval() -> None:
    # Newcombe (1998), table I, case 81/263: 0.2553 to 0.3662.
    estimate = share(81, 263)
    assert estimate.value == pytest.approx(81 / 263)
    assert (estimate.low, estimate.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert estimate.n == 263


def test_all_or_nothing_leaves_room_for_doubt() -> None:
    assert share(20, 20).high == pytest.approx(1)
    assert share(20, 20).low == pytest.approx(0.8389, abs=5e-5)  # Wilson: n / (n + z^2)
    assert share(0, 20).low == 0
    assert share(0, 20).high == pytest.approx(1 - 0.8389, abs=5e-5)


def test_without_cases_there_is_no_figure() -> None:
    for estimate in (share(0, 0), mean([]), quantile([[], []], 0.5), rate([0], [0.0])):
        assert math.isnan(estimate.value)
        assert estimate.n == 0


def test_one_stream_has_a_figure_and_no_interval() -> None:
    for estimate in (mean([3.0]), quantile([[], [1.0, 3.0, 5.0]], 0.5), rate([6], [2.0])):
        assert estimate.value == 3.0
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)


def test_quantiles_are_of_all_values() -> None:
    streams = [[1.0, 2.0], [], [3.0, 4.0, 100.0]]
    assert quantile(streams, 0.5).value == 3.0
    assert quantile(streams, 0.5).n == 5
    assert quantile(streams, 1.0).value == 100.0


def test_a_bootstrap_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(100):
        estimate = mean(rng.normal(3.0, 1.0, 40).tolist())
        inside += estimate.low <= 3.0 <= estimate.high
    # 95 % nominal; the bootstrap of 40 values is a little narrow. P(less than 85 | 0.93) < 0.5 %.
    assert inside >= 85


def test_a_rate_is_events_over_minutes() -> None:
    assert rate([1, 0, 2], [1.0, 2.0, 3.0]).value == pytest.approx(0.5)
    none = rate([0, 0], [2.0, 4.0])
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(3 / 6)  # the rule of three


def test_the_same_values_give_the_same_interval() -> None:
    assert quantile([[1.0, 5.0], [2.0]], 0.5) == quantile([[1.0, 5.0], [2.0]], 0.5)
