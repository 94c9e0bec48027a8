"""JSON from files that nobody vouches for: the checks that `json` alone does not make.

Owns reading a bounded file, parsing it without surprises, and showing a value in an error message.
Does not own what the keys mean: see `config.py` and `checkpoint.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from duplex_engine import arguments
from duplex_engine.errors import CheckpointError

__all__ = ["found", "parse_json_object", "read_json_object"]

MAX_JSON_BYTES = 64 * 1024 * 1024  # far above any real config or index; bounds hostile files


def found(value: object) -> str:
    """Returns a value of JSON as an error message shows it: in its spelling, short, printable."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return arguments.found(value)


def parse_json_object(raw: bytes, source: str) -> dict[str, Any]:
    """Parses UTF-8 JSON whose top level is an object; `source` names it in errors.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested too deeply, a key given twice in one object,
            a number JSON does not have (NaN), or a top level that is not an object.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{source}: expected valid JSON, found: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found {found(value)}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; raises CheckpointError as `parse_json_object` does."""
    try:
        n_bytes = path.stat().st_size
        if n_bytes > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON, found {n_bytes}"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_json_object(raw, str(path))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {found(twice)} twice in one object")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"the number {name}, which JSON does not have")
