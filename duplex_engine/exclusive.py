"""One caller at a time, where calls wait for nobody and may be interrupted anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from duplex_engine.errors import SessionBusy

__all__ = ["Exclusive"]


class Exclusive:
    """Lets one thread in at a time; another one gets SessionBusy.

    A context manager that the session has for all its life. Who is in is the one entry of a
    dictionary, so coming in is a single step of the interpreter, and the thread that Ctrl-C has
    thrown out between two steps finds itself still inside and is let in again.
    """

    def __init__(self, check_open: Callable[[], None]) -> None:
        """`check_open` is called inside and raises where there is nothing to enter any more."""
        self._check_open = check_open
        self._inside: dict[str, int] = {}

    def __enter__(self) -> None:
        thread = threading.get_ident()
        if self._inside.setdefault("thread", thread) != thread:
            raise SessionBusy(
                "session: expected one call at a time, found another thread at work on it; "
                "wait for that call, or use a session for each thread"
            )
        try:
            self._check_open()
        except BaseException:
            self._inside.clear()
            raise

    def __exit__(self, *_: Any) -> None:
        self._inside.clear()
