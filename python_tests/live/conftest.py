"""Fixtures of the live tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_scene import smallest_checkpoint

from duplex_engine import Engine


@pytest.fixture(scope="package")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A very small random model; each test leaves its pages as it found them."""
    folder = smallest_checkpoint(tmp_path_factory.mktemp("smallest"))
    with Engine.load(
        folder, memory="96MiB", max_positions=2_000, threads=1, rewind_rows=200
    ) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _nothing_left(engine: Engine) -> Iterator[None]:
    yield
    assert (engine.stats["sessions"], engine.stats["pages_used"]) == (0, 0)
