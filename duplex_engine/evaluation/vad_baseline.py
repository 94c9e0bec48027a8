"""The usual way as a baseline: a voice-activity detector decides whose turn it is.

Owns the harness around the same model: it listens for speech, waits for the silence after it, asks
the model with what was said, and plays the answer until the user speaks again. The log that comes
out is judged by the same metrics as a stream, on the same sound.

The model is favoured where the harness allows it: it keeps its context from one turn to the next,
and whatever it says while it reads the user's turn counts as its answer; only, nobody hears it
before the detector has decided.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from duplex_engine.arrays import SAMPLE_RATE
from duplex_engine.evaluation.silero import WINDOW_S
from duplex_engine.evaluation.streams import TURN_S, Audio, Ids, Steps, StreamLog, TurnLog, logged

__all__ = ["HarnessOptions", "UserTurn", "run_turn_by_turn", "user_turns"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HarnessOptions:
    """When the harness acts.

    Attributes:
        threshold: of the detector's probability.
        min_speech_s: speech this long begins a turn, or cuts the model off.
        end_silence_s: silence this long ends a turn.
        lead_s: sound before the turn's beginning that the model hears too.
        answer_turns: micro-turns of silence in which the model may begin its answer.
        max_answer_turns: of an answer in all.
    """

    threshold: float = 0.5
    min_speech_s: float = 0.1
    end_silence_s: float = 0.6
    lead_s: float = 0.2
    answer_turns: int = 5
    max_answer_turns: int = 50


@dataclass(frozen=True, slots=True)
class UserTurn:
    """What the harness takes for a turn of the user, in seconds.

    Attributes:
        start_s: where its sound begins.
        noticed_s: when the harness knew that somebody speaks.
        end_s: when it decided that the turn is over; its sound ends here too.
    """

    start_s: float
    noticed_s: float
    end_s: float


def user_turns(
    probabilities: NDArray[np.float32], options: HarnessOptions | None = None
) -> list[UserTurn]:
    """The turns that a harness sees, from the detector's probability for each window of 32 ms.

    Causal: each decision uses the windows before it only. A turn that the recording cuts off ends
    with the recording.
    """
    chosen = options or HarnessOptions()
    turns: list[UserTurn] = []
    speech_s = quiet_s = 0.0
    start_s = noticed_s = 0.0
    is_turn = False
    for i, probability in enumerate(probabilities):
        now_s = (i + 1) * WINDOW_S
        is_speech = probability >= chosen.threshold
        if not is_turn:
            speech_s = speech_s + WINDOW_S if is_speech else 0.0
            if speech_s >= chosen.min_speech_s:
                is_turn, quiet_s = True, 0.0
                start_s, noticed_s = max(now_s - speech_s - chosen.lead_s, 0.0), now_s
        else:
            quiet_s = 0.0 if is_speech else quiet_s + WINDOW_S
            if quiet_s >= chosen.end_silence_s:
                turns.append(UserTurn(start_s, noticed_s, now_s))
                is_turn, speech_s = False, 0.0
    if is_turn:
        turns.append(UserTurn(start_s, noticed_s, len(probabilities) * WINDOW_S))
    return turns


def run_turn_by_turn(
    session: Steps,
    audio: Audio,
    turns: Sequence[UserTurn],
    *,
    images: Mapping[int, NDArray[np.uint8]] | None = None,
    typed: Ids | None = None,
    results: Ids | None = None,
    options: HarnessOptions | None = None,
) -> StreamLog:
    """Asks the model once for each turn of the user; the log is on the clock of `audio`.

    Pictures, typed text and results enter with the user's turn in whose time, or before which, they
    came: nothing else calls the model. Where two would enter in one micro-turn, the later one of
    the pictures is kept, and the others wait a micro-turn.

    Args:
        session: an open session, at its beginning.
        audio: (n,) samples at 16 kHz.
        turns: from `user_turns`.
        images, typed, results: by micro-turn of `audio`.
    """
    chosen = options or HarnessOptions()
    n_samples = round(TURN_S * SAMPLE_RATE)
    n_turns = -(-len(audio) // n_samples)
    waiting_images: dict[int, NDArray[np.uint8]] = dict(images or {})
    waiting_typed: dict[int, str | Sequence[int]] = dict(typed or {})
    waiting_results: dict[int, str | Sequence[int]] = dict(results or {})
    said: list[TurnLog] = []
    for number, turn in enumerate(turns):
        sound = audio[round(turn.start_s * SAMPLE_RATE) : round(turn.end_s * SAMPLE_RATE)]
        n_heard = -(-len(sound) // n_samples)
        padded = np.zeros((n_heard + chosen.max_answer_turns) * n_samples, np.float32)
        padded[: len(sound)] = sound
        first, last = int(turn.start_s / TURN_S), int(turn.end_s / TURN_S)
        answer: list[TurnLog] = []
        began = time.perf_counter()
        for k, piece in enumerate(padded.reshape(-1, n_samples)):
            now = min(first + k, last)  # micro-turn of the recording that the model is led through
            image = _newest(waiting_images, now)
            text = _oldest(waiting_typed, now)
            result = _oldest(waiting_results, now)
            step = session.step(piece, image, text, result=result)
            log = logged(step, k, 0.0, time.perf_counter() - began)
            if log.token_ids:
                answer.append(log)
            spoke_after = bool(answer) and answer[-1].index >= n_heard
            n_silent = k - (answer[-1].index if spoke_after else n_heard - 1)
            if n_silent >= (1 if spoke_after else chosen.answer_turns):
                break
        cut_s = turns[number + 1].noticed_s if number + 1 < len(turns) else np.inf
        said += _played(answer, turn.end_s, cut_s)
    return StreamLog(tuple(said), n_turns * TURN_S)


def _played(answer: Sequence[TurnLog], asked_s: float, cut_s: float) -> Iterator[TurnLog]:
    """The answer as it is heard: a micro-turn's share at a time, until the user is noticed.

    answer: its `compute_s` count from the asking.
    """
    at_s = asked_s
    for log in answer:
        at_s = max(at_s, asked_s + log.compute_s)
        if at_s >= cut_s:
            return
        yield replace(log, index=max(math.ceil(at_s / TURN_S) - 1, 0), emitted_s=at_s)
        at_s += TURN_S


def _oldest(waiting: dict[int, T], now: int) -> T | None:
    due = min(waiting, default=now + 1)
    return waiting.pop(due) if due <= now else None


def _newest(waiting: dict[int, T], now: int) -> T | None:
    due = [turn for turn in waiting if turn <= now]
    newest = waiting[max(due)] if due else None
    for turn in due:
        del waiting[turn]
    return newest
