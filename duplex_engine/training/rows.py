"""From an episode to the rows of one sequence, in the order in which the engine will build them.

Owns that order, the targets, and the deliberate mistakes in what is fed back. Rows carry no
embedding: ``model.py`` makes that. The engine's side of the same rule is
``csrc/engine/micro_turn.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from duplex_engine.training import vocabulary
from duplex_engine.training.vocabulary import (
    LISTEN,
    RESULT,
    RESULT_END,
    USER_TEXT,
    USER_TEXT_END,
)

__all__ = [
    "AUDIO",
    "IMAGE",
    "NO_TARGET",
    "N_TURNS",
    "PADDING",
    "TEXT",
    "Lesson",
    "Rows",
    "Stream",
    "layout",
    "mask_bins",
    "spoil",
]

N_TURNS = 128  # of a training episode
FRAMES_PER_TURN = 4
PADDING, TEXT, IMAGE, AUDIO = range(4)  # kinds of rows
NO_TARGET = -1
MAX_LATE_RUN = 2  # micro-turns of an output that may come late as a whole
P_LATER = 0.25  # that it is late by two micro-turns instead of one
CORRECTIONS = [vocabulary.token_id(word) for word in ("no", "say")]
P_CORRECTION = 0.7  # that a false word after a word of the user's is a correction


@dataclass(slots=True)
class Stream:
    """An episode with its sound as bins: what training needs of it, and what shards store.

    Attributes:
        bins: (n_turns * 4, 80) uint8 dMel bins.
        labels, expected: (n_turns * 4,) int16, see `stage.Episode`.
        images, typed, results, outputs: by micro-turn, see `stage.Episode`.
    """

    bins: NDArray[np.uint8]
    labels: NDArray[np.int16]
    images: Mapping[int, NDArray[np.uint8]]
    typed: Mapping[int, Sequence[int]]
    results: Mapping[int, Sequence[int]]
    outputs: Mapping[int, Sequence[int]]
    expected: NDArray[np.int16]

    @property
    def n_turns(self) -> int:
        """Micro-turns of the stream."""
        return len(self.labels) // FRAMES_PER_TURN

    def copy(self) -> Stream:
        """Another stream of the same parts; assigning to its fields leaves this one alone."""
        return replace(self)


@dataclass(slots=True)
class Rows:
    """One sequence, (n,) rows.

    Attributes:
        kinds: (n,) uint8, one of TEXT, IMAGE, AUDIO.
        values: (n,) int32: a token id, the number of a picture, the number of a frame.
        targets: (n,) int16: the token to be put out after the row, or NO_TARGET.
        labels: (n,) int16: the word that ended before an audio row (0: none), else NO_TARGET.
        expected: (n,) int16: likewise the word that should come next.
        bins: (n_frames, 80) uint8.
        images: (n_images, 40, 39, 3) uint8.
    """

    kinds: NDArray[np.uint8]
    values: NDArray[np.int32]
    targets: NDArray[np.int16]
    labels: NDArray[np.int16]
    expected: NDArray[np.int16]
    bins: NDArray[np.uint8]
    images: NDArray[np.uint8]


class Lesson(NamedTuple):
    """By micro-turn: the outputs that are fed back, and those that are right in view of them."""

    fed: Mapping[int, Sequence[int]]
    due: Mapping[int, Sequence[int]]


def layout(stream: Stream, lesson: Lesson | None = None) -> Rows:
    """The rows of a stream.

    A micro-turn is `[result] [typed text] [picture] [4 frames] | output ... listen`; the last audio
    row and every output row but `listen` have a target.

    lesson: what is fed back, and what is right in view of that: target by target where both have a
        token, and `listen` beyond the right ones. None: no mistakes.
    """
    fed, due = lesson or Lesson(stream.outputs, stream.outputs)
    rows: list[tuple[int, int, int, int, int]] = []  # kind, value, target, label, expected
    images: list[NDArray[np.uint8]] = []

    def text(*ids: int) -> None:
        rows.extend((TEXT, id_, NO_TARGET, NO_TARGET, NO_TARGET) for id_ in ids)

    for turn in range(stream.n_turns):
        if turn in stream.results:
            text(RESULT, *stream.results[turn], RESULT_END)
        if turn in stream.typed:
            text(USER_TEXT, *stream.typed[turn], USER_TEXT_END)
        if turn in stream.images:
            rows.append((IMAGE, len(images), NO_TARGET, NO_TARGET, NO_TARGET))
            images.append(stream.images[turn])
        right = [*due.get(turn, ()), LISTEN]
        said = fed.get(turn, ())
        first = turn * FRAMES_PER_TURN
        for frame in range(first, first + FRAMES_PER_TURN):
            is_last = frame == first + FRAMES_PER_TURN - 1
            target = right[0] if is_last else NO_TARGET
            words = int(stream.labels[frame]), int(stream.expected[frame])
            rows.append((AUDIO, frame, target, *words))
        for number, id_ in enumerate(said, start=1):
            target = right[number] if number < len(right) else LISTEN
            rows.append((TEXT, id_, target, NO_TARGET, NO_TARGET))
        text(LISTEN)
    kinds, values, targets, labels, expected = np.array(rows, np.int32).T
    return Rows(
        kinds=kinds.astype(np.uint8),
        values=values,
        targets=targets.astype(np.int16),
        labels=labels.astype(np.int16),
        expected=expected.astype(np.int16),
        bins=stream.bins,
        images=np.stack(images) if images else np.zeros((0, 40, 39, 3), np.uint8),
    )


def spoil(
    stream: Stream,
    rng: np.random.Generator,
    *,
    p_late: float = 0.14,
    p_missed: float = 0.06,
    p_wrong: float = 0.04,
    p_silence: float = 0.006,
) -> Lesson:
    """Mistakes to be fed back: the model must live with its own, and make good what it missed.

    An output comes one or two micro-turns late, and stays due until then, so what could not yet be
    told from the sound may be said when it can; it never comes; it begins with a wrong word;
    silence is broken by a word, or by the correction of a word that was right. Long answers are
    spared: they go on from what was really said.
    """
    words = range(len(vocabulary.CONTROL_TOKENS), len(vocabulary.TOKENS))
    fed = {turn: list(tokens) for turn, tokens in stream.outputs.items()}
    due = {turn: list(tokens) for turn, tokens in stream.outputs.items()}
    for first, end in _runs(stream.outputs):
        if end - first > MAX_LATE_RUN:
            continue
        draw = rng.random()
        late = 1 + int(rng.random() < P_LATER)
        is_free = not any(turn in due for turn in range(end, end + late + 1))
        if draw < p_late and is_free and end + late <= stream.n_turns:
            tokens = [stream.outputs[turn] for turn in range(first, end)]
            for turn in range(first, end):
                del fed[turn]
            for turn in range(first, first + late):
                due[turn] = list(tokens[0])
            for turn, delayed in enumerate(tokens, start=first + late):
                fed[turn], due[turn] = list(delayed), list(delayed)
        elif p_late <= draw < p_late + p_missed and is_free:
            for turn in range(first, end):
                del fed[turn]
            for turn in range(first, min(first + 1 + late, stream.n_turns)):
                due[turn] = list(stream.outputs[first])
        elif 1.0 - p_wrong < draw:
            fed[first][0] = int(rng.integers(words.start, words.stop))
    for turn in np.flatnonzero(rng.random(stream.n_turns) < p_silence).tolist():
        if not any(near in due for near in (turn - 1, turn, turn + 1)):
            frame = turn * FRAMES_PER_TURN
            known = int(stream.expected[frame]) or int(stream.labels[frame])
            if known and rng.random() < P_CORRECTION:
                fed[turn] = [CORRECTIONS[int(rng.integers(len(CORRECTIONS)))], known]
            else:
                fed[turn] = [int(rng.integers(words.start, words.stop))]
    return Lesson(fed, due)


def _runs(outputs: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
    """First and end of every run of consecutive micro-turns with output."""
    runs: list[tuple[int, int]] = []
    for turn in sorted(outputs):
        if runs and runs[-1][1] == turn:
            runs[-1] = (runs[-1][0], turn + 1)
        else:
            runs.append((turn, turn + 1))
    return runs


def mask_bins(bins: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A copy of (frames, bands) bins with some bands and moments silenced, some levels off by one.

    What is left out must be guessed from the rest, so no single band decides.
    """
    masked = bins.copy()
    n_frames, n_bands = bins.shape
    off = rng.random(bins.shape) < rng.uniform(0.0, 0.1)
    masked[off] = np.clip(masked[off].astype(np.int16) + rng.choice((-1, 1), off.sum()), 0, 15)
    for _ in range(int(rng.integers(0, 1 + n_frames // 100))):
        start = int(rng.integers(n_frames))
        band = int(rng.integers(n_bands))
        masked[start : start + 40, band : band + int(rng.integers(2, 10))] = 0
    for _ in range(int(rng.integers(0, 1 + n_frames // 150))):
        masked[int(rng.integers(n_frames))] = 0
    return masked
