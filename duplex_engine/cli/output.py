"""Files that commands write at their end, checked before their work."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from duplex_engine.errors import InvalidArgument

__all__ = ["check_output"]


def check_output(path: Path, option: str) -> None:
    """Finds out whether a file can be written, and leaves nothing behind.

    Args:
        path: of the file; its folder need not be there.
        option: of the command line, for the message.

    Raises:
        InvalidArgument: it cannot.
    """
    try:
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists():  # a device, too
            if not os.access(path, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        # note: only trying tells: the mode of a folder says nothing to root, or about /proc.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidArgument(
            f"{option}: expected a file that can be written, found {path}: {error.strerror}; "
            "choose another"
        ) from error
