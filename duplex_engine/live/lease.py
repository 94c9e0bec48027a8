"""Sessions whose client went away: detached, then parked in a file or closed.

Owns the tokens, the folder of parked sessions and the bounds on both. The driver calls `reap`.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from duplex_engine.errors import DuplexError, InvalidArgument, SessionClosed
from duplex_engine.json_input import found
from duplex_engine.live.session import LiveSession

if TYPE_CHECKING:
    from duplex_engine.live.driver import LiveEngine

__all__ = ["MAX_PARKED", "Leases"]

MAX_PARKED = 1_024  # files; the oldest goes first
TOKEN = re.compile(r"[A-Za-z0-9_-]{22}")


class Leases:
    """Who is away. Under the live engine's lock, but for the files."""

    def __init__(self, live: LiveEngine, folder: Path | None) -> None:
        self._live = live
        self._folder = folder
        self._away: dict[str, LiveSession] = {}
        self._parked: OrderedDict[str, Path] = OrderedDict()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            files = sorted(folder.glob("*.snapshot"), key=lambda path: path.stat().st_mtime)
            self._parked.update((path.stem, path) for path in files)

    @property
    def n_parked(self) -> int:
        """Sessions in files."""
        return len(self._parked)

    def detach(self, session: LiveSession) -> str:
        """Stops the session's time; returns its token."""
        if session._token is None:
            session._token = secrets.token_urlsafe(16)
            self._away[session._token] = session
            session._is_attached = False
            session._touched_us = self._live.now_us()
        return session._token

    def resume(self, token: str) -> LiveSession | Path:
        """The session of a token, attached again, or the file it was parked in.

        Raises:
            SessionClosed: there is none any more.
            InvalidArgument: not a token.
        """
        if not isinstance(token, str) or TOKEN.fullmatch(token) is None:
            raise InvalidArgument(f"token: expected one of `detach`, found {found(token)}")
        session = self._away.pop(token, None)
        if session is not None:
            session._token = None
            session._is_attached = True
            session._intake.restart_numbering()
            session._touched_us = self._live.now_us()
            session._due_us = session._touched_us
            if session._intake.n_whole == 0:
                session._due_us += session._period_us
            return session
        path = self._parked.pop(token, None)
        if path is None:
            raise SessionClosed("resume: the session is not there any more; open a new one")
        return path

    def put_back(self, token: str, path: Path) -> None:
        """The session of this file could not be run again."""
        with self._live._lock:
            self._parked[token] = path

    def forget(self, session: LiveSession) -> None:
        """The session has ended."""
        if session._token is not None:
            self._away.pop(session._token, None)

    def next_us(self) -> int | None:
        """When the next lease ends."""
        ends = [s._touched_us + int(s.lease_s * 1e6) for s in self._live._sessions.values()]
        return min(ends, default=None)

    def reap(self, now_us: int) -> None:
        """Detaches sessions that nobody touched, and parks those that nobody came back for."""
        with self._live._lock:
            over = [
                session
                for session in self._live._sessions.values()
                if now_us - session._touched_us >= int(session.lease_s * 1e6)
            ]
            for session in over:
                if session._is_attached:
                    self._live._count("leases_ended")
                    self._live._detach(session)
            over = [session for session in over if session._touched_us < now_us]
        for session in over:
            self._park(session)

    def _park(self, session: LiveSession) -> None:
        """Writes the session to the folder, if there is one, and ends it."""
        token = session._token
        if self._folder is not None and token is not None:
            path = self._folder / f"{token}.snapshot"
            try:
                session._inner.snapshot(path)
            except (DuplexError, OSError) as error:
                self._live._count("park_failed")
                self._live._end(session, "lease", error)
                return
            with self._live._lock:
                self._parked[token] = path
                oldest = [self._parked.popitem(last=False)[1] for _ in self._too_many()]
            for old in oldest:
                old.unlink(missing_ok=True)
            self._live._count("parked")
        self._live._end(session, "lease")

    def _too_many(self) -> range:
        return range(max(len(self._parked) - MAX_PARKED, 0))
