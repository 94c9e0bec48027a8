"""Plain arguments: what is taken, and that a refusal names the bound or the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from duplex_engine.arguments import (
    MAX_INT32,
    MAX_UINT64,
    file_path,
    integer,
    output_path,
    parse_bytes,
    sampling_options,
)
from duplex_engine.checkpoint import Checkpoint
from duplex_engine.errors import InvalidArgument


def test_integers_of_numpy_are_taken() -> None:
    assert integer(np.int64(5), "n") == 5
    assert integer(MAX_UINT64, "n", high=MAX_UINT64) == MAX_UINT64
    assert parse_bytes(np.int64(2**20)) == 2**20  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (2**64, {"high": MAX_UINT64}, f"from 0 to {MAX_UINT64}, found {2**64}"),
        (2**40, {"high": MAX_INT32}, f"from 0 to {MAX_INT32}, found {2**40}"),
        (7, {"low": 1, "high": 6}, "from 1 to 6, found 7"),
        (2**63, {}, f"from 0 to {2**63 - 1}, found {2**63}"),
        (-1, {}, "of at least 0, found -1"),
        ("5", {"low": 1}, "of at least 1, found '5'"),
        (True, {}, "of at least 0, found True"),
    ],
)
def test_other_integers_are_refused(value: object, bounds: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^n: expected an integer {message}$"):
        integer(value, "n", **bounds)


def test_sampling_options_name_their_bounds() -> None:
    for name, value, high in (("seed", 2**64, MAX_UINT64), ("top_k", 2**31, MAX_INT32)):
        options: Any = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, name: value}
        with pytest.raises(InvalidArgument, match=f"{name}: .* to {high}, found {value}"):
            sampling_options(**options)


def test_paths() -> None:
    assert file_path("a/b", "path") == output_path(Path("a/b"), "path") == Path("a/b")
    assert file_path("/", "path") == Path("/")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (123, r"a string or a pathlib\.Path, found 123"),
        (None, r"a string or a pathlib\.Path, found None"),
        (b"x", r"a string or a pathlib\.Path, found b'x'"),
        ("a\0b", "a path that a file can have, found .*null characters"),
        ("\ud800", "a path that a file can have, found .*lone surrogates"),
        ("", "the name of a file, found '.'"),
        ("/", "the name of a file, found '/'"),
    ],
)
def test_other_paths_are_refused(value: object, message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^path: expected .*{message}"):
        output_path(value, "path")


@pytest.mark.parametrize("value", [123, None, b"x", ["reference"], "a\0b"])
def test_a_checkpoint_is_opened_by_a_path(value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^checkpoint folder: expected a "):
        Checkpoint.open(value)
