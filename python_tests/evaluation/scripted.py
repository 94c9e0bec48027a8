"""Sessions that say what a script says, and streams put together by hand, for the tests here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np
import pytest

from duplex_engine.evaluation.streams import StreamLog, TurnLog
from duplex_engine.training.stage import Episode, Event
from duplex_engine.types import Delegation, InputSummary, MemoryUse, MicroTurn, StageTiming

LISTEN = 0
TURN_S = 0.2
COMPUTE_S = 0.01  # of each micro-turn in `log_of`


def skip_without_detector() -> None:
    """Skips a test that needs the voice-activity detector, where that is not installed."""
    if not (find_spec("silero_vad") and find_spec("onnxruntime")):
        pytest.skip("the extra `eval` is not installed")


@dataclass
class ScriptedSession:
    """Puts out `says[k]` in its k-th step, and keeps what it was given.

    says: text by step; "delegate: x" is a delegation.
    listen: called with the step's number and its sound.
    """

    says: Mapping[int, str] = field(default_factory=dict)
    listen: Callable[[int, object], None] = lambda _, __: None
    given: list[dict[str, object]] = field(default_factory=list)

    def step(
        self,
        audio: object = None,
        image: object = None,
        text: object = None,
        *,
        result: object = None,
        sample_rate: int | None = None,
    ) -> MicroTurn:
        k = len(self.given)
        given = {"audio": audio, "image": image, "text": text, "result": result}
        self.given.append(given | {"sample_rate": sample_rate})
        self.listen(k, audio)
        said = self.says.get(k, "")
        request = said.removeprefix("delegate: ") if said.startswith("delegate: ") else None
        ids = tuple(range(1, 1 + len(said.split())))
        return MicroTurn(
            index=k,
            epoch=0,
            token_ids=(*ids, LISTEN),
            text="" if request is not None else said,
            events=() if request is None else (Delegation(request, ids),),
            timing=StageTiming(0, 0, 0, 0),
            memory=MemoryUse(0),
            input=InputSummary(0, 0, 0.0),
            stopped="listen",
        )


def log_of(said: Mapping[int, Sequence[int]], n_turns: int = 50) -> StreamLog:
    """A log from tokens by micro-turn."""
    turns = [
        TurnLog(k, (k + 1) * TURN_S + COMPUTE_S, COMPUTE_S, tuple(said.get(k, ())))
        for k in range(n_turns)
    ]
    return StreamLog(tuple(turns), n_turns * TURN_S)


def episode_of(
    events: Sequence[Event], outputs: Mapping[int, Sequence[int]] | None = None, n_turns: int = 50
) -> Episode:
    """A silent episode; without `outputs`, they are those of the events."""
    if outputs is None:
        outputs = {event.turn: event.tokens for event in events if event.tokens}
    return Episode(
        audio=np.zeros(n_turns * 3200, np.float32),
        images={},
        typed={},
        results={},
        outputs={turn: list(tokens) for turn, tokens in outputs.items()},
        events=list(events),
        labels=np.zeros(n_turns * 4, np.int16),
        expected=np.zeros(n_turns * 4, np.int16),
    )
