"""Who speaks in a speech bank: every voice, its settings, its group, and what it says.

Groups: ``train`` voices may be trained on; ``held`` voices are synthesisers, speakers or variants
that no training sees; ``human`` voices are recordings of people, for evaluation only. Sound is
made in ``speech/``; ``bank.py`` stores it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from duplex_engine.training import phrases
from duplex_engine.training.speech.sound import Synthesiser

__all__ = ["GROUPS", "KINDS", "Line", "Voice", "lines", "roster", "synthesiser", "weight"]

GROUPS = ("train", "held", "human")
# word: one of phrases.WORDS; chatter: of phrases.CHATTER; speech: people saying other things
KINDS = ("word", "phrase", "mispronounced", "chatter", "foreign", "speech", "music")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS_ONLY = ("word", "mispronounced")
ALL_ENGLISH = ("word", "phrase", "mispronounced", "chatter")
N_CHATTER = 24  # sentences of a voice
TEXT_ENGINES = ("flite", "pico")  # take no phonemes
# How often a training voice is chosen; espeak-ng's are many and much alike.
TRAIN_WEIGHTS = {"flite": 10.0, "pico": 8.0, "kokoro": 6.0}

# Texts that engines would spell out; "m h m" is no back-channel.
RESPELT_PHONEMES = {"mhm": "[[mh'@m]]"}  # for espeak-ng and those that it spells for
RESPELT_TEXT = {"mhm": "um hum", "hmm": "hum"}

# espeak-ng's variants, less those that are hard to understand.
TRAIN_VARIANTS = _names(
    """
    Alex Alicia Andrea Andy Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mike Mr Nguyen Reed
    RicishayMax RicishayMax2 Tweaky adam anika antonio aunty belinda benjamin boris caleb david ed
    edward2 f1 f2 f3 f5 fast grandpa gustave ian iven iven2 iven3 iven4 john kaukovalta klatt klatt2
    klatt4 klatt5 klatt6 m1 m2 m3 m4 m6 m7 m8 marcelo max michel miguel mike2 norbert pablo paul
    pedro quincy rob robert robosoft robosoft3 sandro shelby steph steph3 travis
    """
)
HELD_VARIANTS = _names("f4 m5 Annie grandma Mario steph2 victor zac Michael linda")
OTHER_ACCENTS = ("en", "en-gb-x-rp", "en-gb-scotland", "en", "en-029", "en-gb-x-gbclan")
PHRASE_EVERY, PHRASE_TURNS = 8, (0, 3, 5)  # which of so many voices speak the phrases too

KOKORO_TRAIN = _names(
    """
    af_heart am_michael bf_isabella bm_fable af_bella am_fenrir af_kore bm_daniel
    af_aoede am_echo af_nova am_liam af_sarah am_onyx bf_alice bm_lewis
    """
)
KOKORO_HELD = _names("af_sky am_puck bf_emma bm_george")
# Of phrases.WORDS, from the first: lists, classes and commands. A Kokoro voice takes a second of
# computing for a word, so more would cost more than all the others together.
KOKORO_WORDS = 100
FOREIGN_VARIANTS = ("f2", "m3", "klatt4", "david", "steph", "grandpa")
HELD_FOREIGN_VARIANTS = ("f4", "m5")
HELD_MUSIC = ("macroform-robot_dity", "reno_project-system")
TRAIN_MUSIC = ("macroform-cold_day", "macroform-the_simplicity", "manolo_camp-morning_coffee")
MUSIC_PIECES = 10  # of each track
FOREIGN_SPEAKERS = ("fr_CA_f_June", "ru_RU_f_IvrvoiceRU")
FOREIGN_PROMPTS = 100  # of each of them


@dataclass(frozen=True)
class Voice:
    """One speaker.

    Attributes:
        name: engine and speaker, "espeak/en-us+f3".
        group: one of GROUPS.
        kinds: which of KINDS it says.
        settings: for its engine; see ``speech/``.
        n_words: how many of ``phrases.WORDS``, from the first; None for all.
    """

    name: str
    group: str
    kinds: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    n_words: int | None = None

    @property
    def engine(self) -> str:
        """The module of ``speech/`` that makes its sound."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Line:
    """A clip to be made: its text and kind, and what the engine is given."""

    text: str
    kind: str
    source: str


def roster(*, kokoro: bool = True, quick: bool = False) -> list[Voice]:
    """Every voice, in the order in which a bank is made; ``quick`` keeps eight."""
    if quick:
        train = [_espeak(f"en-us+{v}", "train", ALL_ENGLISH) for v in TRAIN_VARIANTS[:6]]
        return train + [_espeak(f"en+{v}", "held", ALL_ENGLISH) for v in HELD_VARIANTS[:2]]
    voices = [*_train_espeak(), *_small_engines(), *_foreign(), *_recorded()]
    for index, variant in enumerate(HELD_VARIANTS):
        accent = ("en-us", "en")[index % 2]
        voices.append(_espeak(f"{accent}+{variant}", "held", ALL_ENGLISH))
    if kokoro:
        for name in KOKORO_HELD:
            voices.append(_kokoro(name, "held"))
        for name in KOKORO_TRAIN:
            voices.append(_kokoro(name, "train"))
    return voices


def lines(voice: Voice) -> list[Line]:
    """What a voice says, words first."""
    if voice.engine == "recordings":
        return list(_recorded_lines(voice))
    said: list[Line] = []
    if "word" in voice.kinds:
        respelt = RESPELT_TEXT if voice.engine in TEXT_ENGINES else RESPELT_PHONEMES
        words = phrases.WORDS[: voice.n_words]
        said += [Line(text, "word", respelt.get(text, text)) for text in words]
    if "mispronounced" in voice.kinds:
        said += [
            Line(
                word, "mispronounced", spelt if voice.engine in TEXT_ENGINES else f"[[{phonemes}]]"
            )
            for word, phonemes, spelt in phrases.MISPRONOUNCED
        ]
    if "phrase" in voice.kinds:
        said += [Line(text, "phrase", text) for text in phrases.PHRASES]
    if "chatter" in voice.kinds:
        rng = np.random.default_rng(zlib.crc32(voice.name.encode()))
        for _ in range(N_CHATTER):
            text = " ".join(str(rng.choice(part)) for part in phrases.CHATTER).strip()
            said.append(Line(text, "chatter", text))
    if "foreign" in voice.kinds:
        language, foreign = voice.settings["language"], phrases.FOREIGN + phrases.HELD_FOREIGN
        said += [Line(text, "foreign", text) for tag, text in foreign if tag == language]
    return said


def weight(voice: str, group: str) -> float:
    """How often a voice is chosen within its group, relative to the others."""
    engine = voice.partition("/")[0]
    return TRAIN_WEIGHTS.get(engine, 1.0) if group == "train" else 1.0


@cache
def synthesiser(engine: str, kokoro_voices: Path | None) -> Synthesiser:
    """The engine of that name, made once in a process.

    Raises:
        ImportError: a package that it needs is missing; docs/TRAINING.md lists them.
    """
    module = import_module(f"duplex_engine.training.speech.{engine}")
    make: Callable[..., Synthesiser] = getattr(module, engine.capitalize())
    return make(kokoro_voices) if engine == "kokoro" else make()


def _espeak(speaker: str, group: str, kinds: tuple[str, ...], **more: str) -> Voice:
    rng = np.random.default_rng(zlib.crc32(speaker.encode()))  # a speaker keeps its manner
    settings = {
        "voice": speaker,
        "rate": int(rng.integers(115, 190)),
        "pitch": int(rng.integers(30, 71)),
        "range": int(rng.integers(30, 71)),
    }
    return Voice(f"espeak/{speaker}", group, kinds, settings | more)


def _kokoro(name: str, group: str) -> Voice:
    settings = {"voice": name, "speed": 1.0}
    return Voice(f"kokoro/{name}", group, WORDS_ONLY, settings, KOKORO_WORDS)


def _train_espeak() -> Iterator[Voice]:
    index = 0
    for number, variant in enumerate(TRAIN_VARIANTS):
        for accent in ("en-us", OTHER_ACCENTS[number % len(OTHER_ACCENTS)]):
            kinds = ALL_ENGLISH if index % PHRASE_EVERY in PHRASE_TURNS else WORDS_ONLY
            yield _espeak(f"{accent}+{variant}", "train", kinds)
            index += 1


def _small_engines() -> Iterator[Voice]:
    for name in ("rms", "awb", "kal16"):
        yield Voice(f"flite/{name}", "train", ALL_ENGLISH, {"voice": name, "stretch": 1.0})
    yield Voice("flite/slt", "held", ALL_ENGLISH, {"voice": "slt", "stretch": 1.0})
    for language, group in (("en-US", "train"), ("en-GB", "held")):
        for pitch in (0.75, 0.9, 1.0, 1.15) if group == "train" else (0.8, 1.0):
            settings = {"voice": language, "pitch": pitch, "speed": 0.95}
            yield Voice(f"pico/{language}-{pitch}", group, ALL_ENGLISH, settings)
    yield Voice("piper/joe", "held", ALL_ENGLISH, {"length": 1.0})


def _foreign() -> Iterator[Voice]:
    for group, variants, texts in (
        ("train", FOREIGN_VARIANTS, phrases.FOREIGN),
        ("held", HELD_FOREIGN_VARIANTS, phrases.HELD_FOREIGN),
    ):
        for language in dict.fromkeys(tag for tag, _ in texts):
            for variant in variants:
                speaker = f"{language}+{variant}"
                yield _espeak(speaker, group, ("foreign",), language=language)


def _recorded() -> Iterator[Voice]:
    yield Voice("recordings/allison", "human", ("word", "speech"), {"speaker": "en_US_f_Allison"})
    for speaker in FOREIGN_SPEAKERS:
        name = speaker.rpartition("_")[2].lower()
        yield Voice(f"recordings/{name}", "human", ("foreign",), {"speaker": speaker})
    for track in TRAIN_MUSIC + HELD_MUSIC:
        group = "held" if track in HELD_MUSIC else "train"
        yield Voice(f"recordings/{track}", group, ("music",))


def _recorded_lines(voice: Voice) -> Iterator[Line]:
    recordings = import_module("duplex_engine.training.speech.recordings")
    if "music" in voice.kinds:
        track = voice.name.partition("/")[2]
        path = recordings.MUSIC / f"{track}.g722"
        for piece in range(MUSIC_PIECES):
            start_s = piece * recordings.MUSIC_PIECE_S
            yield Line(f"{track} {piece}", "music", f"|{path}|{start_s}")
        return
    speaker = voice.settings["speaker"]
    if "foreign" in voice.kinds:
        for path in recordings.speech_prompts(speaker)[:FOREIGN_PROMPTS]:
            yield Line(Path(path).stem, "foreign", f"|{path}")
        return
    for word, path in recordings.prompt_words(speaker).items():
        yield Line(word, "word", f"{word}|{path}")
    for path in recordings.speech_prompts(speaker):
        yield Line(Path(path).stem, "speech", f"|{path}")
