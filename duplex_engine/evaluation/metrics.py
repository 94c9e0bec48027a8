"""What a stream put out, compared with what it should have: hits, errors, false alarms, latency.

Owns the rules by which an output belongs to an event. An `Episode` says what was to happen
(`training/stage.py`), a `StreamLog` what did; nothing here knows a model.

Rules, in this order, on output tokens:
1. An event with tokens is hit by the first run of just these tokens that begins inside its window.
   Its latency is from the decisive moment to when the first of them was out.
2. An event not hit whose tokens came in the two seconds before is early.
3. What the episode expects besides, such as the later words of a long answer, is used up by equal
   tokens at most two micro-turns away.
4. An event neither hit nor early, with other tokens left in its window, is wrong; else missed.
5. A `stop` is right if nothing that was going on comes out later than 400 ms after it.
6. Every other event without tokens (a right word, a pause, a noise) is right if nothing is left
   inside its window and nothing early began there. Where the model was speaking, it must also have
   gone on.
7. Tokens that no rule used are false alarms; those in adjacent micro-turns are one alarm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from duplex_engine.evaluation.estimates import Estimate, quantile, rate, share
from duplex_engine.evaluation.streams import StreamLog
from duplex_engine.training.stage import NOISE, PICTURE, TYPED, Episode, Event

__all__ = [
    "Alarms",
    "EventScore",
    "KindScore",
    "Outcome",
    "StreamScore",
    "score_alarms",
    "score_kinds",
    "score_stream",
    "score_synthesisers",
]

Outcome: TypeAlias = Literal["right", "early", "wrong", "missed"]

NO_VOICES = (TYPED, PICTURE, NOISE)
NEAR_TURNS = 2  # how far from its turn an expected output may come
EARLY_TURNS = 10
STOP = "stop"
STOP_S = 0.4  # time to fall silent


@dataclass(frozen=True, slots=True)
class EventScore:
    """How one event of a voice went; `latency_s` only where something was to be said and was.

    For a `stop`, the latency is from its moment to the end of the last output.
    """

    kind: str
    time_s: float
    outcome: Outcome
    latency_s: float | None = None
    voice: str = ""


@dataclass(frozen=True, slots=True)
class StreamScore:
    """How one stream went.

    Attributes:
        events: in order of time.
        alarms_s: when each false alarm began.
        quiet_s: seconds in which nothing was to be said: everything but the windows of events with
            tokens and the micro-turns of expected output.
        speech_s: the part of it in which the user spoke: at most two micro-turns from one in
            which a word ended.
        n_alarms_in_speech: false alarms that began there.
    """

    events: tuple[EventScore, ...]
    alarms_s: tuple[float, ...]
    quiet_s: float
    speech_s: float
    n_alarms_in_speech: int


@dataclass(frozen=True, slots=True)
class KindScore:
    """Figures of one kind of event over many streams."""

    right: Estimate
    early: Estimate
    wrong: Estimate
    latency_median_s: Estimate
    latency_p95_s: Estimate


@dataclass(frozen=True, slots=True)
class Alarms:
    """False alarms: their rate per minute of time to be quiet, and the minutes.

    The `speech` ones are of correct speech alone, without the silence around it.
    """

    per_minute: Estimate
    minutes: float
    per_speech_minute: Estimate
    speech_minutes: float


@dataclass(slots=True)
class _Token:
    id: int
    turn: int
    emitted_s: float
    used: Literal["", "event", "early", "expected", "error"] = ""


def score_stream(log: StreamLog, episode: Episode, *, grace_turns: int = 0) -> StreamScore:
    """Compares one stream with its episode.

    grace_turns: added to the window of every event with tokens, for a system that is known to be
        late and is to be judged by what it says.
    """
    said = [_Token(id_, turn.index, turn.emitted_s) for turn in log.turns for id_ in turn.token_ids]
    events = sorted(episode.events, key=lambda event: event.time_s)
    scores: dict[int, EventScore] = {}
    for i, event in enumerate(events):
        if event.tokens and (first := _take(said, event, _window(event, grace_turns), "event")):
            latency_s = first.emitted_s - event.time_s
            scores[i] = EventScore(event.kind, event.time_s, "right", latency_s)
    for i, event in enumerate(events):
        before = range(event.turn - EARLY_TURNS, event.turn)
        if event.tokens and i not in scores and _take(said, event, before, "early"):
            scores[i] = EventScore(event.kind, event.time_s, "early")
    _take_expected(said, episode.outputs)
    for i, event in enumerate(events):
        if event.tokens and i not in scores:
            scores[i] = _not_hit(said, event, _window(event, grace_turns))
    for i, event in enumerate(events):
        if not event.tokens:
            judge = _stopped if event.kind == STOP else _undisturbed
            scores[i] = judge(said, event, episode.outputs)
    alarms = _alarms(said)
    quiet = _quiet_turns(episode)
    speech = quiet & _speech_turns(episode)
    return StreamScore(
        events=tuple(replace(scores[i], voice=event.voice) for i, event in enumerate(events)),
        alarms_s=tuple(token.emitted_s for token in alarms),
        quiet_s=len(quiet) * log.turn_s,
        speech_s=len(speech) * log.turn_s,
        n_alarms_in_speech=sum(token.turn in speech for token in alarms),
    )


def score_kinds(streams: Sequence[StreamScore]) -> dict[str, KindScore]:
    """Figures for each kind of event, by name."""
    by_kind: dict[str, list[list[EventScore]]] = defaultdict(list)
    for stream in streams:
        mine: dict[str, list[EventScore]] = defaultdict(list)
        for event in stream.events:
            # What was typed, or was noise, says nothing about a voice: apart.
            apart = f"{event.kind} ({event.voice})" if event.voice in (TYPED, NOISE) else ""
            mine[apart or event.kind].append(event)
        for kind, events in mine.items():
            by_kind[kind].append(events)
    figures = {}
    for kind, of_streams in sorted(by_kind.items()):
        outcomes = [event.outcome for events in of_streams for event in events]
        latencies = [
            [e.latency_s for e in events if e.latency_s is not None] for events in of_streams
        ]
        figures[kind] = KindScore(
            right=share(outcomes.count("right"), len(outcomes)),
            early=share(outcomes.count("early"), len(outcomes)),
            wrong=share(outcomes.count("wrong"), len(outcomes)),
            latency_median_s=quantile(latencies, 0.5),
            latency_p95_s=quantile(latencies, 0.95),
        )
    return figures


def score_synthesisers(streams: Sequence[StreamScore]) -> dict[str, dict[str, Estimate]]:
    """The share of right ones by kind of event and by what made the voice ("espeak", "piper")."""
    outcomes: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    spoken = [e for stream in streams for e in stream.events if e.voice not in NO_VOICES]
    for event in spoken:
        outcomes[event.kind][event.voice.partition("/")[0]].append(event.outcome == "right")
    return {
        kind: {name: share(sum(right), len(right)) for name, right in sorted(of_kind.items())}
        for kind, of_kind in sorted(outcomes.items())
    }


def score_alarms(streams: Sequence[StreamScore]) -> Alarms:
    """False alarms of all streams."""
    minutes = [stream.quiet_s / 60 for stream in streams]
    speech_minutes = [stream.speech_s / 60 for stream in streams]
    return Alarms(
        per_minute=rate([len(stream.alarms_s) for stream in streams], minutes),
        minutes=sum(minutes),
        per_speech_minute=rate([stream.n_alarms_in_speech for stream in streams], speech_minutes),
        speech_minutes=sum(speech_minutes),
    )


def _window(event: Event, grace_turns: int = 0) -> range:
    return range(event.turn, event.turn + event.window_turns + grace_turns)


def _take(
    said: Sequence[_Token], event: Event, turns: range, use: Literal["event", "early"]
) -> _Token | None:
    """Uses up the event's tokens, if a run of them begins in these turns; returns the first."""
    n = len(event.tokens)
    for start, token in enumerate(said):
        run = said[start : start + n]
        if (
            token.turn in turns
            and tuple(t.id for t in run) == event.tokens
            and not any(t.used for t in run)
        ):
            for t in run:
                t.used = use
            return token
    return None


def _take_expected(said: Iterable[_Token], outputs: Mapping[int, Sequence[int]]) -> None:
    """Uses up tokens that the episode expects near their micro-turn."""
    left = {turn: list(tokens) for turn, tokens in outputs.items()}
    for token in said:
        near = sorted(
            (t for t in left if abs(t - token.turn) <= NEAR_TURNS and token.id in left[t]),
            key=lambda t: abs(t - token.turn),
        )
        if near and token.used != "early":
            left[near[0]].remove(token.id)
            token.used = token.used or "expected"


def _not_hit(said: Sequence[_Token], event: Event, window: range) -> EventScore:
    """Wrong or missed; what is left in the window is this event's error, not a false alarm too."""
    others = [t for t in said if not t.used and t.turn in window]
    for token in others:
        token.used = "error"
    return EventScore(event.kind, event.time_s, "wrong" if others else "missed")


def _stopped(said: Sequence[_Token], event: Event, _: Mapping[int, Sequence[int]]) -> EventScore:
    """What is still said after a stop is the stop's error, not a false alarm too."""
    going_on = [t for t in said if t.turn in _window(event) and t.used in ("", "expected")]
    for token in going_on:
        token.used = "error"
    latency_s = max((t.emitted_s - event.time_s for t in going_on), default=0.0)
    outcome: Outcome = "right" if latency_s <= STOP_S else "wrong"
    return EventScore(event.kind, event.time_s, outcome, latency_s)


def _undisturbed(
    said: Sequence[_Token], event: Event, outputs: Mapping[int, Sequence[int]]
) -> EventScore:
    window = _window(event)
    if any(t.used in ("", "early") and t.turn in window for t in said):
        return EventScore(event.kind, event.time_s, "wrong")
    goes_on = {t.id for t in said if window[0] - NEAR_TURNS <= t.turn <= window[-1] + NEAR_TURNS}
    expected = {id_ for turn in window for id_ in outputs.get(turn, ())}
    outcome: Outcome = "right" if expected <= goes_on else "missed"
    return EventScore(event.kind, event.time_s, outcome)


def _alarms(said: Iterable[_Token]) -> list[_Token]:
    """The first token of each false alarm."""
    first: list[_Token] = []
    last_turn = -2
    for token in said:
        if not token.used:
            if token.turn > last_turn + 1:
                first.append(token)
            last_turn = token.turn
    return first


def _quiet_turns(episode: Episode) -> set[int]:
    quiet = set(range(episode.n_turns)) - episode.outputs.keys()
    for event in episode.events:
        if event.tokens:
            quiet.difference_update(_window(event))
    return quiet


def _speech_turns(episode: Episode) -> set[int]:
    has_word = episode.labels.reshape(episode.n_turns, -1).any(axis=1)
    return {
        near
        for turn in np.flatnonzero(has_word).tolist()
        for near in range(turn - NEAR_TURNS, turn + NEAR_TURNS + 1)
    }
