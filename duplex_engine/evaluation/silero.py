"""Where there is speech in a recording, by the Silero voice-activity detector.

Owns the detector's state and its thresholds, which are those that the package has by default. The
network comes with `silero-vad` and runs in `onnxruntime` (extra `eval`); torch is not imported.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from duplex_engine.arrays import SAMPLE_RATE
from duplex_engine.errors import BackendUnavailable

__all__ = ["WINDOW_S", "Segment", "SpeechProbability", "VadOptions", "speech_segments"]

Segment: TypeAlias = tuple[float, float]  # start and end in seconds

WINDOW = 512  # samples that the network judges at a time
WINDOW_S = WINDOW / SAMPLE_RATE
CONTEXT = 64  # samples of the window before that it sees again
STATE_SHAPE = (2, 1, 128)
MODEL_FILE = "silero_vad_16k_op15.onnx"


@dataclass(frozen=True, slots=True)
class VadOptions:
    """When probabilities become speech; the defaults of the package.

    Attributes:
        threshold: speech begins at this probability.
        end_threshold: it ends below this one.
        min_speech_s: speech that is not longer is none.
        min_silence_s: shorter silence does not end it.
        pad_s: added on both sides of a segment.
    """

    threshold: float = 0.5
    end_threshold: float = 0.35
    min_speech_s: float = 0.25
    min_silence_s: float = 0.1
    pad_s: float = 0.03


class SpeechProbability:
    """The network, window by window.

    Raises:
        BackendUnavailable: `silero-vad` or `onnxruntime` is not installed.
    """

    def __init__(self) -> None:
        package = importlib.util.find_spec("silero_vad")
        has_runtime = importlib.util.find_spec("onnxruntime") is not None
        if package is None or package.origin is None or not has_runtime:
            raise BackendUnavailable(
                "voice activity: expected the packages silero-vad and onnxruntime, found one or "
                "both missing; pip install 'duplex_engine[eval]'"
            )
        onnxruntime: Any = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = Path(package.origin).parent / "data" / MODEL_FILE
        self._network: Any = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.reset()

    def reset(self) -> None:
        """Forgets what was heard."""
        self._state = np.zeros(STATE_SHAPE, np.float32)
        self._context = np.zeros(CONTEXT, np.float32)

    def push(self, window: NDArray[np.float32]) -> float:
        """The probability in [0, 1] that these 512 samples are speech."""
        heard = np.concatenate([self._context, window])
        self._context = window[-CONTEXT:]
        probability, self._state = self._network.run(
            None,
            {
                "input": heard[None],
                "state": self._state,
                "sr": np.asarray(SAMPLE_RATE, np.int64),
            },
        )
        return float(probability[0, 0])

    def of(self, audio: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities (ceil(n / 512),) of a whole recording (n,), from its beginning."""
        self.reset()
        padded = np.zeros(-(-len(audio) // WINDOW) * WINDOW, np.float32)
        padded[: len(audio)] = audio
        return np.array([self.push(window) for window in padded.reshape(-1, WINDOW)], np.float32)


def speech_segments(
    probabilities: NDArray[np.float32], options: VadOptions | None = None
) -> list[Segment]:
    """Segments of speech in seconds, from the probability of each window."""
    chosen = options or VadOptions()
    end_s = len(probabilities) * WINDOW_S
    segments: list[Segment] = []
    start_s: float | None = None
    quiet_s: float | None = None  # since when it may have ended
    for i, probability in enumerate(probabilities):
        now_s = i * WINDOW_S
        if probability >= chosen.threshold:
            quiet_s = None
            start_s = now_s if start_s is None else start_s
        elif probability < chosen.end_threshold and start_s is not None:
            quiet_s = now_s if quiet_s is None else quiet_s
            # The package counts to the beginning of this window.
            if now_s - quiet_s >= chosen.min_silence_s:
                segments.append((start_s, quiet_s))
                start_s = quiet_s = None
    if start_s is not None:
        segments.append((start_s, end_s))
    return [
        (max(start - chosen.pad_s, 0.0), min(end + chosen.pad_s, end_s))
        for start, end in segments
        if end - start > chosen.min_speech_s
    ]
