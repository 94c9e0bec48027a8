"""The values of a live session: receipts of what was pushed, events, outputs. Plain data.

Owns their fields and units. Read `session.py` for who makes them, `../types.py` for micro-turns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from duplex_engine.types import Event, MicroTurn

__all__ = [
    "AudioFilled",
    "BackgroundFailed",
    "EndReason",
    "Interrupted",
    "LiveEvent",
    "LiveTurn",
    "NotRewound",
    "OutputLost",
    "Receipt",
    "Refused",
    "Rewound",
    "Status",
    "Summarised",
    "SummaryFailed",
    "TurnInput",
]

Status: TypeAlias = Literal["queued", "repeated", "late", "early", "too_fast", "full"]
EndReason: TypeAlias = Literal["closed", "capacity", "error", "callback", "lease", "engine closed"]


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one push. Nothing but "queued" changed anything.

    Attributes:
        status: "queued": it will be appended. "repeated": it was taken before. "late": silence was
            appended in its place. "early": too far ahead of what is missing. "too_fast": more sound
            than real time and a burst. "full": too much of this kind waits already.
        waiting_ms: sound that waits, after this push.
    """

    status: Status
    waiting_ms: float = 0.0

    @property
    def accepted(self) -> bool:
        """Whether it is, or was already, on its way to the model."""
        return self.status in ("queued", "repeated")


@dataclass(frozen=True, slots=True)
class AudioFilled:
    """Sound that had not come in time: `ms` of silence were appended in its place."""

    ms: float


@dataclass(frozen=True, slots=True)
class Refused:
    """A push that was not taken, by its status and number or op_id."""

    status: Status
    what: str


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The epoch was raised to `epoch`: what belongs to older ones should not be played."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Rewound:
    """Output from micro-turn `turn` on was not heard and is out of the model's context.

    The input of these `n_turns` micro-turns was appended again, with silence as output.
    """

    turn: int
    n_turns: int


@dataclass(frozen=True, slots=True)
class NotRewound:
    """Output from micro-turn `turn` on was not heard, but is too old to be taken back."""

    turn: int


@dataclass(frozen=True, slots=True)
class OutputLost:
    """`count` micro-turns of output were dropped because nobody read them."""

    count: int


@dataclass(frozen=True, slots=True)
class Summarised:
    """Positions [begin, end) of the past were replaced by a summary of `n_tokens` tokens."""

    begin: int
    end: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class SummaryFailed:
    """Positions [begin, end) of the past were forgotten without a summary."""

    begin: int
    end: int
    error: str


@dataclass(frozen=True, slots=True)
class BackgroundFailed:
    """A background task of the session raised, and is over."""

    error: str


LiveEvent: TypeAlias = (
    Event
    | BackgroundFailed
    | AudioFilled
    | Refused
    | Interrupted
    | Rewound
    | NotRewound
    | OutputLost
    | Summarised
    | SummaryFailed
)


@dataclass(frozen=True, slots=True)
class LiveTurn:
    """One micro-turn of a live session.

    Attributes:
        session_id: of the session.
        epoch: drop it if the session's epoch is higher.
        turn: what the model put out.
        events: what happened since the last output, the micro-turn's own events included.
        late_us: how long after it was due the step began.
    """

    session_id: str
    epoch: int
    turn: MicroTurn
    events: tuple[LiveEvent, ...]
    late_us: int


@dataclass(slots=True)
class TurnInput:
    """What one step is given: `n_turns` micro-turns of sound and everything else that waited.

    Attributes:
        audio: float32 (n_turns * samples of a micro-turn,) at 16 kHz.
        text, result: token ids.
        asked: the micro-turn that asked for `result`; -1: none did.
    """

    n_turns: int
    audio: Any
    text: list[int] = field(default_factory=list)
    result: list[int] = field(default_factory=list)
    asked: int = -1
    images: list[Any] = field(default_factory=list)
