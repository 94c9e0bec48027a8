"""Full-Duplex-Bench v1 and v1.5: their folders run through the engine, and scored.

Owns the layout of the data (point it at the real one; none of it is shipped) and which metric
belongs to which set. The formulas are in `fdb_metrics.py`.

    ROOT/<set>/<id>/input.wav, clean_input.wav      what the user says, any rate
                    turn_taking.json, interrupt.json, metadata.json    times of what happens
    OUT/<set>/<id>/output.json, clean_output.json   {"text", "chunks": [{"text", "timestamp"}]}
                   output.wav                       where the model speaks in sound

The engine's models write text, so `output.json` holds its words at the times when they came out.
With the outputs of another system in OUT, only `score` is needed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from duplex_engine.arrays import SAMPLE_RATE
from duplex_engine.errors import InvalidArgument
from duplex_engine.evaluation import fdb_metrics as metrics
from duplex_engine.evaluation.estimates import Estimate, mean, quantile, share
from duplex_engine.evaluation.silero import Segment, VadOptions
from duplex_engine.evaluation.streams import Audio, StreamLog, TimedWord, read_audio

__all__ = [
    "SETS",
    "Activity",
    "Figures",
    "find_sets",
    "run_bench",
    "score",
    "score_set",
    "v15_average",
]

Activity: TypeAlias = Callable[[Audio], Sequence[Segment]]  # samples at 16 kHz to speech
Run: TypeAlias = Callable[[Audio], StreamLog]
Figures: TypeAlias = dict[str, Estimate]

GROUND_TRUTH = "icc_gt_distribution.json"
OUTPUT_OF = {"input.wav": "output.json", "clean_input.wav": "clean_output.json"}


@dataclass(frozen=True, slots=True)
class _Sample:
    """One recording: its data, and what a system made of it."""

    data: Path
    output: Path
    activity: Activity

    @property
    def words(self) -> list[TimedWord]:
        return read_words(self.output / "output.json")

    @property
    def clean_words(self) -> list[TimedWord]:
        return read_words(self.output / "clean_output.json")

    def label(self, name: str) -> Any:
        """A label file; lists hold one entry."""
        value = _read_json(self.data / name)
        return value[0] if isinstance(value, list) and value else value

    def time(self, name: str, key: str, which: int) -> float:
        """One of the two times of a label file."""
        label = self.label(name)
        try:
            return float(label[key][which])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InvalidArgument(
                f"{self.data / name}: expected '{key}': [start, end], found {label}"
            ) from error

    @property
    def model_segments(self) -> Sequence[Segment]:
        """When the model speaks: in its sound where it has one, else when its words come.

        Words are one run until a silence that a detector would hear, not until the engine was some
        milliseconds slower than a micro-turn before.
        """
        sound = self.output / "output.wav"
        if sound.exists():
            return self.activity(read_audio(sound))
        spoken = [(w.start_s, w.end_s) for w in self.words]
        return metrics.merged(spoken, VadOptions().min_silence_s)

    @property
    def user_segments(self) -> Sequence[Segment]:
        return self.activity(read_audio(self.data / "input.wav"))


def _pause_handling(samples: list[_Sample]) -> Figures:
    return {"take-over rate": _share(metrics.took_turn(s.words) for s in samples)}


def _turn_taking(samples: list[_Sample]) -> Figures:
    return _turns_after((s.words, s.time("turn_taking.json", "timestamp", 0)) for s in samples)


def _user_interruption(samples: list[_Sample]) -> Figures:
    ends = [(s, s.time("interrupt.json", "timestamp", 1)) for s in samples]
    return _turns_after((metrics.words_after(s.words, end_s), end_s) for s, end_s in ends)


def _backchannel(samples: list[_Sample]) -> Figures:
    found = []
    for s in samples:
        duration_s = len(read_audio(s.data / "input.wav")) / SAMPLE_RATE
        found.append(
            metrics.backchannels(s.model_segments, s.words, duration_s, _ground_truth(s.data))
        )
    return {
        "take-over rate": _share(f.took_turn for f in found),
        "back-channels per second": mean([f.per_second for f in found]),
        "divergence": mean([f.divergence for f in found if f.divergence is not None]),
    }


def _overlap(samples: list[_Sample]) -> Figures:
    times = [s.time("metadata.json", "timestamps", 0) for s in samples]
    ends = [s.time("metadata.json", "timestamps", 1) for s in samples]
    did = Counter(
        metrics.behaviour(s.words, s.clean_words, time_s)
        for s, time_s in zip(samples, times, strict=True)
    )
    speech = [(s.user_segments, s.model_segments) for s in samples]
    stops = [metrics.stop_latencies(user, model) for user, model in speech]
    answers = [metrics.response_latencies(user, model) for user, model in speech]
    before = [[w for w in s.words if w.end_s <= e] for s, e in zip(samples, ends, strict=True)]
    after = [[w for w in s.words if w.end_s > e] for s, e in zip(samples, ends, strict=True)]
    return {
        **{f"{name} (rules)": share(did[name], len(samples)) for name in metrics.BEHAVIOURS},
        "stop latency median, s": quantile(stops, 0.5),
        "stop latency p95, s": quantile(stops, 0.95),
        "response latency median, s": quantile(answers, 0.5),
        "response latency p95, s": quantile(answers, 0.95),
        "words per minute before": _mean_speed(before),
        "words per minute after": _mean_speed(after),
        "words per minute clean": _mean_speed([s.clean_words for s in samples]),
    }


# set -> what scores it
SETS: Mapping[str, Callable[[list[_Sample]], Figures]] = {
    "candor_pause_handling": _pause_handling,
    "synthetic_pause_handling": _pause_handling,
    "candor_turn_taking": _turn_taking,
    "synthetic_user_interruption": _user_interruption,
    "icc_backchannel": _backchannel,
    "user_interruption": _overlap,
    "user_backchannel": _overlap,
    "talking_to_other": _overlap,
    "background_speech": _overlap,
}
DESIRED: Mapping[str, str] = {
    "user_interruption": "respond (rules)",
    "user_backchannel": "resume (rules)",
    "talking_to_other": "resume (rules)",
    "background_speech": "resume (rules)",
}


def find_sets(root: Path) -> list[str]:
    """The known sets below `root`.

    Raises:
        InvalidArgument: there is none.
    """
    names = [name for name in SETS if (root / name).is_dir()]
    if not names:
        raise InvalidArgument(
            f"{root}: expected a folder of Full-Duplex-Bench sets ({', '.join(SETS)}), found none"
        )
    return names


def run_bench(root: Path, out: Path, run: Run) -> int:
    """Runs every recording of every known set below `root`; returns how many.

    Args:
        root: holds the sets.
        out: takes the outputs, in the same folders.
        run: one stream, in a fresh session.

    Raises:
        InvalidArgument: there is no known set, or a file is damaged.
    """
    n_runs = 0
    for name in find_sets(root):
        for folder in _folders(root / name):
            for heard, said in OUTPUT_OF.items():
                if (folder / heard).exists():
                    target = out / name / folder.name
                    target.mkdir(parents=True, exist_ok=True)
                    write_words(target / said, run(read_audio(folder / heard)).words())
                    n_runs += 1
    return n_runs


def score(root: Path, out: Path, activity: Activity) -> dict[str, Figures]:
    """The figures of every known set below `root`, by the name of the set.

    Args:
        root: holds the sets.
        out: holds the outputs; it may be `root`.
        activity: finds speech; `silero.SpeechProbability` is what the benchmark uses.

    Raises:
        InvalidArgument: there is no known set, or a file is missing or damaged.
    """
    return {name: score_set(root / name, out / name, activity) for name in find_sets(root)}


def score_set(data: Path, out: Path, activity: Activity) -> Figures:
    """The figures of one set; its folder's name says which task it is."""
    samples = [_Sample(f, out / f.name, activity) for f in _folders(data)]
    return SETS[data.name](samples)


def v15_average(figures: Mapping[str, Figures]) -> float | None:
    """Mean share of the desired behaviour over the four v1.5 sets, or None if one is missing.

    Respond to an interruption, resume after the rest. The benchmark defines no such average; this
    is the one that published figures most likely mean.
    """
    if not DESIRED.keys() <= figures.keys():
        return None
    return sum(figures[name][label].value for name, label in DESIRED.items()) / len(DESIRED)


def read_words(path: Path) -> list[TimedWord]:
    """The words of an `output.json`; a word without an end ends where it starts."""
    value = _read_json(path)
    try:
        return [
            TimedWord(
                str(chunk["text"]).strip(), float(start), float(start if end is None else end)
            )
            for chunk in value["chunks"]
            for start, end in [chunk["timestamp"]]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{path}: expected 'chunks' of 'text' and 'timestamp': [start, end], found: {error}"
        ) from error


def write_words(path: Path, words: Sequence[TimedWord]) -> None:
    """Writes an `output.json`."""
    chunks = [
        {"text": w.text, "timestamp": [round(w.start_s, 3), round(w.end_s, 3)]} for w in words
    ]
    value = {"text": " ".join(w.text for w in words), "chunks": chunks}
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _turns_after(turns: Iterable[tuple[Sequence[TimedWord], float]]) -> Figures:
    """Rate of turns, and the mean latency of those taken; a turn begun too early counts as 0 s."""
    taken: list[bool] = []
    latencies_s: list[float] = []
    for words, time_s in turns:
        taken.append(metrics.took_turn(words))
        if taken[-1]:
            latencies_s.append(max(words[0].start_s - time_s, 0.0))
    return {"take-over rate": _share(taken), "latency, s": mean(latencies_s)}


def _share(values: Iterable[bool]) -> Estimate:
    listed = list(values)
    return share(sum(listed), len(listed))


def _mean_speed(outputs: Iterable[Sequence[TimedWord]]) -> Estimate:
    speeds = [metrics.words_per_minute(words) for words in outputs]
    return mean([speed for speed in speeds if speed is not None])


def _ground_truth(folder: Path) -> NDArray[np.float64] | None:
    """When people gave back-channels in this recording, if the file with it is there."""
    path = folder.parent / GROUND_TRUTH
    if not path.exists():
        return None
    try:
        return np.asarray(_read_json(path)[folder.name], np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{path}: expected a list of numbers under '{folder.name}', found: {error}"
        ) from error


def _folders(data: Path) -> Iterator[Path]:
    return iter(sorted(folder for folder in data.iterdir() if (folder / "input.wav").exists()))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path}: expected a JSON file, found: {error}") from error
