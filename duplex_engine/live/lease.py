"""Sessions whose client went away: detached, then parked in a file or closed.

Owns the tokens, the folder of parked sessions and the bounds on both. The driver calls `reap`.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from duplex_engine.arguments import file_path
from duplex_engine.errors import DuplexError, InvalidArgument, SessionClosed
from duplex_engine.json_input import found
from duplex_engine.live.session import LiveSession, new_token

if TYPE_CHECKING:
    from duplex_engine.live.driver import LiveEngine

__all__ = ["MAX_PARKED", "Leases"]

MAX_PARKED = 1_024  # files; the oldest goes first
WAIT_S = 60.0  # for a file that is being written
TOKEN = re.compile(r"[A-Za-z0-9_-]{22}")


class Leases:
    """Who is away. Under the live engine's lock, but for the files.

    Under a live engine's own thread, files are written in another, so that nobody waits for a disk.
    """

    def __init__(self, live: LiveEngine, folder: str | Path | None) -> None:
        """Makes the folder if it is not there.

        Raises:
            InvalidArgument: it cannot be made or read.
        """
        self._live = live
        self._folder: Path | None = None
        self._away: dict[str, LiveSession] = {}
        self._parking: dict[str, threading.Event] = {}  # files that are being written
        self._parked: OrderedDict[str, Path] = OrderedDict()
        self._worker: ThreadPoolExecutor | None = None
        if folder is not None:
            self._folder, files = _open_folder(folder)
            self._parked.update((path.stem, path) for path in files)

    @property
    def n_parked(self) -> int:
        """Sessions in files."""
        return len(self._parked)

    def start(self) -> None:
        """From here on files are written in a thread of their own."""
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="duplex_park")

    def close(self) -> None:
        """Waits for the file that is being written."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)

    def detach(self, session: LiveSession) -> str:
        """Stops the session's time; returns its token."""
        if session._is_attached:
            self._away[session._token] = session
            session._is_attached = False
            session._touched_us = self._live.now_us()
        return session._token

    def wait(self, token: str) -> None:
        """Waits for the file of a session that is being parked. Without the lock."""
        with self._live._lock:
            parking = self._parking.get(token) if isinstance(token, str) else None
        if parking is not None:
            parking.wait(WAIT_S)

    def resume(self, token: str) -> LiveSession | Path:
        """The session of a token, attached again, or the file it was parked in.

        Raises:
            SessionClosed: there is none any more.
            InvalidArgument: not a token.
        """
        if not isinstance(token, str) or TOKEN.fullmatch(token) is None:
            raise InvalidArgument(f"token: expected that of a session, found {found(token)}")
        session = self._away.pop(token, None)
        if session is not None:
            session._token = new_token()
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
        self._away.pop(session._token, None)

    def next_us(self) -> int | None:
        """When the next lease ends."""
        ends = [
            session._touched_us + int(session.lease_s * 1e6)
            for session in self._live._sessions.values()
            if session._is_attached or session._token in self._away
        ]
        return min(ends, default=None)

    def reap(self, now_us: int) -> None:
        """Detaches sessions that nobody touched, and parks those that nobody came back for."""
        gone: list[LiveSession] = []
        with self._live._lock:
            for session in self._live._sessions.values():
                if now_us - session._touched_us < int(session.lease_s * 1e6):
                    continue
                if session._is_attached:
                    self._live._count("leases_ended")
                    self.detach(session)
                elif self._away.pop(session._token, None) is not None:
                    self._parking[session._token] = threading.Event()
                    gone.append(session)
        for session in gone:
            if self._worker is None:
                self._park(session)
            else:
                self._worker.submit(self._park, session)

    def _park(self, session: LiveSession) -> None:
        """Writes the session to the folder, if there is one, and ends it."""
        token, error = session._token, None
        try:
            if self._folder is not None:
                self._write(session, self._folder / f"{token}.snapshot")
        except (DuplexError, OSError) as failure:
            self._live._count("park_failed")
            error = failure
        self._live._end(session, "lease", error)
        with self._live._lock:
            self._parking.pop(token).set()

    def _write(self, session: LiveSession, path: Path) -> None:
        session._inner.snapshot(path)
        with self._live._lock:
            self._parked[session._token] = path
            n_over = max(len(self._parked) - MAX_PARKED, 0)
            oldest = [self._parked.popitem(last=False)[1] for _ in range(n_over)]
            self._live._count("parked")
        for old in oldest:
            old.unlink(missing_ok=True)


def _open_folder(folder: str | Path) -> tuple[Path, list[Path]]:
    """A folder, made if it is not there, and the sessions parked in it, oldest first."""
    path = file_path(folder, "folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        return path, sorted(path.glob("*.snapshot"), key=lambda file: file.stat().st_mtime)
    except OSError as error:
        raise InvalidArgument(
            f"folder: expected one that can be made and read, found {found(str(path))}: "
            f"{error.strerror}"
        ) from error
