"""Where work beside a session computes: the one place that knows of devices with one lane."""

from __future__ import annotations

from duplex_engine.errors import BackendUnavailable
from duplex_engine.session import Session

__all__ = ["fork_in_background"]


def fork_in_background(session: Session, max_positions: int | None = None) -> Session:
    """A fork on the background lane, or on the only one that the device has."""
    try:
        return session.fork(max_positions, background=True)
    except BackendUnavailable:
        return session.fork(max_positions)
