"""From a delegated request to its result: the jobs of one session, their states and limits.

Owns which jobs are open, which wait for a free worker, and the texts that wait to enter the stream.
Read `delegations.py` for who calls this and when. Every method is called with `lock` held, except
those that a worker's thread calls, which take it.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial

from duplex_engine.arguments import check_callable, found, integer, positive, wait_seconds
from duplex_engine.background.event_loop import EventLoop
from duplex_engine.background.policy import Split, same_request
from duplex_engine.background.positions import fork_limit
from duplex_engine.background.result_text import MAX_RESULT_CHARS, ResultText
from duplex_engine.background.task import Failure, Job, State, Task, Worker
from duplex_engine.background.transcript import Transcript
from duplex_engine.background.worker_run import Sink, WorkerRun
from duplex_engine.errors import (
    CapacityError,
    DuplexError,
    InvalidArgument,
    SessionClosed,
)
from duplex_engine.session import Session

__all__ = ["Jobs", "Part", "Work"]

log = logging.getLogger(__name__)
GRACE_S = 5.0  # that a close waits for workers which do not end at once


@dataclass(eq=False)
class Work:
    """A job and what belongs to it while it is open."""

    job: Job
    task: Task
    room: int  # tokens of its result that may still enter
    unsent: str = ""  # text of its result
    run: WorkerRun | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """A result, or a piece of one, that waits to enter."""

    work: Work
    text: str
    ids: list[int] = field(repr=False)


class Jobs:
    """The jobs of one session."""

    def __init__(
        self,
        session: Session,
        worker: Worker,
        results: ResultText,
        transcript: Transcript,
        *,
        timeout_s: float,
        max_running: int,
        max_waiting: int,
        max_result_tokens: int,
        matter: Callable[[str], Hashable],
        split: Split | None,
        clock: Callable[[], float],
        history: int,
    ) -> None:
        """The arguments are those of `Delegations`, which checks the others."""
        check_callable(worker, "worker")
        check_callable(matter, "matter")
        check_callable(clock, "clock")
        if split is not None:
            check_callable(split, "split")
        self._session, self._worker, self._results = session, worker, results
        self._transcript = transcript
        self._timeout_s = positive(timeout_s, "timeout_s")
        self._max_running = integer(max_running, "max_running", low=1)
        self._max_waiting = integer(max_waiting, "max_waiting")
        self._max_result_tokens = integer(max_result_tokens, "max_result_tokens", low=1)
        self._history = integer(history, "history")
        self._matter, self._split, self._clock = matter, split, clock
        self.lock = threading.RLock()
        self.loop = EventLoop()
        self._changed = threading.Condition(self.lock)
        self._works: dict[int, Work] = {}  # by id, ascending; over ones too
        self._waiting: deque[Work] = deque()
        self._running: set[Work] = set()  # also those whose worker has not noticed its end
        self._parts: deque[Part] = deque()
        self._n_asked = 0
        self._is_closed = False
        self._owner = os.getpid()

    def all(self) -> list[Job]:
        """All jobs that are open or remembered, oldest first."""
        return [work.job for work in self._works.values()]

    def open_works(self) -> list[Work]:
        """Those whose result may still come."""
        return [work for work in self._works.values() if work.job.is_open]

    def work(self, job_id: int) -> Work:
        """The work with this id; raises InvalidArgument if there is none."""
        if integer(job_id, "job") not in self._works:
            known = ", ".join(map(str, self._works)) or "none"
            raise InvalidArgument(f"job: expected one of {known}, found {found(job_id)}")
        return self._works[job_id]

    # ---- from request to result -----------------------------------------------------------------
    def ask(self, request: str, token_ids: tuple[int, ...] = (), turn: int = -1) -> Job:
        """A request becomes a job, unless an open one has the same words."""
        for old in self._alike(request):
            if same_request(old.job.request) == same_request(request):
                return old.job
            self.stop(old, "replaced")
        n_open = len(self.open_works())
        now_s = self._clock()
        self._n_asked += 1
        task = Task(
            id=self._n_asked,
            text=request,
            token_ids=token_ids,
            transcript=self._transcript.entries,
            n_dropped=self._transcript.n_dropped,
            deadline_s=now_s + self._timeout_s,
            clock=self._clock,
            _owner=self._session,
        )
        work = Work(Job(task.id, request, turn, "waiting", now_s), task, self._max_result_tokens)
        self._works[task.id] = work
        if self._is_closed:
            self.stop(work, "cancelled")
        elif n_open >= self._max_running + self._max_waiting:
            self._fail(work, CapacityError(f"{n_open} delegations are open"), "too_many")
        else:
            try:
                work.task = replace(task, session=self._fork())
            except Exception as error:  # no room, or the worker's own code
                self._fail(work, error, "error")
            else:
                self._waiting.append(work)
                self._start_waiting()
        return work.job

    def _alike(self, request: str) -> list[Work]:
        """The open works about the same matter."""
        try:
            matter = self._matter(request)
            return [w for w in self.open_works() if self._matter(w.job.request) == matter]
        except Exception:
            log.exception("matter: it failed on the request %r; taken as a new one", request)
            return []

    def _fork(self) -> Session | None:
        """The fork that the worker wants, on the background lane."""
        extra = integer(getattr(self._worker, "fork_positions", 0), "fork_positions")
        if extra == 0:
            return None
        return self._session.fork(fork_limit(self._session, extra), background=True)

    def _now_s(self) -> float | None:
        """The time for a job's record; whatever the clock does, the job begins and ends."""
        try:
            return self._clock()
        except Exception:
            log.exception("clock: it failed")
            return None

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._max_running:
            work = self._waiting.popleft()
            work.job = replace(work.job, state="running", began_s=self._now_s())
            if not self._running:
                atexit.register(self.close)  # a thread must not be at work when Python ends
            self._running.add(work)
            sink = Sink(
                partial(self.take, work), partial(self.finish, work), partial(self.end, work)
            )
            work.run = WorkerRun(self._worker, work.task, self.loop, sink)

    def take(self, work: Work, piece: object) -> bool:
        """Text from a worker; False when no more is wanted."""
        with self.lock:
            if self._is_over(work):
                return False
            if not isinstance(piece, str):
                kind = type(piece).__name__
                error = InvalidArgument(f"worker: expected text, found {kind}: {found(piece)}")
                self._fail(work, error, "error")
                return False
            space = MAX_RESULT_CHARS - len(work.job.text)
            work.job = replace(work.job, text=work.job.text + piece[:space])
            work.unsent += piece[:space]
            if len(piece) > space:
                self._note_cut(work, f"a result of more than {MAX_RESULT_CHARS} characters")
                self.finish(work, None)
                return False
            if self._split is not None:
                try:
                    ready, rest = self._split(work.unsent)
                    for text in ready:
                        self._put(work, text)
                    work.unsent = rest
                except Exception as error:
                    self._fail(work, error, "error")
            return work.job.is_open

    def finish(self, work: Work, error: BaseException | None) -> None:
        """A worker is through with its task."""
        with self.lock:
            if self._is_over(work):
                if error is not None:
                    log.debug("delegation %d failed after its end", work.job.id, exc_info=error)
                return
            if error is None:
                try:
                    self._put(work, work.unsent)
                except Exception as refused:  # no word of it is known, or `encode` failed
                    error = refused
            if error is not None:
                self._fail(work, error, "error")
                return
            work.job = replace(work.job, state="done", ended_s=self._now_s())
            self._changed.notify_all()

    def _is_over(self, work: Work) -> bool:
        """Whether nobody waits for a work's result, because its session was closed or otherwise."""
        if self._session.closed:
            self.stop(work, "cancelled")
        return not work.job.is_open

    def revise(self, work: Work, text: str) -> Job:
        """Another result for a job, in place of what it has."""
        self.stop(work, "done")
        self.drop_parts(work)
        work.room, work.unsent = self._max_result_tokens, ""
        work.job = replace(work.job, state="running", text="", failure=None, error="")
        self.take(work, text)
        self.finish(work, None)
        return work.job

    def _put(self, work: Work, text: str) -> None:
        """Lets a text wait for its micro-turn."""
        if not text.strip():
            return
        ids = self._results.ids(" ".join(text.split()))
        if len(ids) > work.room:
            self._note_cut(work, f"{len(ids) - work.room} tokens of a result")
        if kept := ids[: work.room]:
            self._parts.append(Part(work, text.strip(), kept))
        work.room -= len(kept)

    def feed_next(self) -> Part | None:
        """Feeds the oldest text that waits; returns it, or None if none entered."""
        while self._parts:
            if self._feed(part := self._parts.popleft()):
                return part
        return None

    def _feed(self, part: Part) -> bool:
        try:
            room = self._results.room()
            if room < len(part.ids):
                n_cut = len(part.ids) - room
                self._note_cut(part.work, f"{n_cut} tokens for which the session has no room")
            if kept := part.ids[:room]:
                self._session.feed(result=kept)
                return True
        except SessionClosed:
            self.stop_all()
        except DuplexError as error:  # its inbox is full
            self._note_cut(part.work, str(error))
        return False

    # ---- the ends of a job ----------------------------------------------------------------------
    def _fail(self, work: Work, error: BaseException, failure: Failure) -> None:
        """What went wrong is logged; what the model is told is the wording for this failure."""
        job = work.job
        if failure == "error":
            log.error("delegation %d failed: %r", job.id, job.request, exc_info=error)
        else:
            log.warning("delegation %d failed: %r: %s", job.id, job.request, error)
        self.stop(work, "failed")
        work.job = replace(
            work.job, failure=failure, error=f"{type(error).__name__}: {error}"[:1000]
        )
        try:
            told = self._results.explanation(failure)
        except Exception:
            log.exception("wording: the text for %r cannot be encoded", failure)
            told = None
        if told is not None:
            self._parts.append(Part(work, *told))

    def stop(self, work: Work, state: State) -> None:
        """Ends an open job; of one that is over, takes back what has not entered yet."""
        if state in ("cancelled", "replaced"):
            self.drop_parts(work)
        if not work.job.is_open:
            return
        work.job = replace(work.job, state=state, ended_s=self._now_s())
        if work.run is not None:
            work.run.cancel()
        else:
            work.task.cancel()
            if work in self._waiting:
                self._waiting.remove(work)
            self._close_fork(work)
        self._changed.notify_all()

    def stop_all(self) -> None:
        """Cancels every open job; nothing that waits enters any more."""
        for work in self.open_works():
            self.stop(work, "cancelled")
        self._parts.clear()

    def take_back(self, first: int) -> None:
        """Cancels what was asked from micro-turn `first` on; of what is done, nothing enters."""
        for work in list(self._works.values()):
            if work.job.turn >= first:
                self.stop(work, "cancelled")

    def time_out(self) -> None:
        """Fails every open job whose deadline has passed."""
        now_s = self._clock()
        for work in self.open_works():
            if work.task.deadline_s <= now_s:
                late = TimeoutError(f"no result within {self._timeout_s:g} s")
                self._fail(work, late, "timeout")

    def drop_parts(self, work: Work) -> None:
        """Takes back what waits of a job."""
        self._parts = deque(part for part in self._parts if part.work is not work)

    def end(self, work: Work) -> None:
        """A worker is gone: its place is free."""
        with self.lock:
            if work.job.is_open:  # the program's event loop ended it
                self.stop(work, "cancelled")
            self._close_fork(work)
            self._running.discard(work)
            self._start_waiting()
            if not self._running:
                atexit.unregister(self.close)
            self._changed.notify_all()

    def _close_fork(self, work: Work) -> None:
        if work.task.session is not None:
            work.task.session.close()

    def wait(self, timeout_s: float) -> bool:
        """Waits until no job is open; says whether that came about. Releases the lock meanwhile."""
        timeout_s = wait_seconds(timeout_s, "timeout_s")
        with self._changed:
            return self._changed.wait_for(lambda: not self.open_works(), timeout_s)

    def shut(self) -> None:
        """Cancels everything and takes nothing new."""
        with self.lock:
            self._is_closed = True
            self.stop_all()

    def close(self) -> None:
        """The same, and waits for the workers' end, though not for ever."""
        if os.getpid() != self._owner:  # a fork has none of the workers, but perhaps a taken lock
            return
        self.shut()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._running, GRACE_S):
                log.warning("%d background workers did not end when asked", len(self._running))
        self.loop.join(GRACE_S)

    def _note_cut(self, work: Work, what: str) -> None:
        log.warning("delegation %d: cut: %s", work.job.id, what)
        work.job = replace(work.job, error=f"cut: {what}")

    def forget_old(self) -> None:
        """Forgets the oldest jobs that are over."""
        over = [id_ for id_, work in self._works.items() if not work.job.is_open]
        for id_ in over[: max(len(over) - self._history, 0)]:
            del self._works[id_]
