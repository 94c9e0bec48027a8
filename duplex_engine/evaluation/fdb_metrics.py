"""The formulas of Full-Duplex-Bench v1 and v1.5, on word times and segments of speech.

Owns what can be computed without a judge model. Does not own files: see `full_duplex_bench.py`.
Written from the papers (arXiv 2503.04721, 2507.23159) and the published descriptions of the
metrics; where the official scripts have a quirk that changes figures, the comment says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from duplex_engine.evaluation.silero import Segment
from duplex_engine.evaluation.streams import TimedWord

__all__ = [
    "BEHAVIOURS",
    "Backchannels",
    "Behaviour",
    "backchannels",
    "behaviour",
    "jensen_shannon",
    "merged",
    "response_latencies",
    "stop_latencies",
    "took_turn",
    "words_after",
    "words_per_minute",
]

SHORT_S, SHORT_WORDS = 1.0, 3  # an utterance below both is a back-channel, not a turn
LONG_SEGMENT_S = 3.0
BACKCHANNEL_WORDS = 2
HISTOGRAM_WINDOW_S = 0.2
HISTOGRAM_FLOOR = 1e-10
USER_GAP_S, MODEL_GAP_S = 0.6, 0.5  # what the scripts use; their comments say other values
ASKS_AGAIN = {"sorry", "pardon", "repeat", "again", "what", "huh"}
SAME_SEQUENCE = 0.5  # share of the later words that an undisturbed run says too

Behaviour: TypeAlias = Literal["respond", "resume", "uncertain", "unknown"]
BEHAVIOURS: tuple[Behaviour, ...] = ("respond", "resume", "uncertain", "unknown")


def took_turn(words: Sequence[TimedWord]) -> bool:
    """Whether these words are a turn: there are any, and they last 1 s or are more than three."""
    if not words:
        return False
    return words[-1].end_s - words[0].start_s >= SHORT_S or len(words) > SHORT_WORDS


def words_after(words: Sequence[TimedWord], time_s: float) -> list[TimedWord]:
    """The words that end after `time_s`; one that is being said then begins there.

    The scripts cut the sound at this time before they recognise words, with the same effect.
    """
    return [replace(w, start_s=max(w.start_s, time_s)) for w in words if w.end_s > time_s]


def merged(segments: Sequence[Segment], gap_s: float) -> list[Segment]:
    """Segments in order, those at most `gap_s` apart joined."""
    joined: list[Segment] = []
    for start, end in sorted(segments):
        if joined and start - joined[-1][1] <= gap_s:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


@dataclass(frozen=True, slots=True)
class Backchannels:
    """Of one recording: was there a turn, back-channels per second, divergence of their times.

    `divergence` is None where there is no ground truth.
    """

    took_turn: bool
    per_second: float
    divergence: float | None


def backchannels(
    segments: Sequence[Segment],
    words: Sequence[TimedWord],
    duration_s: float,
    truth: NDArray[np.float64] | None,
) -> Backchannels:
    """v1 back-channel metrics.

    Segments are judged in order, and the last one decides about the turn. A recording without any
    has none; the scripts let the value of the recording before leak into it.

    Args:
        segments: of the model's speech.
        words: of the model.
        duration_s: of the recording.
        truth: (any number,) histogram of when people gave back-channels, or None.
    """
    is_turn = False
    short: list[Segment] = []
    for start, end in segments:
        if end - start > LONG_SEGMENT_S:
            is_turn = True
            break
        short.append((start, end))
        n_words = sum(w.start_s < end and w.end_s > start for w in words)
        is_turn = not (end - start < SHORT_S and n_words <= BACKCHANNEL_WORDS)
    divergence = None
    if truth is not None:
        divergence = _time_divergence(short, duration_s, truth) if short else 1.0
    return Backchannels(is_turn, len(short) / duration_s, divergence)


def _time_divergence(
    segments: Sequence[Segment], duration_s: float, truth: NDArray[np.float64]
) -> float:
    n_windows = max(int(np.ceil(duration_s / HISTOGRAM_WINDOW_S)), 1)
    histogram = np.full(n_windows, HISTOGRAM_FLOOR)
    for start, end in segments:
        first, last = int(start / HISTOGRAM_WINDOW_S), int(end / HISTOGRAM_WINDOW_S)
        histogram[first : last + 1] += 1
    expected = np.interp(
        np.linspace(0, 1, n_windows), np.linspace(0, 1, len(truth)), truth.astype(np.float64)
    )
    return jensen_shannon(histogram, expected)


def jensen_shannon(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Jensen-Shannon distance (square root, natural logarithm) of two histograms (n,)."""
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2

    def divergence(a: NDArray[np.float64]) -> float:
        used = a > 0
        return float(np.sum(a[used] * np.log(a[used] / middle[used])))

    return float(np.sqrt(max((divergence(p) + divergence(q)) / 2, 0.0)))


def stop_latencies(user: Sequence[Segment], model: Sequence[Segment]) -> list[float]:
    """v1.5: how long the model goes on under the user, for each end of their overlaps.

    user, model: segments of speech, before merging.
    """
    shortest: dict[int, float] = {}  # end in ms -> seconds
    for user_start, user_end in merged(user, USER_GAP_S):
        for model_start, model_end in merged(model, MODEL_GAP_S):
            start, end = max(user_start, model_start), min(user_end, model_end)
            if end > start:
                key = round(end * 1000)
                shortest[key] = min(shortest.get(key, np.inf), end - start)
    return [shortest[key] for key in sorted(shortest)]


def response_latencies(user: Sequence[Segment], model: Sequence[Segment]) -> list[float]:
    """v1.5: from the end of the user's speech to the model's next start, once for each start.

    user, model: segments of speech, before merging.
    """
    ends = [end for _, end in merged(user, USER_GAP_S)]
    starts = [start for start, _ in merged(model, MODEL_GAP_S)]
    latest: dict[float, float] = {}  # start of the model -> end of the user
    for end in ends:
        later = [start for start in starts if start > end]
        if later:
            latest[later[0]] = end
    return [start - latest[start] for start in sorted(latest)]


def behaviour(
    output: Sequence[TimedWord], clean: Sequence[TimedWord], overlap_start_s: float
) -> Behaviour:
    """v1.5: what the model did about the overlap, by rules in place of the benchmark's judge.

    Nothing new said after its start: "unknown". Mostly words that the model says in the same order
    without the overlap too: "resume". Asking to repeat: "uncertain". Else: "respond".

    Args:
        output: words with the overlapping sound.
        clean: words of a run without it.
        overlap_start_s: speech begun before does not count.
    """
    later = [_plain(w.text) for w in output if w.start_s >= overlap_start_s]
    if not later:
        return "unknown"
    expected = [_plain(w.text) for w in clean]
    matcher = difflib.SequenceMatcher(None, later, expected, autojunk=False)
    n_same = sum(block.size for block in matcher.get_matching_blocks())
    if n_same >= SAME_SEQUENCE * len(later):
        return "resume"
    return "uncertain" if ASKS_AGAIN.intersection(later) else "respond"


def words_per_minute(words: Sequence[TimedWord]) -> float | None:
    """Words over the time from the first to the last; None below two words, or without a time."""
    if len(words) < 2 or words[-1].end_s <= words[0].start_s:
        return None
    return len(words) / (words[-1].end_s - words[0].start_s) * 60


def _plain(word: str) -> str:
    return "".join(c for c in word.casefold() if c.isalnum())
