"""Plain arguments (counts, numbers, names, paths, functions), checked before they are needed.

The core checks what a value means; here it is made sure that the value fits the core's type, and
that a function is one while there is a caller to be told: so a wrong one is an InvalidArgument like
any other. Arrays are the business of `arrays.py`.
"""

from __future__ import annotations

import operator
import os
import re
import reprlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from duplex_engine.errors import InvalidArgument

__all__ = [
    "MAX_INT32",
    "MAX_INT64",
    "MAX_NUMBER",
    "MAX_UINT64",
    "check_callable",
    "file_path",
    "found",
    "integer",
    "number",
    "output_path",
    "parse_bytes",
    "position_limit",
    "positive",
    "sampling_options",
    "text",
    "wait_seconds",
]

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
MAX_UINT64 = 2**64 - 1
MAX_NUMBER = 1e9  # seconds or milliseconds: in microseconds they still fit the core's integers
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = 120  # a tensor's name is shown whole


def found(value: object) -> str:
    """Returns `value` as an error message shows it: short, printable."""
    try:
        return _SHORT.repr(value)
    except Exception:  # an integer of thousands of digits, or an object that has no spelling
        return f"a value of type {type(value).__name__}"


def integer(value: object, name: str, low: int = 0, high: int = MAX_INT64) -> int:
    """Returns `value` as an int; takes NumPy's integers, refuses booleans.

    Raises:
        InvalidArgument: not an integer from `low` to `high`. `name` names the argument.
    """
    try:
        result = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        result = None
    if result is None or isinstance(value, bool) or not low <= result <= high:
        # The bound that every count has is named only to whom it matters.
        is_named = high != MAX_INT64 or (result is not None and result > high)
        bounds = f"from {low} to {high}" if is_named else f"of at least {low}"
        raise InvalidArgument(f"{name}: expected an integer {bounds}, found {found(value)}")
    return result


def position_limit(value: object) -> int:
    """The option `max_positions` as the core takes it, 0 for None; raises InvalidArgument."""
    return 0 if value is None else integer(value, "max_positions", low=1)


def number(value: object, name: str) -> float:
    """Returns `value` as a float; raises InvalidArgument if it is no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgument(f"{name}: expected a number, found {found(value)}") from None


def positive(value: object, name: str) -> float:
    """Returns `value` as a float above 0 and below `MAX_NUMBER`; raises InvalidArgument."""
    result = number(value, name)
    if not 0 < result < MAX_NUMBER:
        raise InvalidArgument(
            f"{name}: expected more than 0 and less than {MAX_NUMBER:g}, found {found(value)}"
        )
    return result


def wait_seconds(value: object, name: str) -> float:
    """Returns `value` as seconds to wait, 0 or less for not at all; raises InvalidArgument."""
    result = number(value, name)
    if not result < MAX_NUMBER:  # nor NaN
        raise InvalidArgument(
            f"{name}: expected less than {MAX_NUMBER:g} seconds, found {found(value)}"
        )
    return result


def check_callable(value: object, name: str) -> None:
    """Raises InvalidArgument if `value` cannot be called. `name` names the argument."""
    if not callable(value):
        raise InvalidArgument(f"{name}: expected a callable, found {found(value)}")


def text(value: object, name: str) -> str:
    """Returns `value` if it is a string; raises InvalidArgument otherwise."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{name}: expected a string, found {found(value)}")
    return value


def file_path(value: object, name: str) -> Path:
    """Returns `value` as a path; takes strings and path objects, refuses bytes.

    Raises:
        InvalidArgument: something else, or a string that no file can have as its name. `name`
            names the argument.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise InvalidArgument(f"{name}: expected a string or a pathlib.Path, found {found(value)}")
    try:
        is_possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_possible = False
    if not is_possible:
        raise InvalidArgument(
            f"{name}: expected a path that a file can have, found {found(path)}; "
            "take out null characters and lone surrogates"
        )
    return Path(path)


def output_path(value: object, name: str) -> Path:
    """Returns `value` as the path of a file to write; raises InvalidArgument as `file_path` does,
    and for one that ends without a name."""
    path = file_path(value, name)
    if not path.name:
        raise InvalidArgument(
            f"{name}: expected a path that ends in the name of a file, found {found(str(path))}"
        )
    return path


def sampling_options(temperature: float, top_k: int, top_p: float, seed: int) -> dict[str, Any]:
    """The options as the core takes them; raises InvalidArgument. The core checks their ranges."""
    return {
        "temperature": number(temperature, "temperature"),
        "top_k": integer(top_k, "top_k", high=MAX_INT32),
        "top_p": number(top_p, "top_p"),
        "seed": integer(seed, "seed", high=MAX_UINT64),
    }


def parse_bytes(value: int | str, name: str = "memory") -> int:
    """Bytes from a number of them or a string like "512MiB" or "1.5 GB".

    Raises:
        InvalidArgument: not of that form, or not positive.
    """
    n_bytes = 0
    if isinstance(value, str):
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value):
            n_bytes = int(min(float(match[1]) * UNITS.get(match[2], 0), 2.0**64))
    elif not isinstance(value, bool):
        with suppress(TypeError):
            n_bytes = operator.index(value)
    if not 0 < n_bytes <= MAX_INT64:
        raise InvalidArgument(
            f"{name}: expected a number of bytes or a string like '512MiB', found {found(value)}"
        )
    return n_bytes
