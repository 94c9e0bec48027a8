"""A showcase: a recording with what is said in it, and what a good listener says when.

Owns the files (`showcase.flac`, `showcase.json`) and the comparison of a run with them, word by
word. The package's own is in `duplex_engine/examples/`; `training/showcase.py` made it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation.streams import Audio, StreamLog, TimedWord, read_audio

__all__ = ["RECORDING", "SCRIPT", "Due", "Reaction", "Script", "Showcase", "react", "read_showcase"]

RECORDING, SCRIPT = "showcase.flac", "showcase.json"
WINDOW_S = 1.2  # in which a reaction must begin


@dataclass(frozen=True, slots=True)
class Due:
    """What the model should put out, and from when on it can know.

    Attributes:
        kind: as in `training/stage.py`: "correct", "pronounce", "delegate", "answer", ...
        why: what happened, for people.
        time_s: the decisive moment, the end of a word.
        say: the words; for "delegate", the request.
    """

    kind: str
    why: str
    time_s: float
    say: str


@dataclass(frozen=True, slots=True)
class Script:
    """What `showcase.json` holds.

    Attributes:
        source: who speaks, and the licence.
        heard: what the user says: each word and its end in seconds.
        due: what the model should put out, by time.
        background: what the background model knows: request -> result.
        background_s: how long it takes.
    """

    source: str
    heard: tuple[tuple[str, float], ...]
    due: tuple[Due, ...]
    background: Mapping[str, str]
    background_s: float


@dataclass(frozen=True, slots=True)
class Showcase:
    """A script and its recording: (n,) samples at 16 kHz."""

    audio: Audio = field(repr=False)
    script: Script

    @property
    def heard(self) -> list[TimedWord]:
        """The user's words; only their ends are known."""
        return [TimedWord(text, end_s, end_s) for text, end_s in self.script.heard]


@dataclass(frozen=True, slots=True)
class Reaction:
    """What became of something due; `said_s` is None where it did not come in time."""

    due: Due
    said_s: float | None

    @property
    def latency_s(self) -> float | None:
        """From the decisive moment until the output was there."""
        return None if self.said_s is None else self.said_s - self.due.time_s


def read_showcase(folder: Path) -> Showcase:
    """Reads the two files of a showcase.

    Raises:
        InvalidArgument: one is missing or damaged.
    """
    path = folder / SCRIPT
    try:
        script = TypeAdapter(Script).validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidArgument(
            f"{path}: expected the script of a showcase, found: {error}"
        ) from error
    except ValidationError as error:
        raise InvalidArgument(f"{path}: expected the script of a showcase: {error}") from error
    return Showcase(read_audio(folder / RECORDING), script)


def react(showcase: Showcase, log: StreamLog, results: Mapping[int, str]) -> list[Reaction]:
    """What the model put out for each thing due, and for each result of the background model.

    results: by micro-turn, those that entered the stream.
    """
    due = list(showcase.script.due)
    for turn, text in sorted(results.items()):
        # The model could know when the micro-turn that brought the result began.
        due.append(Due("result", "the result came", turn * log.turn_s, text))
    words = _words(log)
    requests = [(turn.emitted_s, text) for turn in log.turns for text in turn.delegations]
    reactions = []
    for item in sorted(due, key=lambda item: item.time_s):
        said = requests if item.kind == "delegate" else list(_runs(words, len(item.say.split())))
        times_s = (
            at_s
            for at_s, text in said
            if text == item.say and 0.0 < at_s - item.time_s <= WINDOW_S + log.turn_s
        )
        reactions.append(Reaction(item, next(times_s, None)))
    return reactions


def _words(log: StreamLog) -> list[tuple[float, str]]:
    return [(turn.emitted_s, word) for turn in log.turns for word in turn.text.split()]


def _runs(words: list[tuple[float, str]], n: int) -> Iterator[tuple[float, str]]:
    """All runs of n words, each with the time of its first."""
    for start in range(len(words) - n + 1):
        run = words[start : start + n]
        yield run[0][0], " ".join(word for _, word in run)
