"""Sound that asks for nothing: silence, noise, music, other speech, right lists, bad recordings.

Owns these sounds. Whatever a model says on them is a false alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import soxr

from duplex_engine.engine import Engine
from duplex_engine.evaluation.metrics import Alarms, score_alarms, score_stream
from duplex_engine.evaluation.streams import Audio, run_stream
from duplex_engine.training import phrases, sounds, tasks_lists
from duplex_engine.training.bank import Bank
from duplex_engine.training.stage import (
    FRAMES_PER_TURN,
    SAMPLE_RATE,
    TURN_S,
    TURN_SAMPLES,
    Episode,
    Stage,
)

__all__ = ["CONDITIONS", "quiet_alarms"]

NARROW_HZ = 8000
CLIP_AT = 0.08  # of the loudest sample
GAP_S = (0.2, 0.9)  # between two pieces
MAX_CASTS = 50  # voices tried for a piece
LISTS = tuple(dict.fromkeys(items for items, *_ in tasks_lists.LISTS))


@dataclass(frozen=True, slots=True)
class Condition:
    """A kind of sound.

    Attributes:
        play: adds some of it to the stage; False if the voices have none.
        change: what the recording does to it.
        sample_rate: at which it is given to the engine.
    """

    play: Callable[[Stage], bool]
    change: Callable[[Audio], Audio] = lambda audio: audio
    sample_rate: int = SAMPLE_RATE


def _silence(stage: Stage) -> bool:
    """Nothing, or the noise of a quiet microphone."""
    seconds = float(stage.rng.uniform(2.0, 6.0))
    level = 10.0 ** (stage.rng.uniform(-90.0, -55.0) / 20.0) * stage.rng.integers(2)
    noise = level * stage.rng.standard_normal(round(seconds * SAMPLE_RATE))
    stage.play_here(noise.astype(np.float32))
    return True


def _noise(stage: Stage) -> bool:
    stage.play_here(sounds.random_sound(stage.rng))
    return True


def _right_list(stage: Stage) -> bool:
    """A list or a sentence word by word, from its beginning and without a mistake."""
    known = [sentence.split() for sentence in phrases.SENTENCES]
    sayable = [words for words in (*LISTS, *known) if stage.can_say(*words)]
    if not sayable:
        return False
    gap_s = float(stage.rng.uniform(0.05, 0.6))
    for word in stage.pick(sayable):
        stage.say(word)
        stage.wait(0.7 * gap_s, 1.3 * gap_s)
    stage.wait(1.5, 2.5)
    return True


def _loudly(audio: Audio) -> Audio:
    limit = np.float32(np.abs(audio).max(initial=1e-6) * CLIP_AT)
    return np.clip(audio, -limit, limit) * np.float32(0.9) / limit


CONDITIONS = {
    "silence": Condition(_silence),
    "noises": Condition(_noise),
    "music": Condition(lambda stage: stage.play_other("music")),
    "other languages": Condition(lambda stage: stage.play_other("foreign")),
    "unknown sentences": Condition(
        lambda stage: stage.play_other("speech") or stage.play_other("chatter")
    ),
    "right lists": Condition(_right_list),
    "right lists, clipped": Condition(_right_list, _loudly),
    "right lists at 8 kHz": Condition(_right_list, sample_rate=NARROW_HZ),
}


def quiet_alarms(
    engine: Engine, bank: Bank, group: str, *, n_streams: int, n_turns: int = 128, seed: int = 0
) -> dict[str, Alarms]:
    """False alarms by condition, from streams of the voices of a group."""
    figures = {}
    for index, (name, condition) in enumerate(CONDITIONS.items()):
        scores = []
        for number in range(n_streams):
            rng = np.random.default_rng([seed, index, number])
            for audio in _stream(Stage(bank, rng, group), condition, n_turns):
                with engine.open_session() as session:
                    log = run_stream(session, audio, sample_rate=condition.sample_rate)
                scores.append(score_stream(log, _nothing_due(n_turns)))
        if scores:
            figures[name] = score_alarms(scores)
    return figures


def _stream(stage: Stage, condition: Condition, n_turns: int) -> Iterator[Audio]:
    """One stream, or none where the voices have no such sound."""
    n_mute = 0
    while stage.time_s < n_turns * TURN_S:
        stage.change_voice()
        if condition.play(stage):
            n_mute = 0
            stage.wait(*GAP_S)
            continue
        n_mute += 1
        if n_mute == MAX_CASTS:
            return
    audio = condition.change(stage.mixed(n_turns * TURN_SAMPLES))
    if condition.sample_rate != SAMPLE_RATE:
        audio = soxr.resample(audio, SAMPLE_RATE, condition.sample_rate)
    yield audio


def _nothing_due(n_turns: int) -> Episode:
    labels = np.zeros(FRAMES_PER_TURN * n_turns, np.int16)
    return Episode(np.zeros(0, np.float32), {}, {}, {}, {}, [], labels, labels)
