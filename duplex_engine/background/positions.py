"""How many positions a session still has: for a result that enters it, and for a fork of it.

What was forgotten does not count, and an endless session makes room by forgetting.
"""

from __future__ import annotations

from duplex_engine.session import Session

__all__ = ["BLOCK", "fork_limit", "room_left"]

BLOCK = 64  # positions; holes begin and end on them
SMALL = 2_048  # positions, of which half are more than any window: less is not worth saving


def room_left(session: Session) -> int:
    """Positions that can be appended at least, once an endless session has forgotten its middle."""
    limit, window = session.max_positions, session.endless
    if all(session.config.text.is_local):  # such a model holds no position for ever
        return limit
    left = limit - (session.length - sum(end - begin for begin, end in session.forgotten))
    if window is not None:
        stays = _whole_blocks(window.head) + window.recent + BLOCK  # the hole ends on a block
        left = max(left, limit - stays)
    return left


def fork_limit(session: Session, extra: int) -> int:
    """The `max_positions` of a fork that is to append `extra` positions and forget nothing for it.

    Where a smaller window than the session's would make the fork forget at once, it is the
    session's own limit.
    """
    length, limit, endless = session.length, session.max_positions, session._core.endless
    if endless is None:
        return min(length, limit) + extra  # at most `limit` are held, with parts of pages
    # A window that was asked for has to fit; one that follows from the limit grows with it.
    head, recent, is_automatic = endless
    least = head + recent + 3 * BLOCK
    if is_automatic:
        least = min(limit, SMALL) if session.forgotten else 0
    for begin, end in session.forgotten:
        needed = max(length - (end - begin) + extra, least)
        first = _whole_blocks(needed // 8 if is_automatic else head)
        if begin <= first <= end:  # the fork too forgets from there on, so does not see the hole
            return needed
    needed = max(length + extra, least)
    return min(needed, limit) if session.forgotten else needed


def _whole_blocks(n: int) -> int:
    return -(-n // BLOCK) * BLOCK
