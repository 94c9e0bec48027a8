"""The exceptions of the package: one class for each kind of thing a caller can do about it.

Every message says what was expected, what was found, which name it is about, and the remedy.
Expected outcomes of a live stream (no input yet, a missed deadline) are values, not exceptions.
The classes are those of `csrc/core/error.h`; each is also a builtin error of its kind.
"""

from __future__ import annotations

from pathlib import Path

try:
    from duplex_engine._core import (
        BackendUnavailable,
        CapacityError,
        CheckpointError,
        DuplexError,
        InvalidArgument,
        RankFailed,
        SessionBusy,
        SessionClosed,
    )
except ModuleNotFoundError as error:  # nothing of the package is imported before this
    raise ImportError(
        "duplex_engine: expected its compiled core, found the sources alone in "
        f"{Path(__file__).parent}; install them with `pip install .` and start Python in another "
        "folder"
    ) from error

__all__ = [
    "BackendUnavailable",
    "CapacityError",
    "CheckpointError",
    "DuplexError",
    "InvalidArgument",
    "RankFailed",
    "SessionBusy",
    "SessionClosed",
]
