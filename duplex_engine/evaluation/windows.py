"""Time windows: did the model say the right thing inside its window (as TimeSpeak and CueSpeak).

Owns the file of windows and the score. Each item has one recording, one window and one expected
meaning; where the published benchmarks let a model judge the meaning, here words are compared.

A file of windows is CSV with a header, or a JSON list of objects, with the fields

    audio     sound file, relative to the file of windows
    start_s   the window, in seconds of the recording
    end_s
    expect    words that must be said in the window, in order; empty for any
    category  optional; figures are also given for each
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation.estimates import Estimate, share
from duplex_engine.evaluation.streams import Audio, StreamLog, TimedWord, read_audio

__all__ = ["Window", "WindowScore", "read_windows", "says_in_order", "score_windows"]


@dataclass(frozen=True, slots=True)
class Window:
    """When what should be said."""

    audio: Path
    start_s: float
    end_s: float
    expect: str
    category: str


@dataclass(frozen=True, slots=True)
class WindowScore:
    """Shares of all windows, and of right ones by category.

    Attributes:
        spoke: something was said inside.
        right: the expected words were said inside.
        by_category: `right` of each category.
        macro_accuracy: the mean of these, NaN without any window.
        n_outside: words said outside every window of their recording.
    """

    spoke: Estimate
    right: Estimate
    by_category: Mapping[str, Estimate]
    macro_accuracy: float
    n_outside: int


def read_windows(path: Path) -> list[Window]:
    """Reads a file of windows.

    Raises:
        InvalidArgument: it is not as above; the message names the entry.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Excel's begins with a mark
            rows: Iterable[Any] = (
                json.load(file) if path.suffix == ".json" else csv.DictReader(file)
            )
            windows = [_window(path, i, row) for i, row in enumerate(rows, start=1)]
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"{path}: expected a CSV or JSON file, found: {error}") from error
    if not windows:
        raise InvalidArgument(f"{path}: expected entries, found none")
    return windows


def score_windows(windows: Sequence[Window], run: Callable[[Audio], StreamLog]) -> WindowScore:
    """Runs each recording once and scores its windows.

    Args:
        windows: of any number of recordings.
        run: one stream, in a fresh session.
    """
    spoke: list[bool] = []
    right: dict[str, list[bool]] = {}
    n_outside = 0
    for audio in dict.fromkeys(window.audio for window in windows):
        words = run(read_audio(audio)).words()
        mine = [window for window in windows if window.audio == audio]
        for window in mine:
            said = [w.text for w in words if _inside(w, window)]
            spoke.append(bool(said))
            right.setdefault(window.category, []).append(
                bool(said) and says_in_order(said, window.expect.split())
            )
        n_outside += sum(not any(_inside(w, window) for window in mine) for w in words)
    by_category = {name: share(sum(hits), len(hits)) for name, hits in sorted(right.items())}
    accuracies = [estimate.value for estimate in by_category.values()]
    return WindowScore(
        spoke=share(sum(spoke), len(spoke)),
        right=share(sum(map(sum, right.values())), len(spoke)),
        by_category=by_category,
        macro_accuracy=sum(accuracies) / len(accuracies) if accuracies else float("nan"),
        n_outside=n_outside,
    )


def says_in_order(said: Sequence[str], expected: Sequence[str]) -> bool:
    """Whether `expected` is among the words said, in order, perhaps with others between.

    Case and punctuation do not count.
    """
    words = iter(_plain(word) for word in said)
    return all(word in words for word in map(_plain, expected) if word)


def _inside(word: TimedWord, window: Window) -> bool:
    return window.start_s <= word.start_s < window.end_s


def _window(path: Path, number: int, row: Any) -> Window:
    try:
        window = Window(
            audio=path.parent / row["audio"],
            start_s=float(row["start_s"]),
            end_s=float(row["end_s"]),
            expect=str(row.get("expect") or ""),
            category=str(row.get("category") or "all"),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{path}: entry {number}: expected audio, start_s, end_s, perhaps expect and category; "
            f"found {row}"
        ) from error
    if not 0 <= window.start_s < window.end_s:
        raise InvalidArgument(
            f"{path}: entry {number}: expected 0 <= start_s < end_s, "
            f"found {window.start_s} and {window.end_s}"
        )
    if not window.audio.is_file():
        raise InvalidArgument(
            f"{path}: entry {number}: expected a sound file, found no {window.audio}"
        )
    return window


def _plain(word: str) -> str:
    return "".join(c for c in word.casefold() if c.isalnum())
