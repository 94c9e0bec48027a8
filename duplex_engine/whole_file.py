"""Files that are whole or not there: written under another name, which then takes the place."""

from __future__ import annotations

import glob
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["remove_abandoned", "unfinished_files", "whole_file"]

SUFFIX = ".part"  # of a file that is being written
ABANDONED_S = 600.0  # a file that was begun and not written to for so long belongs to nobody


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives the name of a new file beside `path`, which replaces it when the block ends, and is
    removed when an exception ends it."""
    remove_abandoned(path.parent, glob.escape(path.name))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def unfinished_files(folder: Path, names: str) -> list[Path]:
    """What is being written in place of files of such names (a pattern), or was when its writer was
    killed."""
    return list(folder.glob(f".{names}.*{SUFFIX}"))


def remove_abandoned(folder: Path, names: str) -> None:
    """Removes what processes that were killed while they wrote such files left behind, where it
    can."""
    with suppress(OSError):  # there is no folder, or it cannot be read
        for other in unfinished_files(folder, names):
            with suppress(OSError):  # its writer was faster, or it is another user's
                if time.time() - other.stat().st_mtime > ABANDONED_S:
                    other.unlink()
