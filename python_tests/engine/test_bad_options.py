"""Wrong options of `Engine.load` and `open_session`: an InvalidArgument that names the option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from random_models import load, write

from duplex_engine import BackendUnavailable, DuplexError, InvalidArgument

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dense"), "dense")


@pytest.mark.parametrize("options", [
    {"max_positions": 0}, {"max_positions": -5}, {"max_positions": 1.5}, {"max_positions": "9"},
    {"max_positions": 2**70}, {"max_positions": True}, {"seed": -1}, {"seed": "x"},
    {"temperature": None}, {"temperature": float("inf")}, {"top_k": 0.5}, {"top_p": -1},
])  # fmt: skip
def test_wrong_options_of_a_session(folder: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with load(folder) as engine:
        before = engine.stats
        with pytest.raises(InvalidArgument, match=f"{name}: expected"):
            engine.open_session(**options)
        assert engine.stats == before


@pytest.mark.cpu
@pytest.mark.parametrize("options", [
    {"threads": -1}, {"threads": 1.5}, {"threads": 10**6}, {"memory": 0}, {"memory": -1},
    {"memory": 10**30}, {"memory": "9" * 400}, {"memory": "1 banana"}, {"max_positions": 0},
    {"max_positions": -1}, {"max_positions": 2**70}, {"max_batch_rows": 0},
    {"max_batch_rows": 10**6}, {"max_batch_rows": 2**40}, {"rewind_rows": -1},
    {"weights": "int2"}, {"weights": 8}, {"dtype": "float16"}, {"dtype": 16},
    {"device": "abacus"}, {"device": 0}, {"isa": "sparc"},
    {"isa": 512}, {"progress": 1},
])  # fmt: skip
def test_wrong_options_of_an_engine(folder: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InvalidArgument, match=f"{name}: expected"):
        load(folder, **options)


def test_more_memory_than_can_be_counted(folder: Path) -> None:
    with pytest.raises(DuplexError):
        load(folder, memory=10**18)


@pytest.mark.cpu
def test_backends_that_are_not_there(folder: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"backend 'cuda': .*device=\"cpu\""):
        load(folder, device="cuda")
    with pytest.raises((InvalidArgument, BackendUnavailable)):
        load(folder, device="cuda", isa="sparc")
