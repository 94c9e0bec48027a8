"""Functions and times that a program gives, checked before a thread of its own needs them.

What is wrong there would otherwise show only later, where no caller is left to be told. Counts and
names are the business of `arguments.py`.
"""

from __future__ import annotations

from duplex_engine.arguments import number
from duplex_engine.errors import InvalidArgument
from duplex_engine.json_input import found

__all__ = ["MAX_NUMBER", "check_callable", "positive", "wait_seconds"]

MAX_NUMBER = 1e9  # seconds or milliseconds: in microseconds they still fit the core's integers


def check_callable(value: object, name: str) -> None:
    """Raises InvalidArgument if `value` cannot be called. `name` names the argument."""
    if not callable(value):
        raise InvalidArgument(f"{name}: expected a callable, found {found(value)}")


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
