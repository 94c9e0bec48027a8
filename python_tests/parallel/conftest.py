"""Fixtures of the tests of ranks: engines by their options, each loaded once."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from presets import EIGHT, LARGER

# The streams of the engine's tests, which run here on several ranks.
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from duplex_engine import Engine
from duplex_engine.models.random import write_random_checkpoint

Load = Callable[..., Engine]


@pytest.fixture(scope="session")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with all that there is to cut, and two layers that draft."""
    return write_random_checkpoint(tmp_path_factory.mktemp("larger"), LARGER, seed=5, mtp_layers=2)


@pytest.fixture(scope="session")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one with eight heads."""
    return write_random_checkpoint(tmp_path_factory.mktemp("eight"), EIGHT, seed=3)


@pytest.fixture
def address() -> str:
    """Of this machine, where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="session")
def load() -> Iterator[Load]:
    """load(path, **options): an engine with little memory, shared by all tests that ask for the
    same; all are closed in the end, with no page held."""
    engines: dict[str, Engine] = {}

    def get(path: str | Path, **options: Any) -> Engine:
        key = repr((str(path), sorted(options.items())))
        if key not in engines:
            # Every rank has all convolutions of the residual stream.
            memory = options.get("tensor_parallel", 1) * 2**26
            defaults = {"threads": 1, "memory": memory, "max_positions": 2048, "rewind_rows": 32}
            engines[key] = Engine.load(path, **defaults | options)
        return engines[key]

    yield get
    for engine in engines.values():
        stats = engine.stats
        engine.close()
        assert (stats["sessions"], stats["pages_used"], stats["pages_promised"]) == (0, 0, 0)
