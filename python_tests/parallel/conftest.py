"""Fixtures of the tests of ranks: engines by their options, each loaded once."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The streams of the engine's tests, which run here on several ranks.
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from duplex_engine import Engine
from duplex_engine.models.random import Preset, write_random_checkpoint

# What four ranks can be cut from: experts, both kinds of layer, fewer key/value heads than ranks.
LARGER = Preset(
    vocab_size=320,
    d_model=96,
    d_ff=256,
    layers="ld gm lm gd",
    heads=(8, 2),
    local_heads=(4, 4),
    d_head=20,
    d_rel=5,
    rel_extent=48,
    window=24,
    patch_size=8,
    vision_layers=2,
    moe={"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
)

# What eight ranks can be cut from.
EIGHT = Preset(
    vocab_size=320,
    d_model=24,
    d_ff=32,
    layers="lm gd",
    heads=(8, 2),
    local_heads=(8, 8),
    d_head=4,
    d_rel=3,
    rel_extent=40,
    window=24,
    patch_size=8,
    vision_layers=1,
    moe={"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
)

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
