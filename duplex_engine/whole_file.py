"""Files that are whole or not there: written under another name, which then takes the place."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["SUFFIX", "whole_file"]

SUFFIX = ".part"  # of a file that is being written


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives the name of a new file beside `path`, which replaces it when the block ends, and is
    removed when an exception ends it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
