"""espeak-ng, called through its C interface in synchronous mode.

It tells when every word and phoneme is spoken, so word times are exact. Also turns text into
phonemes for the neural voices. One instance in a process: the library keeps global state.
"""

from __future__ import annotations

import ctypes
from typing import Any

import espeakng_loader
import numpy as np
from numpy.typing import NDArray

from duplex_engine.training.speech.sound import Speech, Word, finish, timeless

__all__ = ["Espeak"]

# Names and numbers of speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_PHONEME_EVENTS = 1
EVENT_LIST_TERMINATED, EVENT_WORD, EVENT_PHONEME = 0, 1, 7
CHARS_UTF8, PHONEMES_IN_BRACKETS = 1, 0x100
PHONEMES_IPA = 0x02
RATE, PITCH, RANGE = 1, 3, 4
BUFFER_MS = 200


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # in characters, from 1
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class Espeak:
    """Settings: ``voice`` ("en-us+f3"), ``rate`` (words a minute), ``pitch``, ``range`` (0-99)."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self._rate_hz: int = self._library.espeak_Initialize(
            AUDIO_OUTPUT_SYNCHRONOUS, BUFFER_MS, data, INITIALIZE_PHONEME_EVENTS
        )
        if self._rate_hz <= 0:
            raise RuntimeError(f"espeak-ng: expected its data in {data!r}, found none")
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        self._chunks: list[NDArray[np.int16]] = []
        self._starts: list[tuple[int, int]] = []  # of words: text position, sample
        self._silences: list[int] = []  # samples at which a pause starts
        self._callback = _Callback(self._receive)  # kept: C holds only the address
        self._library.espeak_SetSynthCallback(self._callback)
        # note: phonemes() understands [[...]] only after a synthesis that allowed them.
        self._synthesise(" ")

    def speak(self, source: str, settings: dict[str, Any], rng: np.random.Generator) -> Speech:
        """Speaks ``source``: text, or phonemes in espeak's spelling between ``[[`` and ``]]``."""
        self._set_voice(settings["voice"])
        rate = settings["rate"] * float(rng.uniform(0.88, 1.14))
        self._library.espeak_SetParameter(RATE, int(np.clip(rate, 80, 400)), 0)
        self._library.espeak_SetParameter(
            PITCH, _percent(settings["pitch"] + rng.integers(-6, 7)), 0
        )
        self._library.espeak_SetParameter(
            RANGE, _percent(settings["range"] + rng.integers(-10, 11)), 0
        )
        self._chunks, self._starts, self._silences = [], [], []
        self._synthesise(source)
        samples = np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.int16)
        return finish(samples, self._rate_hz, self._words(source))

    def phonemes(self, text: str, language: str) -> str:
        """``text``, which may be as in ``speak``, in the International Phonetic Alphabet."""
        self._set_voice(language)
        rest = ctypes.c_char_p(text.encode())
        clauses = []
        while rest.value:
            spoken = self._library.espeak_TextToPhonemes(
                ctypes.byref(rest), CHARS_UTF8, PHONEMES_IPA
            )
            clauses.append(spoken.decode())
        return " ".join(clauses).strip()

    def _set_voice(self, name: str) -> None:
        if self._library.espeak_SetVoiceByName(name.encode()) != 0:
            raise ValueError(f"espeak-ng: expected a voice that it has, found {name!r}")

    def _synthesise(self, source: str) -> None:
        text = source.encode()
        flags = CHARS_UTF8 | PHONEMES_IN_BRACKETS
        if self._library.espeak_Synth(text, len(text) + 1, 0, 1, 0, flags, None, None) != 0:
            raise RuntimeError(f"espeak-ng: failed to speak {source!r}")

    def _receive(self, wave: Any, n_samples: int, events: Any) -> int:
        if wave and n_samples:
            self._chunks.append(np.ctypeslib.as_array(wave, (n_samples,)).copy())
        index = 0
        while events[index].type != EVENT_LIST_TERMINATED:
            event = events[index]
            if event.type == EVENT_WORD:
                self._starts.append((event.text_position - 1, event.sample))
            elif event.type == EVENT_PHONEME and event.id.string[:1] in (b"_", b""):
                self._silences.append(event.sample)
            index += 1
        return 0

    def _words(self, source: str) -> list[Word]:
        """Times from the events; a word that espeak ran into the one before it has none."""
        if source.startswith("[["):
            return timeless(source)
        starts = dict(self._starts)
        bounds = sorted([*starts.values(), *self._silences])
        words: list[Word] = []
        position = 0
        for word in source.split():
            position = source.index(word, position)
            start = starts.get(position)
            end = next((b for b in bounds if start is not None and b > start), None)
            words.append((word, self._seconds(start), self._seconds(end)))
            position += len(word)
        for index in range(len(words) - 1):
            if words[index + 1][1] is None:  # run together: only the group's end is known
                words[index + 1] = (words[index + 1][0], None, words[index][2])
                words[index] = (words[index][0], words[index][1], None)
        return words

    def _seconds(self, sample: int | None) -> float | None:
        return None if sample is None else sample / self._rate_hz


def _percent(value: float) -> int:
    return int(np.clip(value, 0, 99))
