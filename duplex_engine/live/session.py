"""A live session: what one client may do with its stream while the driver runs it.

Owns the calls from other threads, which only queue and never wait for a step, and the session's
place in time. Does not compute: see `driver.py` for who decides when, `turns.py` for what a
micro-turn does with what is queued here.
"""

from __future__ import annotations

import inspect
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from duplex_engine.arguments import MAX_INT32, check_callable, found, integer, wait_seconds
from duplex_engine.arguments import text as checked_text
from duplex_engine.arrays import INT16_SCALE, SAMPLE_RATE, rgb_image, samples_1d
from duplex_engine.errors import CapacityError, InvalidArgument, SessionClosed
from duplex_engine.live.delegating import MakeDelegations, note_result
from duplex_engine.live.heard import Heard
from duplex_engine.live.intake import AudioIntake, Mailbox
from duplex_engine.live.outbox import Outbox
from duplex_engine.live.types import (
    AudioFilled,
    EndReason,
    Interrupted,
    LiveEvent,
    LiveTurn,
    Receipt,
    Refused,
    Status,
    TurnInput,
)
from duplex_engine.session import Session

if TYPE_CHECKING:
    from duplex_engine.background import Delegations
    from duplex_engine.live.driver import LiveEngine
    from duplex_engine.live.summary import Summary

__all__ = ["LiveSession", "new_token"]

MAX_EVENTS = 256  # that wait for the next output
# Sound may come in chunks of a second; one that came earlier still does not hold up the rest.
MAX_AHEAD_TURNS = 5
MAX_JOBS = 16  # of `at_boundary` that wait
T = TypeVar("T")


def new_token() -> str:
    """22 characters that nobody guesses."""
    return secrets.token_urlsafe(16)


class LiveSession:
    """Made by `LiveEngine.open`. Use it as a context manager, or `close` it.

    Every method may be called from any thread at any time. Iterate over it, with `for` or
    `async for`, for its outputs: a `LiveTurn` for every step, until the session ends.

    Once the session has ended, methods that push raise SessionClosed.

    Attributes:
        id: its name in outputs, metrics and traces.
        delegations: what `LiveEngine.open` was given to answer the model's delegations, or None.
    """

    def __init__(
        self, live: LiveEngine, number: int, inner: Session, lease_s: float, summary: Summary | None
    ) -> None:
        turn_ms = live._layout.micro_turn_ms
        self.id = f"s{number}"
        self.lease_s = lease_s
        self.delegations: Delegations | None = None
        self._live = live
        self._number = number
        self._inner = inner
        self._summary = summary
        self._make_delegations: MakeDelegations | None = None
        # ---- under the live engine's lock
        self._epoch = 0
        self._is_interrupted = False
        self._is_attached = False
        self._is_leaving = False  # its file is being written, and takes nothing more
        self._token = new_token()
        self._period_us = turn_ms * 1000
        self._due_us = self._touched_us = 0
        self._intake = AudioIntake(turn_ms)
        self._mailbox = Mailbox()
        self._heard = Heard()
        self._events: deque[LiveEvent] = deque(maxlen=MAX_EVENTS)
        self._jobs: deque[tuple[Callable[[Session], Any], Future[Any]]] = deque()
        self._requests: deque[str] = deque(maxlen=MAX_EVENTS)  # open ones, for the trace
        self._is_summarising = False
        self._outbox = Outbox()
        self._ended: EndReason | None = None
        self._error: BaseException | None = None

    # ---- input

    def push_audio(
        self, chunk: object, seq: int | None = None, *, sample_rate: int | None = None
    ) -> Receipt:
        """Queues sound; a micro-turn runs as soon as its 200 ms are there.

        Args:
            chunk: as `audio` of `Session.step`, any length.
            seq: the number of the chunk, from 0; numbered chunks have one length. A repeated one is
                not appended twice, and the order is put right within a second. None: it follows
                what came before.
            sample_rate: Hz; None is 16 kHz. Fixed by the first sound of the session.

        Raises:
            InvalidArgument: not sound, NaN, or another rate or length than before.
        """
        samples = samples_1d(chunk)
        floats = samples.astype(np.float32, copy=True)  # the caller may use its array again
        if samples.dtype == np.int16:
            floats *= np.float32(INT16_SCALE)
        if seq is not None:
            seq = integer(seq, "seq", high=MAX_INT32)
        rate = SAMPLE_RATE if sample_rate is None else integer(sample_rate, "sample_rate", 1)
        with self._live._lock:
            self._check_open()
            now_us = self._touch()
            was_whole = self._intake.n_whole > 0
            status = self._intake.push(floats, seq, rate, now_us)
            if not was_whole and self._intake.n_whole > 0:
                self._due_us = now_us
                self._live._wake.set()
            return self._receipt(status, f"audio {'' if seq is None else seq}")

    def push_text(self, text: object, op_id: str | None = None) -> Receipt:
        """Queues what the user typed: a string, or token ids.

        op_id: the client's name for this push; a second one of the same name is "repeated".
        """
        return self._push_ids("text", text, op_id)

    def push_result(self, result: object, op_id: str | None = None) -> Receipt:
        """Queues what the background found: a string, or token ids; one enters each micro-turn."""
        receipt = self._push_ids("result", result, op_id)
        if receipt.status == "queued":
            with self._live._lock:
                note_result(self)
        return receipt

    def push_image(self, image: object, op_id: str | None = None) -> Receipt:
        """Queues a picture, (height, width, 3) uint8 RGB; one enters each micro-turn."""
        op_id = _checked(op_id)
        picture = rgb_image(image).copy()
        vision, most = self._inner._config.vision, self._live._layout.max_image_patches
        if vision is None:
            raise InvalidArgument("image: this checkpoint has no vision tower (no vision_config)")
        height, width, _ = picture.shape
        n_patches = -(-height // vision.patch_size) * (width // vision.patch_size + 1)
        if 0 < most < n_patches:
            raise InvalidArgument(
                f"image: expected at most {most} patches, found {n_patches} in "
                f"{height}x{width}; scale it down"
            )
        with self._live._lock:
            self._check_open()
            self._touch()
            return self._receipt(self._mailbox.push_image(picture, op_id), f"image {op_id or ''}")

    # ---- control

    def interrupt(self, op_id: str | None = None) -> int:
        """Stops the output and keeps the conversation; returns the epoch, one higher than before.

        Output of older epochs that was not read yet is not delivered any more. If the client has
        acknowledged any playback, the model's context is brought to what was heard: output behind
        the last acknowledged micro-turn is taken out, its input stays (`Rewound`).
        """
        op_id = _checked(op_id)
        with self._live._lock:
            self._check_open()
            self._touch()
            if self._mailbox.is_new(op_id):
                self._epoch += 1
                self._is_interrupted = True
                self._events.append(Interrupted(self._epoch))
                self._outbox.drop_before(self._epoch)
                self._live._count("interrupts")
                with suppress(SessionClosed):  # the engine may be closed, and the driver not know
                    self._inner.interrupt()  # a step at work ends behind its next token
            return self._epoch

    def playback_ack(self, turn: int, epoch: int | None = None) -> bool:
        """The user has heard all output up to micro-turn `turn` (`LiveTurn.turn.index`).

        epoch: of that output; one that is not the session's any more is not believed.

        Returns:
            False if it changes nothing: acknowledged before, not put out yet, or of an old epoch.
        """
        index = integer(turn, "turn", low=-MAX_INT32)
        if epoch is not None:
            epoch = integer(epoch, "epoch", low=-MAX_INT32)
        with self._live._lock:
            if self._ended is not None:
                return False
            self._touch()
            return epoch in (None, self._epoch) and self._heard.ack(index)

    def touch(self) -> None:
        """A sign of life: the lease begins again. Pushes, acks and interrupts do the same."""
        with self._live._lock:
            self._touch()

    def detach(self) -> str:
        """The client goes: time stops for the session. Returns its token; twice does no harm."""
        with self._live._lock:
            self._check_open()
            return self._live._detach(self)

    def at_boundary(self, call: Callable[[Session], T]) -> Future[T]:
        """Calls `call(session)` between two micro-turns, in the driver; e.g. to fork or truncate.

        All sessions wait while it runs, so keep it short, and keep no reference to the session.
        What it raises is raised by the future.

        Raises:
            CapacityError: 16 calls wait already.
        """
        check_callable(call, "at_boundary")
        future: Future[T] = Future()
        with self._live._lock:
            self._check_open()
            if len(self._jobs) >= MAX_JOBS:
                raise CapacityError(
                    f"at_boundary: expected at most {MAX_JOBS} calls that wait, found one more; "
                    "wait for one of them"
                )
            self._jobs.append((call, future))
            self._live._wake.set()
        return future

    def close(self) -> None:
        """Ends the session and gives its memory back, after a step at work; twice does no harm."""
        self._live._end(self, "closed")

    # ---- output

    def get(self, timeout_s: float | None = None) -> LiveTurn | None:
        """The next output; None after `timeout_s` seconds, or when the session has ended.

        timeout_s: less than 1e9; None waits as long as it takes.
        """
        return self._outbox.get(None if timeout_s is None else wait_seconds(timeout_s, "timeout_s"))

    async def get_async(self) -> LiveTurn | None:
        """The next output, awaited; None when the session has ended."""
        return await self._outbox.get_async()

    def __iter__(self) -> Iterator[LiveTurn]:
        while (turn := self.get()) is not None:
            yield turn

    async def __aiter__(self) -> AsyncIterator[LiveTurn]:
        while (turn := await self.get_async()) is not None:
            yield turn

    def on_turn(self, callback: Callable[[LiveTurn], object]) -> threading.Thread:
        """Calls `callback` with every output, in a thread of its own, which is returned.

        An exception of it ends this session, with the reason "callback".
        """
        check_callable(callback, "on_turn")
        if inspect.iscoroutinefunction(callback):
            raise InvalidArgument(
                f"on_turn: expected a plain function, found {found(callback)}, which is to be "
                "awaited; read with `async for out in session` there"
            )

        def deliver() -> None:
            try:
                for turn in self:
                    callback(turn)
            except BaseException as error:
                self._live._end(self, "callback", error)

        thread = threading.Thread(target=deliver, name=f"{self.id}-output", daemon=True)
        thread.start()
        return thread

    # ---- state

    @property
    def epoch(self) -> int:
        """Raised by every interruption."""
        return self._epoch

    @property
    def token(self) -> str:
        """What `LiveEngine.resume` takes when the client comes back; another one after that."""
        return self._token

    @property
    def ended(self) -> EndReason | None:
        """Why the session is over, or None."""
        return self._ended

    @property
    def error(self) -> BaseException | None:
        """What ended it, for the reasons "capacity", "error" and "callback"."""
        return self._error

    @property
    def attached(self) -> bool:
        """Whether it is being run: not detached, not over."""
        return self._is_attached and self._ended is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- for the driver, under its lock

    def _push_ids(self, kind: str, text: object, op_id: str | None) -> Receipt:
        op_id = _checked(op_id)
        ids = self._inner._ids(text, kind)
        with self._live._lock:
            self._check_open()
            self._touch()
            status = self._mailbox.push_ids(kind, ids, op_id)
            return self._receipt(status, f"{kind} {op_id or ''}")

    def _waiting_rows(self) -> int:
        """Rows of the next step beyond those of one micro-turn, for the scheduler."""
        layout = self._live._layout
        late = max(self._intake.n_whole - 1, 0) * (layout.audio_frames + 1)
        pictures = min(self._mailbox.n_images, 1) * layout.max_image_patches
        return late + self._mailbox.n_ids + pictures

    def _take(self, n_turns: int, now_us: int) -> TurnInput:
        """The input of the next step: `n_turns` micro-turns, or more if more are whole by now."""
        n_turns = max(n_turns, self._intake.n_whole)
        audio, filled_ms = self._intake.take(n_turns)
        given = TurnInput(n_turns, audio)
        self._mailbox.take(given)
        ahead_us = now_us + MAX_AHEAD_TURNS * self._period_us
        self._due_us = min(self._due_us + n_turns * self._period_us, ahead_us)
        if filled_ms > 0:
            self._events.append(AudioFilled(filled_ms))
            self._live._count("filled_ms", round(filled_ms))
        return given

    def _check_open(self) -> None:
        if self._ended is not None:
            raise SessionClosed(f"session {self.id}: it ended ({self._ended}); open a new one")
        if self._is_leaving:
            raise SessionClosed(f"session {self.id}: it is being parked; resume it by its token")

    def _options(self) -> dict[str, Any]:
        """What `LiveEngine.adopt` was given, for another session that goes on with this one."""
        return {
            "lease_s": self.lease_s,
            "summary": self._summary,
            "delegations": self._make_delegations,
        }

    @property
    def _is_away(self) -> bool:
        return not self._is_attached and not self._is_leaving

    def _attach(self) -> None:
        """Time begins for it, or goes on: a whole lease, and a period unless sound waits."""
        self._is_attached = True
        self._due_us = self._touch()
        if self._intake.n_whole == 0:
            self._due_us += self._period_us

    def _touch(self) -> int:
        self._touched_us = self._live.now_us()
        return self._touched_us

    def _receipt(self, status: Status, what: str) -> Receipt:
        if status != "queued":
            self._live._count(f"refused_{status}")
            if status != "repeated":
                self._events.append(Refused(status, what.strip()))
        return Receipt(status, self._intake.waiting_ms)


def _checked(op_id: str | None) -> str | None:
    """An operation's name, or None; raises InvalidArgument if it is no string."""
    return None if op_id is None else checked_text(op_id, "op_id")
