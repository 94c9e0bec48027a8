"""The speech bank: spoken words and phrases on disk, with who said them and when each word ends.

Owns the files and the command that fills them. Who speaks is in ``voices.py``, how in ``speech/``.
``audio.i16`` is one run of 16-bit samples at 16 kHz; ``clips.jsonl`` has a line for each clip in
it. Both only grow, audio first, so an interrupted run is taken up again by the same command, and
new texts are added without making the old ones again.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from duplex_engine.training import voices
from duplex_engine.training.command import run_command
from duplex_engine.training.speech.sound import SAMPLE_RATE_HZ, Samples, Unspeakable, Word

__all__ = ["Bank", "Clip", "ClipInfo", "build"]

AUDIO, INDEX = "audio.i16", "clips.jsonl"
FULL_SCALE = 32768.0
VOICELESS = ("foreign", "speech", "music")  # kinds that are not spoken to the model


@dataclass(frozen=True, slots=True)
class Clip:
    """A recording: (n,) samples at 16 kHz, and its words with their times.

    A time is None where the synthesiser does not tell it; the start of the first word and the end
    of the last are always known.
    """

    samples: Samples
    words: tuple[Word, ...]


@dataclass(frozen=True, slots=True)
class ClipInfo:
    """One line of the index: a clip, less its sound.

    Attributes:
        text: what is said; for a mispronounced word, the word that is meant.
        words: as in ``Clip``; empty for music and for speech of unknown text.
        group, kind: of ``voices.GROUPS`` and ``voices.KINDS``.
        offset, n: its samples in the audio file.
    """

    text: str
    words: tuple[Word, ...]
    voice: str
    group: str
    kind: str
    offset: int
    n: int


class Bank:
    """A bank opened for reading. The sound stays on disk until a clip is asked for."""

    def __init__(self, audio: NDArray[np.int16], infos: Iterable[ClipInfo]) -> None:
        self._audio = audio
        self._by_kind: dict[tuple[str, str], list[ClipInfo]] = defaultdict(list)
        self._by_text: dict[tuple[str, str], list[ClipInfo]] = defaultdict(list)
        self._by_voice: dict[tuple[str, str | None], dict[str, ClipInfo]] = defaultdict(dict)
        for info in infos:
            self._by_kind[info.kind, info.group].append(info)
            self._by_voice[info.voice, info.kind][info.text] = info
            if info.kind != "mispronounced":  # asked for by kind only
                self._by_text[info.text, info.group].append(info)
                self._by_voice[info.voice, None][info.text] = info
        self._texts = {key: frozenset(clips) for key, clips in self._by_voice.items()}
        self._voices = {
            key: sorted({info.voice for info in clips}) for key, clips in self._by_kind.items()
        }

    @classmethod
    def open(cls, directory: str | Path) -> Bank:
        """Opens the bank in a folder; the index is read, the sound is mapped.

        Raises:
            FileNotFoundError: there is no bank.
        """
        folder = Path(directory)
        if not (folder / INDEX).is_file() or (folder / INDEX).stat().st_size == 0:
            raise FileNotFoundError(
                f"bank: expected clips in {folder / INDEX}, found none; "
                f"make one with `python -m duplex_engine.training.bank {folder}`"
            )
        audio = np.memmap(folder / AUDIO, dtype="<i2", mode="r")
        return cls(audio, _read_index(folder / INDEX))

    def select(self, pattern: str) -> Bank:
        """A bank of the voices whose name fits the pattern, and of all music and prompts."""
        infos = [
            info
            for of_kind in self._by_kind.values()
            for info in of_kind
            if info.kind in VOICELESS or fnmatch(info.voice, pattern)
        ]
        return Bank(self._audio, infos)

    def voices(self, group: str, kind: str = "word") -> list[str]:
        """Names of the voices of a group that say clips of a kind, sorted."""
        return self._voices.get((kind, group), [])

    def texts(self, voice: str, kind: str | None = None) -> frozenset[str]:
        """The texts a voice has, of one kind, or of all but ``mispronounced``."""
        return self._texts.get((voice, kind), frozenset())

    def clips(self, text: str, group: str) -> list[ClipInfo]:
        """Every clip of a text, less the mispronounced, by the voices of a group."""
        return self._by_text.get((text, group), [])

    def of_kind(self, kind: str, group: str) -> list[ClipInfo]:
        """Every clip of a kind by the voices of a group."""
        return self._by_kind.get((kind, group), [])

    def clip(self, text: str, voice: str, kind: str | None = None) -> Clip:
        """A voice's clip of a text; ``kind`` as in ``texts``. Raises KeyError if it has none."""
        try:
            return self.load(self._by_voice[voice, kind][text])
        except KeyError:
            raise KeyError(f"bank: voice {voice!r} has no clip of {text!r}, kind {kind}") from None

    def load(self, info: ClipInfo) -> Clip:
        """The clip of a line of the index."""
        samples = self._audio[info.offset : info.offset + info.n].astype(np.float32) / FULL_SCALE
        return Clip(samples, info.words)


def _read_index(path: Path) -> Iterator[ClipInfo]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            fields: dict[str, Any] = json.loads(line)
            words = tuple((word, start, end) for word, start, end in fields.pop("words"))
            yield ClipInfo(words=words, **fields)


# --- making a bank ----------------------------------------------------------------------------
@dataclass(frozen=True)
class _Task:
    voice: voices.Voice
    lines: list[voices.Line]
    seed: int
    kokoro_voices: Path | None


@dataclass(frozen=True)
class _Spoken:
    line: voices.Line
    samples: NDArray[np.int16] | None  # None: the voice could not say it
    words: tuple[Word, ...] = ()


def _speak(task: _Task) -> list[_Spoken]:
    """Runs in a worker. The manner of a clip depends on seed, voice and text alone."""
    engine = voices.synthesiser(task.voice.engine, task.kokoro_voices)
    spoken = []
    for line in task.lines:
        name = f"{task.voice.name}|{line.kind}|{line.text}"
        rng = np.random.default_rng([task.seed, zlib.crc32(name.encode())])
        try:
            speech = engine.speak(line.source, task.voice.settings, rng)
        except Unspeakable:
            spoken.append(_Spoken(line, None))
            continue
        words = speech.words
        if words and [word for word, _, _ in words] != line.text.split():  # it was respelt
            words = ((line.text, 0.0, words[-1][2]),)
        samples = np.round(speech.samples * (FULL_SCALE - 1)).astype("<i2")
        spoken.append(_Spoken(line, samples, words))
    return spoken


class _Writer:
    """Appends to a bank, after cutting off what an interruption left half written."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        index = folder / INDEX
        index.touch()
        content = index.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        with index.open("r+b") as file:
            file.truncate(len(whole))
        infos = list(_read_index(index))
        self.done = {(info.voice, info.kind, info.text) for info in infos}
        self._n_samples = max((info.offset + info.n for info in infos), default=0)
        (folder / AUDIO).touch()
        self._audio = (folder / AUDIO).open("r+b")
        self._audio.truncate(2 * self._n_samples)
        self._audio.seek(0, 2)
        self._index = index.open("a", encoding="utf-8")

    def append(self, voice: voices.Voice, spoken: list[_Spoken]) -> None:
        """Adds what a voice said: all the sound, then all the lines."""
        lines = []
        for clip in spoken:
            if clip.samples is None:
                continue
            self._audio.write(clip.samples.tobytes())
            fields = {
                "text": clip.line.text,
                "words": clip.words,
                "voice": voice.name,
                "group": voice.group,
                "kind": clip.line.kind,
                "offset": self._n_samples,
                "n": len(clip.samples),
            }
            lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
            self._n_samples += len(clip.samples)
        self._audio.flush()
        self._index.write("".join(lines))
        self._index.flush()

    def close(self) -> None:
        """Closes both files."""
        self._audio.close()
        self._index.close()


def build(
    directory: str | Path,
    speakers: Iterable[voices.Voice],
    *,
    seed: int = 0,
    workers: int = 1,
    kokoro_voices: Path | None = None,
) -> Counter[str]:
    """Makes every clip that a bank lacks. Returns how many clips each voice could not say."""
    writer = _Writer(Path(directory))
    tasks = []
    for voice in speakers:
        missing = [
            line
            for line in voices.lines(voice)
            if (voice.name, line.kind, line.text) not in writer.done
        ]
        if missing:
            tasks.append(_Task(voice, missing, seed, kokoro_voices))
    mute: Counter[str] = Counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # Spawned, not forked: the libraries behind the voices keep state and threads of their own.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    with pool, Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("speech bank", total=sum(len(task.lines) for task in tasks))
        for task, spoken in zip(tasks, pool.map(_speak, tasks), strict=True):
            writer.append(task.voice, spoken)
            mute[task.voice.name] += sum(clip.samples is None for clip in spoken)
            progress.update(bar, advance=len(spoken), description=task.voice.name)
    writer.close()
    return +mute


def _report(directory: Path, mute: Counter[str]) -> None:
    table: dict[tuple[str, str], tuple[set[str], int, int]] = {}
    for info in _read_index(directory / INDEX):
        names, clips, samples = table.get((info.group, info.kind), (set(), 0, 0))
        table[info.group, info.kind] = (names | {info.voice}, clips + 1, samples + info.n)
    for (group, kind), (names, clips, samples) in sorted(table.items()):
        hours = samples / SAMPLE_RATE_HZ / 3600
        print(f"{group:6} {kind:14} {len(names):4} voices {clips:7} clips {hours:6.2f} h")
    for name, count in mute.most_common():
        print(f"{name} could not say {count} of its texts")


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the bank.")],
    quick: Annotated[bool, typer.Option(help="Eight espeak-ng voices only.")] = False,
    only: Annotated[str, typer.Option(help="Pattern of voice names, e.g. 'flite/*'.")] = "*",
    kokoro_voices: Annotated[
        Path | None,
        typer.Option(help="Folder `voices` of the npm package kokoro-js; without it no Kokoro."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Varies pace and pitch.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes.")] = cpu_count() or 1,
) -> None:
    """Makes a speech bank, or what it lacks."""
    roster = voices.roster(kokoro=kokoro_voices is not None, quick=quick)
    chosen = [voice for voice in roster if fnmatch(voice.name, only)]
    if not chosen:
        raise typer.BadParameter(f"expected a pattern of voice names, found {only!r}")
    mute = build(out, chosen, seed=seed, workers=workers, kokoro_voices=kokoro_voices)
    _report(out, mute)


if __name__ == "__main__":
    run_command(main)
