"""Our own held-out streams: composed from voices that were never trained on, run and scored.

Owns the loop over tasks and streams, for the engine and for the harness with a voice-activity
detector. Composing is `training/episodes.py`'s, judging `metrics.py`'s. The same seed gives the
same streams, so systems are compared on the same sound.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from duplex_engine.engine import Engine
from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation.metrics import StreamScore, score_stream
from duplex_engine.evaluation.silero import SpeechProbability
from duplex_engine.evaluation.streams import StreamLog, TimedWord, run_episode
from duplex_engine.evaluation.vad_baseline import HarnessOptions, run_turn_by_turn, user_turns
from duplex_engine.training.augment import augment
from duplex_engine.training.bank import Bank
from duplex_engine.training.episodes import MIX, TASKS, compose
from duplex_engine.training.stage import FRAMES_PER_TURN, REACTION_S, TURN_S, Episode
from duplex_engine.training.vocabulary import CONTROL_TOKENS, LISTEN, TOKENS, decode

__all__ = [
    "HeldOutStream",
    "Plan",
    "System",
    "check_fit",
    "engine_system",
    "harness_system",
    "held_out_streams",
    "open_bank",
]

FRAME_S = TURN_S / FRAMES_PER_TURN
System: TypeAlias = Callable[[Episode], StreamLog]


@dataclass(frozen=True, slots=True)
class Plan:
    """Which streams to run.

    Attributes:
        tasks: names of `episodes.TASKS`, or "mix".
        n_streams, n_turns: how many of each task, and how long each is, in micro-turns.
        seed: with the task's name and the stream's number it decides the stream.
        is_augmented: noise, room and codec on the sound, as in training.
        grace_turns: as `metrics.score_stream`.
    """

    tasks: tuple[str, ...]
    n_streams: int
    n_turns: int = 128
    seed: int = 0
    is_augmented: bool = False
    grace_turns: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.tasks) - {*TASKS, MIX}:
            raise InvalidArgument(
                f"tasks: expected some of {', '.join(TASKS)}, {MIX}; "
                f"found {', '.join(sorted(unknown))}"
            )


@dataclass(frozen=True, slots=True)
class HeldOutStream:
    """One stream of one task: what was to happen, what did, and how that is judged."""

    task: str
    episode: Episode
    log: StreamLog
    score: StreamScore

    def heard(self) -> list[TimedWord]:
        """The user's words whose times are known; only their ends are."""
        labels = self.episode.labels
        starts = np.flatnonzero((labels > 0) & (np.diff(labels, prepend=0) != 0))
        ends_s = [(int(i) + 1) * FRAME_S - REACTION_S for i in starts]
        return [
            TimedWord(TOKENS[labels[i]], end_s, end_s)
            for i, end_s in zip(starts, ends_s, strict=True)
        ]

    def due(self) -> list[TimedWord]:
        """What was to be said, from its decisive moment on."""
        return [
            TimedWord(decode(list(event.tokens)), event.time_s, event.time_s)
            for event in self.episode.events
            if event.tokens
        ]


def engine_system(engine: Engine, *, realtime: bool = False) -> System:
    """The model as it is meant: it hears everything as it comes and speaks when it wants."""

    def run(episode: Episode) -> StreamLog:
        with engine.open_session() as session:
            return run_episode(session, episode, realtime=realtime)

    return run


def harness_system(engine: Engine, options: HarnessOptions | None = None) -> System:
    """The same model behind a voice-activity detector, asked turn by turn.

    Raises:
        BackendUnavailable: the detector is not installed.
    """
    detector = SpeechProbability()

    def run(episode: Episode) -> StreamLog:
        turns = user_turns(detector.of(episode.audio), options)
        with engine.open_session() as session:
            return run_turn_by_turn(
                session,
                episode.audio,
                turns,
                images=episode.images,
                typed=episode.typed,
                results=episode.results,
                options=options,
            )

    return run


def open_bank(folder: Path, groups: Sequence[str] = (), voices: str = "*") -> Bank:
    """Opens a speech bank.

    Args:
        folder: of the bank.
        groups: that must have a voice.
        voices: pattern of the names of voices.

    Raises:
        InvalidArgument: there is no bank, and the message tells how to make one; or no such voice.
    """
    try:
        bank = Bank.open(folder).select(voices)
    except FileNotFoundError as error:
        raise InvalidArgument(str(error)) from error
    for group in groups:
        if not bank.voices(group):
            raise InvalidArgument(f"bank: expected voices of group '{group}', found none")
    return bank


def check_fit(engine: Engine) -> None:
    """Finds out whether a checkpoint's tokens and micro-turns are those of the streams.

    Raises:
        InvalidArgument: they are not, so nothing that it says could be right.
    """
    layout, tokenizer = engine.config.interaction, engine.tokenizer
    words = " ".join(TOKENS[len(CONTROL_TOKENS) :])
    ids = [] if tokenizer is None else tokenizer.encode(words)
    if (
        layout is None
        or (layout.micro_turn_ms, layout.listen) != (round(1000 * TURN_S), LISTEN)
        or ids != list(range(len(CONTROL_TOKENS), len(TOKENS)))
    ):
        raise InvalidArgument(
            f"bank: expected a checkpoint with micro-turns of {round(1000 * TURN_S)} ms and the "
            f"{len(TOKENS)} tokens of training/vocabulary.py, in which its streams are judged; "
            "found another"
        )


def held_out_streams(system: System, bank: Bank, group: str, plan: Plan) -> Iterator[HeldOutStream]:
    """Composes, runs and scores the streams of a plan, one after the other.

    Args:
        system: from `engine_system` or `harness_system`.
        bank: of speech.
        group: the voices to use.
        plan: which streams.

    Raises:
        InvalidArgument: the bank has no voice in this group.
    """
    treat = augment if plan.is_augmented else None
    for task in plan.tasks:
        for number in range(plan.n_streams):
            rng = np.random.default_rng([plan.seed, zlib.crc32(task.encode()), number])
            episode = compose(task, bank, rng, group, plan.n_turns, treat=treat)
            log = system(episode)
            score = score_stream(log, episode, grace_turns=plan.grace_turns)
            yield HeldOutStream(task, episode, log, score)
