"""Plain arguments (counts, numbers, names), checked before they cross into the C++ core.

The core checks what a value means; here it is made sure that the value fits the core's type, so
that a wrong one is an InvalidArgument like any other. Arrays are the business of `arrays.py`.
"""

from __future__ import annotations

import operator
from typing import Any

from duplex_engine.errors import InvalidArgument
from duplex_engine.json_input import found

__all__ = ["MAX_INT32", "MAX_INT64", "MAX_UINT64", "integer", "number", "sampling_options", "text"]

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
MAX_UINT64 = 2**64 - 1


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
        bounds = f"from {low} to {high}" if high < MAX_INT32 else f"of at least {low}"
        raise InvalidArgument(f"{name}: expected an integer {bounds}, found {found(value)}")
    return result


def number(value: object, name: str) -> float:
    """Returns `value` as a float; raises InvalidArgument if it is no number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgument(f"{name}: expected a number, found {found(value)}") from None


def text(value: object, name: str) -> str:
    """Returns `value` if it is a string; raises InvalidArgument otherwise."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{name}: expected a string, found {found(value)}")
    return value


def sampling_options(temperature: float, top_k: int, top_p: float, seed: int) -> dict[str, Any]:
    """The options as the core takes them; raises InvalidArgument. The core checks their ranges."""
    return {
        "temperature": number(temperature, "temperature"),
        "top_k": integer(top_k, "top_k", high=MAX_INT32),
        "top_p": number(top_p, "top_p"),
        "seed": integer(seed, "seed", high=MAX_UINT64),
    }
