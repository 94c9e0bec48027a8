"""The delegations of one session: workers are started, and what they find enters the stream.

Owns when that happens: at most one result enters a micro-turn, so that each has its own brackets.
It has no clock and keeps no time by itself: whoever drives the session calls `before_step` and
`after_step` (or `step`, which does both), and time-outs are seen there, where their results enter.
Whatever a worker does, neither of them raises because of it. The jobs themselves are in `jobs.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from duplex_engine.aio import AsyncSession
from duplex_engine.arguments import found
from duplex_engine.arguments import text as checked_text
from duplex_engine.background.jobs import Jobs, Part
from duplex_engine.background.policy import WORDING, Split, same_request
from duplex_engine.background.result_text import ResultText
from duplex_engine.background.task import Failure, Job, Worker
from duplex_engine.background.transcript import Transcript
from duplex_engine.config import ModelConfig
from duplex_engine.errors import InvalidArgument
from duplex_engine.session import Session
from duplex_engine.step import step_input
from duplex_engine.types import Delegation, MicroTurn

__all__ = ["Delegations"]

MAX_ENDS = 64  # micro-turns whose rewind is noticed: more than a session can take back


class Delegations:
    """Hands a session's delegations to a worker and its results back.

    Use it as a context manager, plain or asynchronous, or close it. Made where an event loop runs,
    it runs asynchronous workers there; elsewhere in a thread, which lives while they work.
    """

    def __init__(
        self,
        session: Session | AsyncSession,
        worker: Worker,
        *,
        timeout_s: float = 60.0,
        max_running: int = 4,
        max_waiting: int = 16,
        max_result_tokens: int = 256,
        matter: Callable[[str], Hashable] = same_request,
        split: Split | None = None,
        wording: Mapping[Failure, Sequence[str]] = WORDING,
        encode: Callable[[str], Sequence[int]] | None = None,
        transcript: Transcript | None = None,
        clock: Callable[[], float] = time.monotonic,
        history: int = 100,
    ) -> None:
        """Takes care of a session's delegations from here on.

        Args:
            session: of an interaction checkpoint.
            worker: see `task.py`; several sessions may share one that can bear it.
            timeout_s: from the request until the result, less than 1e9; `clock` decides.
            max_running: workers at a time.
            max_waiting: requests that wait for one; more fail at once, as "too_many".
            max_result_tokens: a longer result is cut, and its job says so.
            matter: what a request is about. One with the matter of an open one takes its place; the
                same words again start nothing.
            split: lets a result enter in pieces, such as `by_sentence`; None waits for the whole.
            wording: what enters instead of a result, by failure, in order of preference: the first
                text that the model's vocabulary has whole.
            encode: text to token ids; None takes the checkpoint's tokenizer.
            transcript: where the conversation is kept; None makes one.
            clock: seconds that never go back.
            history: jobs that are remembered when they are over.

        Raises:
            InvalidArgument: the session cannot delegate, or a value is not as above.
        """
        self._async_session = session if isinstance(session, AsyncSession) else None
        self.session = session.sync if isinstance(session, AsyncSession) else session
        # Not isinstance: a live session is seen through a stand-in.
        config = getattr(self.session, "config", None)
        if not (isinstance(config, ModelConfig) and hasattr(self.session, "feed")):
            raise InvalidArgument(
                f"session: expected a Session or an AsyncSession, found {found(session)}; a live "
                "one gets its own by LiveEngine.open(delegations=)"
            )
        layout = config.interaction
        if layout is None:
            raise InvalidArgument(
                "session: expected one of an interaction checkpoint, found one that cannot delegate"
            )
        if transcript is None:
            transcript = Transcript(self.session.tokenizer, turn_ms=layout.micro_turn_ms)
        if not isinstance(transcript, Transcript):
            raise InvalidArgument(f"transcript: expected a Transcript, found {found(transcript)}")
        self.transcript = transcript
        self._jobs = Jobs(
            self.session,
            worker,
            ResultText(self.session, encode, wording),
            self.transcript,
            timeout_s=timeout_s,
            max_running=max_running,
            max_waiting=max_waiting,
            max_result_tokens=max_result_tokens,
            matter=matter,
            split=split,
            clock=clock,
            history=history,
        )
        self._entering: Part | None = None  # fed, and its micro-turn not yet over
        self._left: asyncio.Task[MicroTurn] | None = None  # a step whose caller was cancelled
        self._turn = -1  # the newest micro-turn
        self._ends: deque[tuple[int, int]] = deque(maxlen=MAX_ENDS)  # (micro-turn, length behind)
        self._epoch = self.session.epoch

    # ---- by the driver of the session -----------------------------------------------------------
    def before_step(self, inputs: Mapping[str, Any] | None = None) -> None:
        """Feeds the session the result that is due, and gives up what took too long.

        inputs: what the micro-turn is given besides; where that is a result, ours waits.
        """
        with self._jobs.lock:
            if self.session.closed:
                self._jobs.stop_all()
                return
            self._look_for_rewind()
            self._jobs.time_out()
            is_taken = inputs is not None and inputs.get("result") is not None
            if self._entering is None and not is_taken:
                self._entering = self._jobs.feed_next()

    def after_step(self, turn: MicroTurn, inputs: Mapping[str, Any] | None = None) -> list[Job]:
        """Notes what a micro-turn was given and put out, and starts what it delegates.

        Call it before anything else happens to the session: a worker's fork is made here.

        Returns:
            The jobs of this micro-turn's delegations.
        """
        with self._jobs.lock:
            entered = [] if self._entering is None else [self._entering.text]
            if self._entering is not None:
                work, self._entering = self._entering.work, None
                work.job = replace(work.job, entered=(*work.job.entered, turn.index))
            self.transcript.add(inputs or {}, turn, entered)
            if turn.index <= self._turn:
                self._jobs.take_back(turn.index)
            self._turn = turn.index
            if not self.session.closed:
                self._ends.append((turn.index, self.session.length))
            jobs = [
                self._jobs.ask(event.text, event.token_ids, turn.index)
                for event in turn.events
                if isinstance(event, Delegation)
            ]
            self._jobs.forget_old()
            return jobs

    def take_back(self, first: int) -> None:
        """The session was rewound to before micro-turn `first`: what was asked since is cancelled.

        A rewind by `Session.truncate` is noticed without this, in `before_step`.
        """
        with self._jobs.lock:
            self._jobs.take_back(first)
            self.transcript.rewind(first)
            self._turn = min(self._turn, first - 1)

    @property
    def entering(self) -> Job | None:
        """The job whose result `before_step` has fed to the micro-turn that is to come, or None."""
        with self._jobs.lock:
            return None if self._entering is None else self._entering.work.job

    def _look_for_rewind(self) -> None:
        """Takes back the micro-turns at whose ends the session has no mark any more."""
        epoch = self.session.epoch
        if epoch == self._epoch:
            return
        self._epoch = epoch
        marks = self.session.marks
        first: int | None = None
        while self._ends and self._ends[-1][1] > marks[0] and self._ends[-1][1] not in marks:
            first, _ = self._ends.pop()
        if first is not None:
            self.take_back(first)

    def step(
        self,
        audio: object = None,
        image: object = None,
        text: object = None,
        *,
        result: object = None,
        sample_rate: int | None = None,
        max_tokens: int | None = None,
    ) -> MicroTurn:
        """One micro-turn of the session with its background; arguments as `Session.step`."""
        inputs = step_input(audio, image, text, result, sample_rate, max_tokens)
        self.before_step(inputs)
        turn = self.session.step(**inputs)
        self.after_step(turn, inputs)
        return turn

    async def async_step(
        self,
        audio: object = None,
        image: object = None,
        text: object = None,
        *,
        result: object = None,
        sample_rate: int | None = None,
        max_tokens: int | None = None,
    ) -> MicroTurn:
        """The same for a session of an `AsyncEngine`; neither call waits in the event loop.

        A caller that is cancelled does not stop it: what the micro-turn delegates is begun. The
        next call waits for its end.
        """
        session = self._async_session
        if session is None:
            raise InvalidArgument("async_step: expected an AsyncSession, found a Session")
        inputs = step_input(audio, image, text, result, sample_rate, max_tokens)
        left = self._left
        if left is not None and not left.done():
            await asyncio.wait([left])

        async def whole() -> MicroTurn:
            await session._engine.run(self.before_step, inputs)
            turn = await session.step(**inputs)
            await session._engine.run(self.after_step, turn, inputs)
            return turn

        step = asyncio.create_task(whole())
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            self._left = step
            raise

    # ---- by the program -------------------------------------------------------------------------
    @property
    def jobs(self) -> list[Job]:
        """All jobs that are open or remembered, as they are now; oldest first. From any thread."""
        with self._jobs.lock:
            return self._jobs.all()

    def ask(self, request: str) -> Job:
        """Starts a job as if the model had delegated `request`; call it between micro-turns."""
        request = checked_text(request, "request")
        with self._jobs.lock:
            return self._jobs.ask(request)

    def cancel(self, job_id: int) -> Job:
        """Stops a job: nothing of it enters any more. One that is over stays as it is.

        Raises:
            InvalidArgument: there is no such job, here as in the calls below.
        """
        with self._jobs.lock:
            work = self._jobs.work(job_id)
            self._jobs.stop(work, "cancelled")
            return work.job

    def cancel_all(self) -> None:
        """Stops every job; nothing that waits enters any more."""
        with self._jobs.lock:
            self._jobs.stop_all()

    def replace(self, job_id: int, request: str) -> Job:
        """Stops a job and starts another in its place; call it between micro-turns."""
        request = checked_text(request, "request")
        with self._jobs.lock:
            self._jobs.stop(self._jobs.work(job_id), "replaced")
            return self._jobs.ask(request)

    def revise(self, job_id: int, text: str) -> Job:
        """Gives a job another result: its worker is stopped, what waits of it does not enter.

        Where the first result entered already, the second enters behind it, and a model that was
        trained for that corrects itself.
        """
        text = checked_text(text, "text")
        with self._jobs.lock:
            return self._jobs.revise(self._jobs.work(job_id), text)

    def wait(self, timeout_s: float) -> bool:
        """Waits until no job is open; says whether that came about. Not for event loops.

        timeout_s: less than 1e9.
        """
        return self._jobs.wait(timeout_s)

    def close(self) -> None:
        """Stops everything and waits for the workers' end; a second call does nothing.

        A plain function that does not look at `task.cancelled` cannot be ended: after some seconds
        it is left behind, with a warning.

        Raises:
            InvalidArgument: called in the event loop where the workers run; await `aclose` there.
        """
        if self._jobs.loop.is_here:
            raise InvalidArgument("close: expected to be outside the event loop; await aclose()")
        self._jobs.close()

    async def aclose(self) -> None:
        """The same, awaited."""
        await asyncio.to_thread(self._jobs.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
