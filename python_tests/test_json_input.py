"""JSON of files that nobody vouches for: refused with the file's name, whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from duplex_engine.errors import CheckpointError
from duplex_engine.json_input import read_json_object


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b'{"a": NaN}', "NaN, which JSON does not have"),
        (b'{"a": ' + b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'\xff{"a": 1}', "utf-8"),
        (b"[1]", r"a JSON object, found \[1\]"),
    ],
)
def test_refuses_bad_json(tmp_path: Path, raw: bytes, problem: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=problem):
        read_json_object(path)
