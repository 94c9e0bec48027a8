"""What the tests of the background share: engines, and a look at what is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from duplex_engine import Engine
from duplex_engine.models import write_random_checkpoint


@pytest.fixture(scope="session")
def reference() -> Iterator[Engine]:
    """The model that comes with the package; its vocabulary is 296 words."""
    with Engine.load("reference", threads=1, memory="256MiB") as engine:
        yield engine


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=2)


@pytest.fixture
def tiny(tiny_folder: Path) -> Iterator[Engine]:
    """A random interaction model, which can spell anything."""
    with Engine.load(tiny_folder, threads=1, memory="64MiB") as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test may leave a thread of the background behind."""
    yield
    deadline = time.monotonic() + 5
    while names := [t.name for t in threading.enumerate() if t.name.startswith("duplex_engine")]:
        assert time.monotonic() < deadline, names
        time.sleep(0.005)
