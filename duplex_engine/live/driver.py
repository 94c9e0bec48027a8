"""The live engine: the one thread that runs every session's micro-turns when they are due.

Owns who is open, what time it is and the loop around the scheduler (`csrc/engine/scheduler.h`),
whose decisions it carries out: a pass of turns, a slice of background work, or waiting. All of it
is in `poll`, which a test calls with a clock of its own. Read `turns.py` for what a pass does and
`session.py` for what clients do meanwhile.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from duplex_engine import _core
from duplex_engine.arguments import check_callable, found, positive
from duplex_engine.config import ModelConfig
from duplex_engine.engine import Engine
from duplex_engine.errors import CapacityError, InvalidArgument, SessionClosed
from duplex_engine.live.background import Background, Slices
from duplex_engine.live.cost import CostModel
from duplex_engine.live.delegating import MakeDelegations, begin
from duplex_engine.live.journal import Entry
from duplex_engine.live.lease import Leases
from duplex_engine.live.metrics import Metrics
from duplex_engine.live.session import LiveSession
from duplex_engine.live.summary import Summary
from duplex_engine.live.trace import Trace
from duplex_engine.live.turns import run_jobs, run_turns
from duplex_engine.live.types import BackgroundFailed, EndReason
from duplex_engine.session import Session
from duplex_engine.types import MicroTurn

__all__ = ["LiveEngine"]

MAX_BACKGROUND_WAIT_US = 1_000_000  # then a slice is run even if a session has to wait for it


class LiveEngine:
    """Runs an `Engine` in real time. Use it as a context manager: it starts and closes its thread.

    Without a thread, call `poll` yourself.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Callable[[], float] = time.monotonic,
        patience_ms: float = 100.0,
        lease_s: float = 60.0,
        folder: str | Path | None = None,
        cost: CostModel | None = None,
        metrics: Metrics | None = None,
        journal: Callable[[str, Entry], None] | None = None,
    ) -> None:
        """Measures what a step costs, unless `cost` says it.

        Args:
            engine: an interaction checkpoint; the live engine does not close it.
            clock: seconds, never going back.
            patience_ms: how long sound may be late before silence takes its place.
            lease_s: a session that nobody touches is detached after it, and ended after it again.
            folder: where sessions are parked whose lease ended; None closes them.
            metrics: `Metrics` to keep up to date.
            journal: is told all that the model is given; see `journal.py`. One that raises is told
                no more: `journal_error` has what it raised, and the sessions go on.

        Raises:
            InvalidArgument: not an interaction checkpoint, a number out of range, a folder that
                cannot be made and read, or a value of another kind.
        """
        config = getattr(engine, "config", None)  # not isinstance: simulations wrap their engine
        if not (isinstance(config, ModelConfig) and hasattr(engine, "open_session")):
            raise InvalidArgument(f"LiveEngine: expected an Engine, found {found(engine)}")
        if config.interaction is None:
            raise InvalidArgument(
                "LiveEngine: expected an interaction checkpoint, found one that does not end its "
                "own output; step its sessions yourself"
            )
        check_callable(clock, "clock")
        if cost is not None and not isinstance(cost, CostModel):
            raise InvalidArgument(f"cost: expected a CostModel or None, found {found(cost)}")
        if metrics is not None and not isinstance(metrics, Metrics):
            raise InvalidArgument(f"metrics: expected Metrics or None, found {found(metrics)}")
        if journal is not None:
            check_callable(journal, "journal")
        self.engine = engine
        self._layout = config.interaction
        self.cost = CostModel() if cost is None else cost
        self.trace = Trace()
        self.counters: Counter[str] = Counter()
        self._clock = clock
        self._patience_us = int(positive(patience_ms, "patience_ms") * 1000)
        self._lease_s = positive(lease_s, "lease_s")
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._sessions: dict[int, LiveSession] = {}
        self._numbers = itertools.count(1)
        self._background = Background(self.now_us, self._slice_done)
        self._leases = Leases(self, folder)
        self._metrics = metrics
        self._on_journal = journal
        self.journal_error: Exception | None = None  # what ended the journal; the sessions go on
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None  # what ended the driver, and with it all sessions
        self._is_closed = False
        if cost is None:
            self.cost.measure(engine, self._layout)
        if metrics is not None:
            metrics.watch(self)

    # ---- sessions

    def open(
        self,
        *,
        lease_s: float | None = None,
        summary: Summary | None = None,
        delegations: MakeDelegations | None = None,
        **options: Any,
    ) -> LiveSession:
        """Opens a session; `options` are those of `Engine.open_session`.

        Args:
            lease_s: its own lease, in seconds.
            summary: how to go on for ever; see `Summary`.
            delegations: makes the `Delegations` that answer the model, of the session that it is
                given: `lambda session: Delegations(session, worker)`.

        Raises:
            CapacityError: no memory or no time for one more session; says what would fit.
            InvalidArgument: one of the options is wrong.
        """
        with self._lock:
            self._check_time()
        session = self.engine.open_session(**options)  # waits for a step at work
        return self._admit(session, lease_s=lease_s, summary=summary, delegations=delegations)

    def adopt(
        self,
        session: Session,
        *,
        lease_s: float | None = None,
        summary: Summary | None = None,
        delegations: MakeDelegations | None = None,
    ) -> LiveSession:
        """Makes a session of this engine live: one that was forked, restored or stepped before.

        It belongs to the live engine from here on. A session that is refused is left as it is.

        Raises:
            CapacityError: there is no time for one more session.
            InvalidArgument: it is another engine's, on the background lane, or live already.
            SessionClosed: it is closed, or this live engine is.
        """
        if not isinstance(session, Session):
            raise InvalidArgument(f"adopt: expected a Session, found {found(session)}")
        if session._engine is not self.engine._core or session.background:
            raise InvalidArgument(
                "adopt: expected a session of this engine on its interaction lane, found another; "
                "fork it without background=True, or migrate it"
            )
        if session.closed:
            raise SessionClosed("adopt: the session is closed; open or restore another")
        if summary is not None:
            if not isinstance(summary, Summary):
                raise InvalidArgument(f"summary: expected a Summary, found {found(summary)}")
            summary = summary.of_session(self.engine, session)
        lease = self._lease_s if lease_s is None else positive(lease_s, "lease_s")
        live = LiveSession(self, next(self._numbers), session, lease, summary)
        if delegations is not None:
            with self._lock:
                self._check_place(session)
            live.delegations = begin(live, delegations)  # the caller's code: nobody waits for it
            live._make_delegations = delegations
        with self._lock:
            self._check_place(session)
            live._attach()
            self._sessions[live._number] = live
            self._count("opened")
            self._wake.set()
        return live

    def resume(
        self,
        token: str,
        *,
        lease_s: float | None = None,
        summary: Summary | None = None,
        delegations: MakeDelegations | None = None,
    ) -> LiveSession:
        """The session that had this token when it was detached, running again.

        It has another token now, and its client begins to number the sound anew.

        Args:
            lease_s, summary, delegations: as in `open`, for a session that was parked: a file holds
                none of them. Where it was parked by this live engine, None is what it had then.

        Raises:
            SessionClosed: its lease ended, and it was not parked.
            SessionBusy: it is not detached: `LiveSession.detach` it first; or another process
                resumes it at this moment.
            CheckpointError: its file is damaged, or of another model.
            CapacityError: there is no memory or no time for it now; try again later.
            OSError: the folder cannot be written.
        """
        with self._lock:
            held = self._leases.resume(token)
            if held is not None:
                self._count("resumed")
                self._wake.set()
                return held
        given = {"lease_s": lease_s, "summary": summary, "delegations": delegations}
        with self._leases.claim(token) as (path, options):
            live = self._admit(
                self.engine.restore(path),
                **options | {name: value for name, value in given.items() if value is not None},
            )
        self._count("restored")
        return live

    def background(self, session: LiveSession, slices: Slices, *, gives_way: bool = False) -> None:
        """Runs a generator in the gaps between micro-turns; it ends with its session.

        Args:
            slices: from one `yield` to the next is what a session may have to wait for.
            gives_way: whatever it computes is on the background lane, so that nobody waits for it.

        Raises:
            CapacityError: the session has too many already.
            InvalidArgument: not a generator, or not a session of this live engine.
        """
        if not isinstance(session, LiveSession) or session._live is not self:
            raise InvalidArgument(
                f"background: expected a session of this live engine, found {found(session)}"
            )
        with self._lock:
            session._check_open()
            self._background.add(session._number, slices, gives_way=gives_way)
            self._wake.set()

    @property
    def sessions(self) -> list[LiveSession]:
        """Those that have not ended."""
        with self._lock:
            return list(self._sessions.values())

    # ---- the loop

    def poll(self) -> float | None:
        """Does the one thing that is due; returns the seconds until there will be another.

        0: at once. None: until somebody pushes, opens or asks.
        """
        run_jobs(self)
        self._background.keep(self._sessions)
        now_us = self.now_us()
        self._leases.reap(now_us)
        with self._lock:
            action = self._next_action(now_us)
            lease_us = self._leases.next_us()
        if action.kind == "turns":
            run_turns(self, action.turns)
            return 0.0
        if action.kind == "background":
            self._background.run(action.task, is_forced=action.is_forced)
            return 0.0
        ends = [at for at in (action.until_us, lease_us) if at is not None]
        return max(min(ends) - now_us, 0) / 1e6 if ends else None

    def start(self) -> Self:
        """Starts the driver's thread. A program that ends without `close` closes it."""
        if self._thread is None:
            atexit.register(self._close_at_exit)
            self._background.start()
            self._leases.start()
            self._thread = threading.Thread(target=self._drive, name="duplex_live", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Stops the thread after the step at work and ends every session.

        Those that are detached are parked, if there is a folder.
        """
        with self._lock:
            self._is_closed = True
            self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._leases.close()
        for session in self.sessions:
            self._end(session, "closed")
        self._background.close()
        atexit.unregister(self._close_at_exit)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def now_us(self) -> int:
        """The clock in microseconds."""
        return int(self._clock() * 1e6)

    def _close_at_exit(self) -> None:
        """Ends turns in progress and parks who is away, where the program has not."""
        if self._thread is not None and self._thread.is_alive():  # not so in a fork
            self.close()

    def _drive(self) -> None:
        try:
            while not self._is_closed:
                self._wake.clear()
                wait_s = self.poll()
                if wait_s is None or wait_s > 0:
                    self._wake.wait(wait_s)
        except BaseException as error:  # nobody should wait for a driver that is gone
            self.error, self._is_closed = error, True
            for session in self.sessions:
                self._end(session, "error", error)

    def _next_action(self, now_us: int) -> _core.Action:
        """The scheduler's answer to how things are now."""
        turn_rows = self.cost.turn_rows(self._layout)
        loads = [
            (number, s._due_us, s._intake.n_whole, turn_rows + s._waiting_rows())
            for number, s in self._sessions.items()
            if s.attached
        ]
        return _core.next_action(
            now_us,
            loads,
            self._background.loads(),
            period_us=self._layout.micro_turn_ms * 1000,
            patience_us=self._patience_us,
            pass_us=int(self.cost.step_us(self._layout, 0)),
            row_ns=int(self.cost.row_us * 1000),
            max_wait_us=MAX_BACKGROUND_WAIT_US,
            forced_us=self._background.forced_us,
        )

    def _slice_done(self, owner: int, us: int, error: BaseException | None) -> None:
        """A slice of a task of session `owner` has ended, or the task with an error."""
        self.trace.slice(f"s{owner}", "task", self.now_us() - us, us)
        self._wake.set()
        with self._lock:
            self._count("background_us", us)
            if error is None:
                return
            self._count("background_failed")
            if (session := self._sessions.get(owner)) is not None:
                session._events.append(BackgroundFailed(f"{type(error).__name__}: {error}"))

    # ---- admission

    def _admit(self, session: Session, **options: Any) -> LiveSession:
        """Adopts a session that was made for that, or closes it."""
        try:
            return self.adopt(session, **options)
        except BaseException:
            session.close()
            raise

    def _check_place(self, session: Session) -> None:
        """Raises what `adopt` says if this one cannot be live here, or not now."""
        if self._is_closed:
            raise SessionClosed("LiveEngine: it is closed; make another")
        if any(held._inner is session for held in self._sessions.values()):
            raise InvalidArgument("adopt: expected a session once, found it live already")
        self._check_time()

    def _check_time(self) -> None:
        """Raises CapacityError if one session more could not be served when it is due."""
        n_sessions = sum(session.attached for session in self._sessions.values()) + 1
        try:
            if n_sessions == 1 and self.cost.most_sessions(self._layout) == 0:
                # What was slow may be over, and there are no steps that would tell.
                self.cost.measure(self.engine, self._layout)
            self.cost.check(self._layout, n_sessions)
        except CapacityError:
            self._count("refused_time")
            raise

    # ---- for sessions and turns

    def _detach(self, session: LiveSession) -> str:
        if self._is_closed:  # nobody would park it any more
            raise SessionClosed("LiveEngine: it is closed; make another")
        return self._leases.detach(session)

    def _end(
        self, session: LiveSession, reason: EndReason, error: BaseException | None = None
    ) -> bool:
        """Ends a session: once, from any thread. False: it had ended."""
        with self._lock:
            if session._ended is not None:
                return False
            session._ended, session._error = reason, error
            self._sessions.pop(session._number, None)
            jobs = [future for _, future in session._jobs]
            session._jobs.clear()
            session._outbox.close()
            self._count(f"ended_{reason.replace(' ', '_')}")
            self._wake.set()
        if session.delegations is not None:
            session.delegations.cancel_all()  # waits for nobody
        for future in jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(SessionClosed(f"session {session.id}: it ended ({reason})"))
        session._inner.close()
        return True

    def _end_with(self, session: LiveSession, error: Exception) -> None:
        """Ends a session that cannot go on."""
        reason: EndReason = "error"
        if isinstance(error, CapacityError):
            reason = "capacity"
        elif isinstance(error, SessionClosed):
            reason = "engine closed" if session._inner._engine.closed else "closed"
        self._end(session, reason, error)

    def _journal(self, session: LiveSession, entry: Entry) -> None:
        if self._on_journal is None:
            return
        try:
            self._on_journal(session.id, entry)
        except Exception as error:  # with a gap it proves nothing any more: it is told no more
            self._on_journal, self.journal_error = None, error
            self._count("journal_failed")

    def _count(self, name: str, n: int = 1) -> None:
        with self._lock:
            self.counters[name] += n

    def _measure(self, turn: MicroTurn, late_us: int) -> None:
        self.counters["turns"] += 1
        self.counters["tokens"] += len(turn.token_ids)
        self.counters["merged_turns"] += turn.input.merged_turns
        if self._metrics is not None:
            self._metrics.observe(turn, late_us)
