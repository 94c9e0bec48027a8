"""What a client sends, in order and once, before any of it enters the model.

Owns the order of numbered sound, the silence in place of what never comes, the memory of op ids,
and the caps on what may wait. Knows no engine and no clock: times are given. Read `session.py` for
who pushes, `turns.py` for who takes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from duplex_engine.arrays import SAMPLE_RATE, Resampler
from duplex_engine.errors import InvalidArgument
from duplex_engine.live.types import Status, TurnInput

__all__ = [
    "BURST_MS",
    "MAX_WAITING_IDS",
    "MAX_WAITING_IMAGES",
    "MAX_WAITING_MS",
    "AudioIntake",
    "Mailbox",
    "Result",
]

BURST_MS = 5_000.0  # sound that may come ahead of real time
MAX_WAITING_MS = 2 * BURST_MS  # of sound: a burst, and as much where turns are late
PACE = 1.05  # of real time: a client's clock may be a little fast
WINDOW_MS = 1_000.0  # how far ahead of a missing chunk others are kept,
MAX_AHEAD = 64  # and how many
MAX_REMEMBERED = 1_024  # numbers and op ids that are recognised when they come again
MAX_WAITING_IDS = 2_048
MAX_WAITING_IMAGES = 4
MOVED = 2  # new chunks in a row that have no place: the stream itself has moved

Floats = NDArray[np.float32]
Result: TypeAlias = tuple[list[int], int]  # token ids, and the micro-turn that asked for them or -1
K = TypeVar("K")


class _Memory(Generic[K]):
    """The newest `MAX_REMEMBERED` keys."""

    def __init__(self) -> None:
        self._keys: OrderedDict[K, None] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._keys

    def add(self, key: K) -> None:
        self._keys[key] = None
        if len(self._keys) > MAX_REMEMBERED:
            self._keys.popitem(last=False)

    def clear(self) -> None:
        self._keys.clear()


class AudioIntake:
    """One session's sound: chunks in, whole micro-turns at 16 kHz out.

    Positions are samples at the client's rate since the session began. Numbered chunks have one
    length; chunk n lies n lengths behind the place of chunk 0.
    """

    def __init__(self, turn_ms: int) -> None:
        self.turn_samples = turn_ms * SAMPLE_RATE // 1000
        self._rate: int | None = None
        self._resampler: Resampler | None = None
        self._ready: deque[Floats] = deque()  # 16 kHz, in order
        self._n_ready = 0  # samples of it
        self._end = 0  # position up to which sound is known or filled
        self._ahead: dict[int, Floats] = {}  # by position, beyond a gap
        self._chunk = 0  # samples of a numbered chunk; 0 before the first
        self._origin = 0  # place of chunk 0
        self._newest = -1
        self._filled_ms = 0.0  # of silence that `take` has not told yet
        self._n_misplaced = 0  # newest chunks in a row that had no place
        self._seen: _Memory[int] = _Memory()
        self._level_ms = 0.0  # pushed and not yet paid for by time
        self._level_at_us: int | None = None

    @property
    def n_whole(self) -> int:
        """Micro-turns whose sound is all there."""
        return self._n_ready // self.turn_samples

    @property
    def waiting_ms(self) -> float:
        """Sound that waits in order."""
        return self._n_ready * 1000 / SAMPLE_RATE

    def push(self, samples: Floats, seq: int | None, sample_rate: int, now_us: int) -> Status:
        """Takes a chunk (n,); raises InvalidArgument for another rate or length than before."""
        if self._rate is not None and sample_rate != self._rate:
            raise InvalidArgument(
                f"sample_rate: expected {self._rate} Hz as in the sound before, "
                f"found {sample_rate}; open another session, or resample first"
            )
        resampler = self._resampler
        if self._rate is None and sample_rate != SAMPLE_RATE:
            resampler = Resampler(sample_rate)
        if seq is not None and self._chunk not in (0, len(samples)):
            raise InvalidArgument(
                f"audio: expected numbered chunks of one length, {self._chunk} samples, "
                f"found {len(samples)}; pad the last, or push without seq"
            )
        if seq is not None and len(samples) == 0:
            raise InvalidArgument("audio: expected samples in a numbered chunk, found none")
        if seq is not None and seq in self._seen:
            return "repeated"
        ms = len(samples) * 1000 / sample_rate
        if not self._has_time_for(ms, now_us):
            return "too_fast"
        if self.waiting_ms + ms > MAX_WAITING_MS:
            return "full"
        before = self._rate, self._resampler, self._chunk
        self._rate, self._resampler = sample_rate, resampler
        if seq is not None:
            status = self._place(samples, seq)
            if status != "queued":
                self._rate, self._resampler, self._chunk = before
                return status
        elif len(samples) > 0:
            self._close_gaps()  # it follows what came before,
            self._append(samples)
            self._origin += len(samples)  # and the next number follows it
        self._level_ms += ms
        return "queued"

    def take(self, n_turns: int) -> tuple[Floats, float]:
        """(n_turns * turn_samples,) at 16 kHz, and the milliseconds of it that did not come."""
        wanted = n_turns * self.turn_samples
        filled_ms, self._filled_ms = self._filled_ms, 0.0
        while self._n_ready < wanted:
            filled_ms += self._fill(wanted - self._n_ready)
        parts: list[Floats] = []
        while wanted > 0:
            part = self._ready.popleft()
            if len(part) > wanted:
                self._ready.appendleft(part[wanted:])
                part = part[:wanted]
            parts.append(part)
            wanted -= len(part)
            self._n_ready -= len(part)
        return np.concatenate(parts), filled_ms

    def take_all(self) -> Floats | None:
        """All that came, with silence up to the end of a micro-turn; None where nothing did."""
        self._close_gaps()
        n_turns = -(-self._n_ready // self.turn_samples)
        return self.take(n_turns)[0] if n_turns > 0 else None

    def restart_numbering(self) -> None:
        """The next numbered chunk may have any number within the window, and any length."""
        self._close_gaps()
        self._chunk, self._newest, self._n_misplaced = 0, -1, 0
        self._seen.clear()

    def _has_time_for(self, ms: float, now_us: int) -> bool:
        elapsed_ms = 0.0 if self._level_at_us is None else (now_us - self._level_at_us) / 1000
        self._level_ms = max(self._level_ms - elapsed_ms * PACE, 0.0)
        self._level_at_us = now_us
        return self._level_ms + ms <= BURST_MS

    def _place(self, samples: Floats, seq: int) -> Status:
        n_ahead = int(WINDOW_MS * self._rate_hz / 1000) // len(samples)
        window = min(max(n_ahead, 1), MAX_AHEAD) * len(samples)
        if self._chunk == 0:
            self._chunk = len(samples)
            self._origin = self._end
        begin = self._origin + seq * self._chunk
        is_late = begin + self._chunk <= self._end
        if is_late or begin > self._end + window:
            if seq <= self._newest:
                return "late" if is_late else "early"
            self._newest = seq
            self._n_misplaced += 1
            if self._n_misplaced < MOVED:
                return "late" if is_late else "early"
            self._close_gaps()
            self._origin += self._end - begin
            begin = self._end
        if seq > self._newest:
            self._newest, self._n_misplaced = seq, 0
        self._seen.add(seq)
        self._ahead[begin] = samples
        self._join()
        return "queued"

    @property
    def _rate_hz(self) -> int:
        return SAMPLE_RATE if self._rate is None else self._rate

    def _join(self) -> None:
        """Moves chunks that now follow the end from `_ahead` to the ready sound."""
        while self._ahead and (begin := min(self._ahead)) <= self._end:
            samples = self._ahead.pop(begin)
            self._append(samples[self._end - begin :])  # its head may have been filled

    def _close_gaps(self) -> None:
        """What is missing before the chunks ahead will not come: silence takes its place."""
        while self._ahead:
            n = min(self._ahead) - self._end
            self._append(np.zeros(n, np.float32))
            self._filled_ms += n * 1000 / self._rate_hz
            self._join()

    def _append(self, samples: Floats) -> None:
        self._end += len(samples)
        if self._resampler is not None:
            samples = self._resampler.push(samples)
        if len(samples):
            self._ready.append(samples)
            self._n_ready += len(samples)

    def _fill(self, n_samples: int) -> float:
        """Appends silence for `n_samples` at 16 kHz, or up to the next chunk; its milliseconds."""
        n = -(-n_samples * self._rate_hz // SAMPLE_RATE)
        if self._ahead:
            n = min(n, min(self._ahead) - self._end)
        self._append(np.zeros(n, np.float32))
        self._join()
        return n * 1000 / self._rate_hz


class Mailbox:
    """One session's text, pictures and results until the next micro-turn takes them."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._results: deque[Result] = deque()
        self._images: deque[Any] = deque()
        self._ops: _Memory[str] = _Memory()

    def push_ids(self, kind: str, ids: list[int], op_id: str | None) -> Status:
        """Takes token ids of `kind`, "text" or "result"."""
        if op_id is not None and op_id in self._ops:
            return "repeated"
        is_text = kind == "text"
        n_waiting = len(self._text) if is_text else self._n_result_ids
        if n_waiting + len(ids) > MAX_WAITING_IDS:
            return "full"
        self._remember(op_id)
        if is_text:
            self._text += ids
        elif ids:
            self._results.append((ids, -1))
        return "queued"

    def push_next(self, result: list[int]) -> bool:
        """Takes token ids that enter before all results that wait; False where those are many."""
        is_full = self._n_result_ids + len(result) > MAX_WAITING_IDS
        if not is_full:
            self._results.appendleft((result, -1))
        return not is_full

    def asked(self, turn: int) -> None:
        """Says which micro-turn asked for the result that enters next."""
        self._results[0] = (self._results[0][0], turn)

    def take_back(self, first: int, results: list[Result]) -> None:
        """After a rewind to before micro-turn `first`: these results wait again, before all others.

        What was asked for in that micro-turn or later is dropped.
        """
        waiting = (*results, *self._results)
        self._results = deque((ids, asked) for ids, asked in waiting if asked < first)

    def push_image(self, image: Any, op_id: str | None) -> Status:
        """Takes a picture; one enters each step."""
        if op_id is not None and op_id in self._ops:
            return "repeated"
        if len(self._images) >= MAX_WAITING_IMAGES:
            return "full"
        self._remember(op_id)
        self._images.append(image)
        return "queued"

    def is_new(self, op_id: str | None) -> bool:
        """Whether an operation without data has not been done yet; it has from now on."""
        if op_id is not None and op_id in self._ops:
            return False
        self._remember(op_id)
        return True

    @property
    def has_result(self) -> bool:
        """Whether a result waits."""
        return bool(self._results)

    @property
    def n_ids(self) -> int:
        """Token ids that the next micro-turn takes."""
        return len(self._text) + (len(self._results[0][0]) if self._results else 0)

    @property
    def _n_result_ids(self) -> int:
        return sum(len(result) for result, _ in self._results)

    @property
    def n_images(self) -> int:
        """Pictures that wait."""
        return len(self._images)

    def take(self, given: TurnInput) -> None:
        """Moves what waits into `given`: of results and pictures one, the oldest."""
        given.text, self._text = self._text, []
        if self._results:
            given.result, given.asked = self._results.popleft()
        if self._images:
            given.images = [self._images.popleft()]

    def take_all(self, given: TurnInput) -> None:
        """Moves all that waits into `given`; several results become one."""
        given.text, self._text = self._text, []
        given.result = [token for ids, _ in self._results for token in ids]
        given.images = list(self._images)
        self._results.clear()
        self._images.clear()

    def _remember(self, op_id: str | None) -> None:
        if op_id is not None:
            self._ops.add(op_id)
