"""A stream through a session, and what came out of it when.

Owns the pace, the clock and the route of results from a background agent back into the stream. Does
not own what is right or wrong: see `metrics.py`. The clock's zero is the first sample of the
stream; sound at time t can first be answered at the end of its micro-turn plus the time that the
engine needs for it, so latencies hold in real time even where a stream was run faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from duplex_engine.arrays import SAMPLE_RATE
from duplex_engine.errors import InvalidArgument
from duplex_engine.types import Delegation, MicroTurn

if TYPE_CHECKING:
    from duplex_engine.training.stage import Episode

__all__ = [
    "Agent",
    "Audio",
    "Steps",
    "StreamLog",
    "TimedWord",
    "TurnLog",
    "Watch",
    "read_audio",
    "run_episode",
    "run_stream",
]

TURN_S = 0.2
Audio: TypeAlias = NDArray[np.float32]
Ids: TypeAlias = Mapping[int, str | Sequence[int]]  # micro-turn -> text, or its tokens
Watch: TypeAlias = Callable[[Audio, str | Sequence[int] | None, MicroTurn], None]
Agent: TypeAlias = Callable[[str], str | None]  # a delegated request to its result, if any


class Steps(Protocol):
    """What a stream needs of a `Session`."""

    def step(
        self,
        audio: object = None,
        image: object = None,
        text: object = None,
        *,
        result: object = None,
        sample_rate: int | None = None,
    ) -> MicroTurn:
        """Runs one micro-turn."""
        ...


@dataclass(frozen=True, slots=True)
class TimedWord:
    """A word and when it was said, in seconds of the stream."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class TurnLog:
    """What one micro-turn put out.

    Attributes:
        index: number of the micro-turn at whose end the output was due.
        emitted_s: when its output was there.
        compute_s: how long the engine worked on it.
        token_ids: its tokens, without the one that ended it.
        text: its text for the user.
        delegations: the requests that it completed.
    """

    index: int
    emitted_s: float
    compute_s: float
    token_ids: tuple[int, ...]
    text: str = ""
    delegations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StreamLog:
    """What came out of one stream, in order.

    Attributes:
        turns: its micro-turns; silent ones may be left out.
        duration_s: seconds of input.
        turn_s: seconds of a micro-turn.
    """

    turns: tuple[TurnLog, ...]
    duration_s: float
    turn_s: float = TURN_S

    @property
    def text(self) -> str:
        """All text for the user."""
        return "".join(turn.text for turn in self.turns)

    def words(self) -> list[TimedWord]:
        """The words of the text; those of one micro-turn share its length, from `emitted_s` on."""
        words: list[TimedWord] = []
        is_open = False  # the last word may go on in the next piece of text
        for turn in self.turns:
            parts = turn.text.split()
            share_s = self.turn_s / max(len(parts), 1)
            for i, part in enumerate(parts):
                start_s = turn.emitted_s + i * share_s
                if i == 0 and is_open and not turn.text[0].isspace():
                    last = words.pop()
                    words.append(TimedWord(last.text + part, last.start_s, start_s + share_s))
                else:
                    words.append(TimedWord(part, start_s, start_s + share_s))
            if turn.text:
                is_open = not turn.text[-1].isspace()
        return words


@dataclass
class _Background:
    """Asks the agent and holds each result back until it is due."""

    agent: Agent
    delay_s: float
    _results: list[tuple[float, str]] = field(default_factory=list)

    def ask(self, turn: TurnLog) -> None:
        for request in turn.delegations:
            start = time.perf_counter()
            result = self.agent(request)
            took_s = time.perf_counter() - start
            if result is not None:
                self._results.append((turn.emitted_s + self.delay_s + took_s, result))

    def due(self, now_s: float) -> str | None:
        """The oldest result that is there; one per micro-turn, so that each has its brackets."""
        ready = min(self._results, default=None)
        if ready is None or ready[0] > now_s:
            return None
        self._results.remove(ready)
        return ready[1]


def run_stream(
    session: Steps,
    audio: Audio,
    *,
    images: Mapping[int, NDArray[np.uint8]] | None = None,
    typed: Ids | None = None,
    results: Ids | None = None,
    agent: Agent | None = None,
    agent_delay_s: float = 0.0,
    realtime: bool = False,
    turn_s: float = TURN_S,
    sample_rate: int = SAMPLE_RATE,
    watch: Watch | None = None,
) -> StreamLog:
    """Runs a whole stream, micro-turn by micro-turn.

    Args:
        session: an open session, at its beginning.
        audio: (n,) samples; the last micro-turn is filled with silence.
        images, typed, results: what enters besides, by micro-turn.
        agent: answers the model's delegations; its result enters with the first micro-turn that
            begins after the answer is there.
        agent_delay_s: seconds added to what the agent takes.
        realtime: give no sound before it would have been heard, and measure with the wall clock.
        turn_s: seconds of a micro-turn.
        sample_rate: of `audio`.
        watch: called after each micro-turn, with its sound, the result that entered, its output.
    """
    images, typed, results = images or {}, typed or {}, results or {}
    background = None if agent is None else _Background(agent, agent_delay_s)
    n_samples = round(turn_s * sample_rate)
    n_turns = -(-len(audio) // n_samples)
    padded = np.zeros(n_turns * n_samples, np.float32)
    padded[: len(audio)] = audio
    turns: list[TurnLog] = []
    start = time.perf_counter()
    free_s = 0.0  # when the engine is done with what came before
    for k in range(n_turns):
        heard_s = (k + 1) * turn_s
        if realtime:
            time.sleep(max(start + heard_s - time.perf_counter(), 0.0))
        result: str | Sequence[int] | None = results.get(k)
        if result is None and background is not None:
            result = background.due(k * turn_s)
        began = time.perf_counter()
        sound = padded[k * n_samples : (k + 1) * n_samples]
        turn = session.step(
            sound,
            images.get(k),
            typed.get(k),
            result=result,
            sample_rate=sample_rate,
        )
        ended = time.perf_counter()
        free_s = ended - start if realtime else max(free_s, heard_s) + (ended - began)
        turns.append(logged(turn, k, free_s, ended - began))
        if watch is not None:
            watch(sound, result, turn)
        if background is not None:
            background.ask(turns[-1])
    return StreamLog(tuple(turns), n_turns * turn_s, turn_s)


def run_episode(session: Steps, episode: Episode, *, realtime: bool = False) -> StreamLog:
    """Runs a composed episode; its results come when the episode says, asked for or not."""
    return run_stream(
        session,
        episode.audio,
        images=episode.images,
        typed=episode.typed,
        results=episode.results,
        realtime=realtime,
    )


def read_audio(path: Path) -> Audio:
    """A sound file as samples (n,) at 16 kHz, channels averaged.

    Raises:
        InvalidArgument: it is not there, or no sound file.
    """
    try:
        path.stat()  # of a file that is not there libsndfile says "System error"
        samples, sample_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise InvalidArgument(f"{path}: expected a sound file, found: {error}") from error
    mono = samples.mean(axis=1, dtype=np.float32)
    resampled: Audio = soxr.resample(mono, sample_rate, SAMPLE_RATE)
    return resampled


def logged(turn: MicroTurn, index: int, emitted_s: float, compute_s: float) -> TurnLog:
    """What a micro-turn put out, on the stream's clock."""
    n_said = len(turn.token_ids) - (turn.stopped != "limit")
    return TurnLog(
        index=index,
        emitted_s=emitted_s,
        compute_s=compute_s,
        token_ids=turn.token_ids[:n_said],
        text=turn.text,
        delegations=tuple(e.text for e in turn.events if isinstance(e, Delegation)),
    )
