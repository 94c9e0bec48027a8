"""What our all-reduce should take: the page has the model's numbers, its steps hang together."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from duplex_engine.evaluation.machines import MACHINES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> Any:
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("bench.gpu_model.all_reduce")
    finally:
        sys.path.remove(str(ROOT))


def test_the_page_has_the_numbers_of_the_model(model: Any) -> None:
    page = (ROOT / "docs/GPU.md").read_text()
    for row in model.rows():
        assert re.search(re.escape("| " + " | ".join(row) + " |"), page), row


def test_an_all_reduce_of_more_bytes_or_ranks_takes_longer(model: Any) -> None:
    for machine in MACHINES.values():
        for n_ranks in (2, 4, 8):
            times = [
                model.fastest(machine, n_ranks, 4096 * n).us for n in (4, 8, 40, 80, 256, 1024)
            ]
            assert times == sorted(times)
        by_ranks = [model.fastest(machine, n, 1 << 20).us for n in (2, 4, 8)]
        assert by_ranks == sorted(by_ranks)


def test_two_exchanges_move_fewer_bytes_and_take_another_trip(model: Any) -> None:
    machine = MACHINES["GB300"]
    one, two = (steps(machine, 8, 327_680) for steps in (model.one_exchange, model.two_exchanges))
    assert two.link == pytest.approx(one.link / 4)
    assert two.trips > one.trips
    assert two.us < one.us
    assert model.fastest(machine, 8, 16_384).exchanges == 1
