"""The exceptions of the package: one class for each kind of thing a caller can do about it.

Every message says what was expected, what was found, which name it is about, and the remedy.
Expected outcomes of a live stream (no input yet, a missed deadline) are values, not exceptions.
The classes are those of `csrc/core/error.h`; each is also a builtin error of its kind.
"""

from __future__ import annotations

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
