"""A thread beside the driver's, for one thing after another that sessions need not wait for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec

__all__ = ["Worker"]

P = ParamSpec("P")


class Worker:
    """Before `start`, and once Python's main thread is over, work runs in the caller instead."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ThreadPoolExecutor | None = None

    @property
    def is_there(self) -> bool:
        """Whether work runs beside its caller."""
        return self._pool is not None

    def start(self) -> None:
        """From here on work runs in a thread of that name."""
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=self._name)

    def run(self, work: Callable[P, object], *args: P.args, **options: P.kwargs) -> None:
        """Hands work over, or does it."""
        if self._pool is not None:
            try:
                self._pool.submit(work, *args, **options)
                return
            except RuntimeError:  # the main thread is over: pools take nothing more
                self._pool = None
        work(*args, **options)

    def close(self) -> None:
        """Waits for all that was handed over."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
