"""SVOX Pico through py-nanotts: one small voice for each language, without word times."""

from __future__ import annotations

from typing import Any

import numpy as np
from py_nanotts import NanoTTS

from duplex_engine.training.speech.sound import SAMPLE_RATE_HZ, Speech, finish, timeless

__all__ = ["Pico"]


class Pico:
    """Settings: ``voice`` ("en-US"), ``pitch`` and ``speed`` as factors."""

    def __init__(self) -> None:
        self._engine = NanoTTS()

    def speak(self, source: str, settings: dict[str, Any], rng: np.random.Generator) -> Speech:
        """Speaks ``source``."""
        pcm = self._engine.speak(
            source,
            voice=settings["voice"],
            pitch=settings["pitch"] * float(rng.uniform(0.94, 1.06)),
            speed=settings["speed"] * float(rng.uniform(0.88, 1.14)),
        )
        return finish(np.frombuffer(pcm, dtype="<i2"), SAMPLE_RATE_HZ, timeless(source))
