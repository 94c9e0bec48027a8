"""What all Python tests share: quiet libraries on one thread, Hypothesis profiles, the oracle."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from devices import DEVICE
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import InklingForConditionalGeneration

    from duplex_engine import Engine

# By the environment, so that tests without the oracle need not wait for torch. The models are too
# small for a second thread to help, and with one the oracle always adds in the same order.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

# Some tests press Ctrl-C; whatever a shell starts in the background is deaf to it.
signal.signal(signal.SIGINT, signal.default_int_handler)

if DEVICE != "cpu":
    from duplex_engine import Engine

    Engine.load.__func__.__kwdefaults__["device"] = DEVICE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what other devices are not asked."""
    for item in items:
        if DEVICE != "cpu" and item.get_closest_marker("cpu"):
            item.add_marker(pytest.mark.skip(reason="of the CPU backend alone"))


def pytest_exception_interact(node: pytest.Item, report: pytest.TestReport) -> None:
    """On a GPU, whose time may be over before the report, a failure is told at once."""
    if DEVICE != "cpu":
        node.config.pluginmanager.get_plugin("terminalreporter").write_line(report.longreprtext)


settings.register_profile(
    "default",
    deadline=None,  # a shared machine stalls now and then
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("fuzz", settings.get_profile("default"), max_examples=2000)
settings.register_profile("quick", settings.get_profile("default"), max_examples=2)
settings.load_profile("default")


@pytest.fixture(scope="session")
def oracle_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[Path, InklingForConditionalGeneration]]:
    """`oracle_checkpoint(name, dtype="float32", seed=0)` -> (folder, model).

    The folder holds `oracle.CONFIGS[name]` saved in `dtype`; the model computes in float32 with the
    weights as saved. They are built once a run: change neither, other tests use the same.
    """
    import oracle
    import torch

    @functools.cache
    def checkpoint(
        name: str, dtype: str = "float32", seed: int = 0
    ) -> tuple[Path, InklingForConditionalGeneration]:
        folder = tmp_path_factory.mktemp(f"{name}-{dtype}-")
        return folder, oracle.build(name, folder, seed, getattr(torch, dtype))

    return checkpoint


@pytest.fixture(scope="session")
def reference() -> Iterator[Engine]:
    """The model that comes with the package; its vocabulary is 296 words."""
    from duplex_engine import Engine

    with Engine.load("reference", threads=1, memory="256MiB") as engine:
        yield engine


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random interaction checkpoint, whose tokenizer can spell anything."""
    from duplex_engine.models import write_random_checkpoint

    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), seed=2)


@pytest.fixture
def tiny(tiny_folder: Path) -> Iterator[Engine]:
    """An engine of that checkpoint, for one test."""
    from duplex_engine import Engine

    with Engine.load(tiny_folder, threads=1, memory="64MiB") as engine:
        yield engine


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """The test may leave no thread of the package behind."""
    yield
    deadline = time.monotonic() + 5
    while names := [t.name for t in threading.enumerate() if t.name.startswith("duplex_engine")]:
        assert time.monotonic() < deadline, names
        time.sleep(0.005)
