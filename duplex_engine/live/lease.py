"""Sessions whose client went away: detached, then parked in a file or closed.

Owns the tokens, the folder of parked sessions and the bounds on both. The driver calls `reap`.
Several processes may share a folder: who locks a session's file has it.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duplex_engine.arguments import file_path, found
from duplex_engine.errors import InvalidArgument, SessionBusy, SessionClosed
from duplex_engine.live.session import LiveSession, new_token
from duplex_engine.live.turns import hand_over
from duplex_engine.live.types import EndReason
from duplex_engine.live.worker import Worker
from duplex_engine.whole_file import remove_abandoned

if TYPE_CHECKING:
    from duplex_engine.live.driver import LiveEngine

__all__ = ["MAX_PARKED", "Leases"]

MAX_PARKED = 1_024  # files; the oldest goes first
NAMES = "*.snapshot"
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
        self._parking: set[str] = set()  # whose files are being written
        self._written = threading.Condition(live._lock)
        # Oldest first, with the options of `LiveEngine.adopt` that no file holds.
        self._parked: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._worker = Worker("duplex_park")
        if folder is not None:
            self._folder, files = _open_folder(folder)
            self._parked.update((path.stem, {}) for path in files)

    @property
    def n_parked(self) -> int:
        """Sessions in files, as far as this process knows."""
        return len(self._parked)

    def start(self) -> None:
        """From here on files are written in a thread of their own."""
        self._worker.start()

    def close(self) -> None:
        """Waits for the file that is being written, and parks all others that are detached."""
        self._worker.close()
        if self._folder is None:
            return
        with self._live._lock:
            away = [session for session in self._live._sessions.values() if session._is_away]
            gone = [self._leave(session) for session in away]
        for session in gone:
            self._park(session, "closed", self._hand_over(session))

    def detach(self, session: LiveSession) -> str:
        """Stops the session's time; returns its token."""
        if session._is_attached:
            session._is_attached = False
            session._touched_us = self._live.now_us()
        return session._token

    def resume(self, token: str) -> LiveSession | None:
        """The session of a token, attached again; None where it may be in a file.

        Waits for a file that is being written, and lets go of the lock meanwhile.

        Raises:
            InvalidArgument: not a token.
            SessionBusy: nobody has detached the session.
            CapacityError: there is no time for it now.
        """
        if not isinstance(token, str) or TOKEN.fullmatch(token) is None:
            raise InvalidArgument(f"token: expected that of a session, found {found(token)}")
        self._written.wait_for(lambda: token not in self._parking, WAIT_S)
        self._live._check_time()
        for session in self._live._sessions.values():
            if session._token != token or session._is_leaving:
                continue
            if session._is_attached:
                raise SessionBusy(
                    "resume: expected a detached session, found it attached, perhaps to a client "
                    "whose loss nobody noticed; detach it first"
                )
            session._token = new_token()
            session._intake.restart_numbering()
            session._attach()
            return session
        return None

    @contextmanager
    def claim(self, token: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The file of a parked session, for this caller alone, and its options; without the lock.

        It is gone when the block has ended. It stays where that raises, or the process is killed.

        Raises:
            SessionClosed: there is none any more.
            SessionBusy: somebody else has it.
            OSError: the folder cannot be written.
        """
        gone = SessionClosed("resume: the session is not there any more; open a new one")
        if self._folder is None:
            raise gone
        path = self._path(token)
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            with self._live._lock:
                self._parked.pop(token, None)
            raise gone from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SessionBusy(
                    "resume: expected a session that nobody else resumes, found it being resumed "
                    "at this moment; try again"
                ) from None
            if os.fstat(file.fileno()).st_size == 0:
                raise gone
            with self._live._lock:
                options = self._parked.get(token, {})
            yield path, options
            with suppress(OSError):
                file.truncate(0)  # who has opened it meanwhile finds nothing
                path.unlink(missing_ok=True)
            with self._live._lock:
                self._parked.pop(token, None)

    def next_us(self) -> int | None:
        """When the next lease ends."""
        ends = [
            session._touched_us + int(session.lease_s * 1e6)
            for session in self._live._sessions.values()
            if not session._is_leaving
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
                elif session._is_away:
                    gone.append(self._leave(session))
        for session in gone:
            failure = self._hand_over(session)
            self._worker.run(self._park, session, "lease", failure)

    def _leave(self, session: LiveSession) -> LiveSession:
        """Nobody can resume the session or push to it any more until it is parked."""
        self._parking.add(session._token)
        session._is_leaving = True
        return session

    def _hand_over(self, session: LiveSession) -> Exception | None:
        """Moves what was queued into the session; in the driver, as all that is journalled."""
        try:
            if self._folder is not None:
                hand_over(self._live, session)
        except Exception as failure:
            return failure
        return None

    def _park(self, session: LiveSession, reason: EndReason, failure: BaseException | None) -> None:
        """Writes the session to the folder, if there is one, and ends it."""
        token = session._token
        try:
            if self._folder is not None and failure is None:
                remove_abandoned(self._folder, NAMES)
                session._inner.snapshot(self._path(token))
        except BaseException as error:  # whatever it is, nobody waits for the file for ever
            failure = error
        try:
            if not self._live._end(session, reason, failure):
                self._delete(token)  # it was closed meanwhile
            elif failure is not None:
                self._live._count("park_failed")
            elif self._folder is not None:
                self._note(token, session._options())
        finally:
            with self._live._lock:
                self._parking.remove(token)
                self._written.notify_all()

    def _note(self, token: str, options: dict[str, Any]) -> None:
        """A session is in its file; of too many, the oldest go."""
        with self._live._lock:
            self._parked[token] = options
            n_over = max(len(self._parked) - MAX_PARKED, 0)
            oldest = [self._parked.popitem(last=False)[0] for _ in range(n_over)]
            self._live._count("parked")
        for old in oldest:
            self._delete(old)

    def _delete(self, token: str) -> None:
        if self._folder is not None:
            with suppress(OSError):
                self._path(token).unlink(missing_ok=True)

    def _path(self, token: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{token}.snapshot"


def _open_folder(folder: str | Path) -> tuple[Path, list[Path]]:
    """A folder, made if it is not there, and the sessions parked in it, oldest first."""
    path = file_path(folder, "folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path, NAMES)
        return path, sorted(path.glob(NAMES), key=_written_s)
    except OSError as error:
        raise InvalidArgument(
            f"folder: expected one that can be made and read, found {found(str(path))}: "
            f"{error.strerror}"
        ) from error


def _written_s(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # another process has resumed it since the folder was listed
        return 0.0
