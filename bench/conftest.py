"""Options and fixtures of the benchmark suites.

    pytest bench                                       # quick: shape S, bfloat16, 1k and 4k rows
    pytest bench/bench_micro_turn.py --shapes M --bits bf16,int8,int4 --contexts 1024,32768

`--benchmark-json FILE` writes pytest-benchmark's results; `compare.py` reads them too.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import pytest
from rich.console import Console
from rich.table import Table

from bench.shapes import DEFAULT_CACHE, SHAPES, Shape
from duplex_engine import Engine

GETTER: TypeAlias = Callable[..., Engine]
RESERVE = 1 << 30  # bytes that a suite leaves to others
NOTES: pytest.StashKey[list[tuple[str, ...]]] = pytest.StashKey()  # rows of the last table


def _shapes(names: str) -> list[Shape]:
    """The shapes of a comma-separated list."""
    unknown = [name for name in names.split(",") if name not in SHAPES]
    if unknown:
        raise ArgumentTypeError(f"expected of {', '.join(SHAPES)}, found {unknown[0]!r}")
    return [SHAPES[name] for name in names.split(",")]


def pytest_addoption(parser: pytest.Parser) -> None:
    """What to measure; every option takes several values, by commas."""
    group = parser.getgroup("duplex benchmarks")
    group.addoption(
        "--shapes", default="S", type=_shapes, help=f"{', '.join(SHAPES)} (bench/shapes.py)"
    )
    group.addoption("--bits", default="bf16", help="weight formats: bf16, int8, int4")
    group.addoption(
        "--contexts", default="1024,4096", help="rows in the cache before a measurement"
    )
    group.addoption("--models", default=str(DEFAULT_CACHE), help="folder of models, made once")


def pytest_configure(config: pytest.Config) -> None:
    """No notes yet."""
    config.stash[NOTES] = []


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a row to the table at the end: what, how long, and what that means."""

    def add(*columns: str) -> None:
        request.config.stash[NOTES].append(columns)

    return add


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of notes, which pytest-benchmark's own cannot show."""
    rows = config.stash[NOTES]
    if not rows:
        return
    table = Table("case", "time", "meaning", title="against the limits of the same minute")
    for row in rows:
        table.add_row(*row)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    terminalreporter.write_line(capture.get())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Turns the options into parameters of the tests that ask for them."""
    config = metafunc.config
    options = {
        "shape": config.getoption("--shapes"),
        "bits": config.getoption("--bits").split(","),
        "context": [int(n) for n in config.getoption("--contexts").split(",")],
    }
    for name, values in options.items():
        if name in metafunc.fixturenames:
            ids = [getattr(value, "name", str(value)) for value in values]
            metafunc.parametrize(name, values, ids=ids, scope="module")


@pytest.fixture(scope="module")
def get_engine(request: pytest.FixtureRequest) -> Iterator[GETTER]:
    """Loads an engine, or gives the one loaded last where nothing differs."""
    loaded: list[tuple[tuple[Any, ...], Engine]] = []

    def get(shape: Shape, bits: str, max_positions: int, n_sessions: int = 1) -> Engine:
        key = (shape.name, bits, max_positions, n_sessions)
        if loaded and loaded[0][0] == key:
            return loaded[0][1]
        while loaded:
            loaded.pop()[1].close()
        memory = (256 << 20) + int(1.1 * n_sessions * shape.tape_bytes(max_positions))
        weights = (1 << 30) if shape.name == "S" else (4 << 30)
        available = psutil.virtual_memory().available - RESERVE
        if memory + weights > available:
            needed, free = (memory + weights) / 2**30, available / 2**30
            pytest.skip(f"needs about {needed:.1f} GiB, {free:.1f} are free")
        options: dict[str, Any] = {} if bits == "bf16" else {"weights": bits}
        engine = Engine.load(
            shape.checkpoint(Path(request.config.getoption("--models"))),
            dtype="bfloat16",
            memory=memory,
            max_positions=max_positions,
            **options,
        )
        loaded.append((key, engine))
        return engine

    yield get
    while loaded:
        loaded.pop()[1].close()
