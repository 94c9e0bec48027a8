"""CMU Flite through its C libraries: small recorded voices with exact word times."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from duplex_engine.training.speech.sound import Speech, Word, finish

__all__ = ["Flite"]

WORD_START = b"daughter1.R:SylStructure.daughter1.daughter1.R:Segment.p.end"
WORD_END = b"daughtern.R:SylStructure.daughtern.daughtern.R:Segment.end"


class _Wave(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class Flite:
    """Settings: ``voice`` ("rms"), ``stretch`` (of durations, 1.0 is the voice's own)."""

    def __init__(self) -> None:
        self._library = _load("libflite.so.1")
        _load("libflite_usenglish.so.1")
        _load("libflite_cmulex.so.1")
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        for name, result, arguments in (
            ("flite_synth_text", pointer, (text, pointer)),
            ("utt_wave", ctypes.POINTER(_Wave), (pointer,)),
            ("utt_relation", pointer, (pointer, text)),
            ("relation_head", pointer, (pointer,)),
            ("item_next", pointer, (pointer,)),
            ("flite_ffeature_string", text, (pointer, text)),
            ("flite_ffeature_float", ctypes.c_float, (pointer, text)),
            ("flite_feat_set_float", None, (pointer, text, ctypes.c_float)),
            ("delete_utterance", None, (pointer,)),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments
        self._library.flite_init()
        self._voices: dict[str, int] = {}

    def speak(self, source: str, settings: dict[str, Any], rng: np.random.Generator) -> Speech:
        """Speaks ``source``."""
        voice = self._voice(settings["voice"])
        stretch = settings["stretch"] * float(rng.uniform(0.9, 1.12))
        features = ctypes.c_void_p.from_address(voice + ctypes.sizeof(ctypes.c_void_p))
        self._library.flite_feat_set_float(features, b"duration_stretch", stretch)
        utterance = self._library.flite_synth_text(source.encode(), voice)
        try:
            wave = self._library.utt_wave(utterance)[0]
            samples = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)).copy()
            rate_hz = int(wave.sample_rate)
            words = self._words(utterance)
        finally:
            self._library.delete_utterance(utterance)
        return finish(samples, rate_hz, words)

    def _words(self, utterance: int) -> list[Word]:
        feature = self._library.flite_ffeature_float
        words: list[Word] = []
        token = self._library.relation_head(self._library.utt_relation(utterance, b"Token"))
        while token:
            name = self._library.flite_ffeature_string(token, b"name").decode()
            words.append((name, feature(token, WORD_START), feature(token, WORD_END)))
            token = self._library.item_next(token)
        return words

    def _voice(self, name: str) -> int:
        if name not in self._voices:
            full = f"cmu_us_{name}"
            register = getattr(_load(f"libflite_{full}.so.1"), f"register_{full}")
            register.restype, register.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
            self._voices[name] = register(None)
        return self._voices[name]


def _load(library: str) -> ctypes.CDLL:
    return ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
