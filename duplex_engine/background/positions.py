"""How many positions a session still has: for a result that enters it, and for a fork of it.

What was forgotten does not count, and an endless session makes room by forgetting.
"""

from __future__ import annotations

from duplex_engine.session import Session
from duplex_engine.types import Window

__all__ = ["fork_limit", "room_left"]

BLOCK = 64  # positions; sessions forget whole blocks


def room_left(session: Session) -> int:
    """Positions that can be appended at least, once an endless session has forgotten its middle."""
    limit, window = session.max_positions, session.endless
    if all(session.config.text.is_local):  # such a model holds no position for ever
        return limit
    left = limit - (session.length - sum(end - begin for begin, end in session.forgotten))
    if window is not None:
        stays = -(-window.head // BLOCK) * BLOCK + window.recent + BLOCK  # the hole ends on a block
        left = max(left, limit - stays)
    return left


def fork_limit(session: Session, extra: int) -> int | None:
    """The `max_positions` of a fork that appends `extra` positions; None: those of the session."""
    limit, window = session.max_positions, session.endless
    if window is None:
        return min(session.length, limit) + extra  # at most `limit` are held, with parts of pages
    if session.forgotten:
        return None  # with a limit of its own, and so another window, it would forget more at once
    # A window that was asked for has to fit; one that follows from the limit does.
    is_automatic = window == Window(limit // 8, limit // 2)
    least = 0 if is_automatic else window.head + window.recent + 3 * BLOCK
    return max(session.length + extra, least)
