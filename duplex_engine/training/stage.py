"""The stage on which a training stream is put together: sounds, pictures and targets by time.

Owns the clock of an episode, the rule that turns a moment into the micro-turn that answers it, and
the mixing of clips. What is said, shown and answered is decided by the tasks (``tasks_*.py``);
``episodes.py`` runs them one after the other; ``rows.py`` turns the result into rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import numpy as np
import soxr
from numpy.typing import NDArray

from duplex_engine.errors import InvalidArgument
from duplex_engine.training import vocabulary
from duplex_engine.training.bank import Bank
from duplex_engine.training.voices import weight

__all__ = ["NOISE", "PICTURE", "TYPED", "Episode", "Event", "Said", "Stage", "turn_at"]

TYPED, PICTURE, NOISE = "typed", "picture", "noise"  # what an event comes from instead of a voice

SAMPLE_RATE = 16_000  # Hz
TURN_S = 0.2
FRAMES_PER_TURN = 4
TURN_SAMPLES = round(TURN_S * SAMPLE_RATE)
REACTION_S = 0.12  # sound that must be heard after a moment before the model can know it
MAX_TOKENS = 4  # a micro-turn puts out at most, before `listen`
SPEECH_RMS = 0.06

Samples: TypeAlias = NDArray[np.float32]
Picture: TypeAlias = NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Event:
    """Something in the stream that asks for a reaction, or for silence.

    Attributes:
        kind: what it is; see the tasks.
        time_s: the decisive moment: the end of a word, the beginning of a picture's micro-turn.
        turn: the micro-turn in which the reaction is due.
        tokens: what is to be put out there, empty for silence.
        window_turns: how many micro-turns, beginning with `turn`, belong to the event.
        voice: who spoke; or TYPED, PICTURE or NOISE.
    """

    kind: str
    time_s: float
    turn: int
    tokens: tuple[int, ...]
    window_turns: int
    voice: str = ""


@dataclass(slots=True)
class Episode:
    """A stream with its targets; everything by micro-turn is a dict from its number.

    Attributes:
        audio: (n_turns * 3200,) samples at 16 kHz.
        images: (40, 39, 3) uint8 RGB pictures.
        typed, results: tokens of typed text and of background results, without their brackets.
        outputs: target tokens, without `listen`.
        events: what there was to react to, by time.
        labels: (n_turns * 4,) for each audio frame, the word that ended a moment ago; 0 is none.
        expected: likewise, the word that should come next in a list or sentence.
    """

    audio: Samples
    images: dict[int, Picture]
    typed: dict[int, list[int]]
    results: dict[int, list[int]]
    outputs: dict[int, list[int]]
    events: list[Event]
    labels: NDArray[np.int16]
    expected: NDArray[np.int16]

    @property
    def n_turns(self) -> int:
        """Micro-turns of the episode."""
        return len(self.labels) // FRAMES_PER_TURN


@dataclass(frozen=True, slots=True)
class Said:
    """An utterance on the stage: when, and the end of each word in seconds (None: unknown)."""

    start_s: float
    end_s: float
    words: tuple[tuple[str, float | None], ...]


def turn_at(time_s: float) -> int:
    """The micro-turn whose input holds the sound 120 ms after a moment: the first that can know."""
    return int((time_s + REACTION_S) / TURN_S + 1e-6)


@dataclass
class Stage:
    """Builds one episode; `time_s` is the cursor at which the next thing happens.

    Attributes:
        bank: where speech comes from.
        group: which of its voices may speak.
        tempo: range of the factor by which a voice is played faster and higher, (1, 1) for none.
    """

    bank: Bank
    rng: np.random.Generator
    group: str
    tempo: tuple[float, float] = (1.0, 1.0)
    time_s: float = 0.0
    events: list[Event] = field(default_factory=list)
    images: dict[int, Picture] = field(default_factory=dict)
    typed: dict[int, list[int]] = field(default_factory=dict)
    results: dict[int, list[int]] = field(default_factory=dict)
    outputs: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sounds: list[tuple[float, Samples]] = []
        self._word_ends: list[tuple[str, float]] = []
        self._expected: list[tuple[str, float]] = []
        self._voices = self.bank.voices(self.group)
        if not self._voices:
            raise InvalidArgument(f"bank: expected voices of group '{self.group}', found none")
        weights = np.array([weight(voice, self.group) for voice in self._voices])
        self._shares = weights / weights.sum()
        self.change_voice()

    # --- choices ------------------------------------------------------------------------------
    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < probability)

    def pick(self, choices: Sequence[T]) -> T:
        """One of them, all equally likely."""
        return choices[int(self.rng.integers(len(choices)))]

    # --- speech -------------------------------------------------------------------------------
    def change_voice(self) -> None:
        """Another voice of the group speaks from now on, at its own tempo and level."""
        self.voice = str(self.rng.choice(self._voices, p=self._shares))
        self._tempo = float(self.rng.uniform(*self.tempo))
        self._gain = float(np.exp(self.rng.uniform(-0.7, 0.7)))

    def can_say(self, *texts: str) -> bool:
        """Whether the present voice has all of these texts."""
        return self.bank.texts(self.voice).issuperset(texts)

    def chatter(self) -> list[str]:
        """The idle sentences that the present voice has, sorted."""
        return sorted(self.bank.texts(self.voice, "chatter"))

    def can_mispronounce(self, word: str) -> bool:
        """Whether the present voice has a wrong pronunciation of this word."""
        return word in self.bank.texts(self.voice, "mispronounced")

    def has_word_times(self, text: str) -> bool:
        """Whether the present voice's recording of a text knows the end of each word."""
        words = self.bank.clip(text, self.voice).words
        return len(words) == len(text.split()) and all(end_s is not None for *_, end_s in words)

    def say(self, text: str, *, at_s: float | None = None, wrongly: bool = False) -> Said:
        """Speaks a text of the bank at the cursor (or at `at_s`) and moves the cursor to its end.

        wrongly: take the mispronounced recording; its words then have no label.
        """
        kind = "mispronounced" if wrongly else None
        clip = self.bank.clip(text, self.voice, kind)
        samples = clip.samples
        if self._tempo != 1.0:
            samples = soxr.resample(samples, SAMPLE_RATE * self._tempo, SAMPLE_RATE, "QQ")
        start_s = self.time_s if at_s is None else at_s
        self.play(self._levelled(samples), start_s)
        ends = [(word, end_s) for word, _, end_s in clip.words]
        n_words = len(text.split())
        if len(ends) != n_words:  # only the end of the utterance is known
            ends = [(word, None) for word in text.split()]
        if ends[-1][1] is None:
            ends[-1] = (ends[-1][0], len(samples) * self._tempo / SAMPLE_RATE)
        words = tuple(
            (word, None if end_s is None else start_s + end_s / self._tempo) for word, end_s in ends
        )
        if not wrongly:
            self._word_ends += [(word, end_s) for word, end_s in words if end_s is not None]
        last_s = words[-1][1]
        assert last_s is not None
        said = Said(start_s, last_s, words)
        self.time_s = max(self.time_s, said.end_s)
        return said

    def play_other(self, kind: str) -> bool:
        """Plays a "foreign", "speech", "chatter" or "music" clip of the group; False if none."""
        speakers = self.bank.voices(self.group, kind)
        if not speakers:
            return False
        speaker = self.pick(speakers)
        samples = self.bank.clip(
            self.pick(sorted(self.bank.texts(speaker, kind))), speaker, kind
        ).samples
        self.play_here(self._levelled(samples))
        return True

    def _levelled(self, samples: Samples) -> Samples:
        rms = float(np.sqrt(np.mean(np.square(samples)))) + 1e-6
        return samples * np.float32(SPEECH_RMS * self._gain / rms)

    def play(self, samples: Samples, at_s: float) -> None:
        """Mixes any sound in; the cursor stays."""
        self._sounds.append((at_s, samples))

    def play_here(self, samples: Samples) -> None:
        """Mixes a sound in at the cursor, which moves to its end."""
        self.play(samples, self.time_s)
        self.time_s += len(samples) / SAMPLE_RATE

    def type(self, text: str) -> int:
        """The user types a text in the micro-turn behind the cursor; returns the micro-turn."""
        turn = int(self.time_s / TURN_S) + 1 if self.time_s > 0.0 else 0
        while turn in self.typed:
            turn += 1
        self.typed[turn] = vocabulary.encode(text)
        self.time_s = max(self.time_s, (turn + 1) * TURN_S)
        return turn

    def wait(self, low_s: float, high_s: float) -> None:
        """Silence of a random length."""
        self.time_s += float(self.rng.uniform(low_s, high_s))

    # --- targets ------------------------------------------------------------------------------
    def react(
        self, kind: str, time_s: float, tokens: Sequence[int], *, window_turns: int = 4
    ) -> int:
        """The model puts out `tokens` as soon as it can know of `time_s`; returns the turn."""
        return self.emit(kind, time_s, turn_at(time_s), tokens, window_turns=window_turns)

    def emit(
        self,
        kind: str,
        time_s: float,
        turn: int,
        tokens: Sequence[int],
        *,
        window_turns: int = 4,
        source: str = "",
    ) -> int:
        """The model puts out `tokens` in `turn`, or in the next ones if that is taken.

        source: what the event comes from; "" is the present voice.
        """
        while turn in self.outputs:
            turn += 1
        for begin in range(0, len(tokens), MAX_TOKENS):
            self.outputs[turn + begin // MAX_TOKENS] = list(tokens[begin : begin + MAX_TOKENS])
        self._record(kind, time_s, turn, tokens, window_turns, source)
        return turn

    def expect(
        self, kind: str, time_s: float, turn: int, tokens: Sequence[int], *, source: str = ""
    ) -> None:
        """Records an event whose outputs are placed by the task itself."""
        self._record(kind, time_s, turn, tokens, 3, source)

    def note(self, kind: str, time_s: float, *, window_turns: int = 4, source: str = "") -> None:
        """Something to which the right reaction is to change nothing."""
        self._record(kind, time_s, turn_at(time_s), (), window_turns, source)

    def expect_word(self, word: str | None, after_s: float) -> None:
        """After this moment the model may know which word should come next; None: no word."""
        if word is not None:
            self._expected.append((word, after_s))

    def _record(
        self,
        kind: str,
        time_s: float,
        turn: int,
        tokens: Sequence[int],
        window_turns: int,
        source: str,
    ) -> None:
        voice = source or self.voice
        self.events.append(Event(kind, time_s, turn, tuple(tokens), window_turns, voice))

    # --- the result ---------------------------------------------------------------------------
    def mixed(self, n: int) -> Samples:
        """The first `n` samples of all sounds together."""
        audio = np.zeros(n, np.float32)
        for start_s, samples in self._sounds:
            start = round(start_s * SAMPLE_RATE)
            samples = samples[: max(n - start, 0)]
            audio[start : start + len(samples)] += samples
        return audio

    def episode(
        self, n_turns: int, treat: Callable[[Samples, np.random.Generator], Samples] | None
    ) -> Episode:
        """The first `n_turns` micro-turns; `treat` adds noise, room and codec to the whole."""
        audio = self.mixed(n_turns * TURN_SAMPLES)
        if treat is not None:
            audio = treat(audio, self.rng)

        def within(by_turn: dict[int, T]) -> dict[int, T]:
            return {turn: value for turn, value in sorted(by_turn.items()) if turn < n_turns}

        events = [e for e in self.events if e.turn + e.window_turns <= n_turns]
        return Episode(
            audio=audio,
            images=within(self.images),
            typed=within(self.typed),
            results=within(self.results),
            outputs=within(self.outputs),
            events=sorted(events, key=lambda event: event.time_s),
            labels=_labels(self._word_ends, n_turns),
            expected=_labels(self._expected, n_turns),
        )


def _labels(words: Sequence[tuple[str, float]], n_turns: int) -> NDArray[np.int16]:
    """(n_turns * 4,): each word at the frames of the 200 ms after its moment, as soon as heard."""
    labels = np.zeros(n_turns * FRAMES_PER_TURN, np.int16)
    frame_s = TURN_S / FRAMES_PER_TURN
    for word, end_s in sorted(words, key=lambda item: item[1]):
        if vocabulary.knows(word):
            # The first frame that ends 120 ms after the word, and all within 200 ms of it.
            first = int(np.ceil((end_s + REACTION_S) / frame_s - 1e-6)) - 1
            labels[first : first + FRAMES_PER_TURN] = vocabulary.token_id(word)
    return labels
