"""The values a caller gets back: plain frozen dataclasses, no behaviour.

Owns their fields and units. Does not own how they are filled: see `session.py` for micro-turns and
`events.py` for what is read out of the model's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict

__all__ = [
    "Delegation",
    "Event",
    "Forgot",
    "InputSummary",
    "MemoryUse",
    "MergedTurns",
    "MicroTurn",
    "MissingAudio",
    "StageTiming",
    "StepInput",
    "Stopped",
    "Window",
]

Stopped: TypeAlias = Literal["listen", "eos", "limit", "interrupted"]


class StepInput(TypedDict, total=False):
    """What one session is given for a micro-turn: the arguments of `Session.step`."""

    audio: Any
    image: Any
    text: Any
    result: Any
    sample_rate: int | None
    max_tokens: int | None


@dataclass(frozen=True, slots=True)
class Delegation:
    """The model finished handing work to the background: the request it wrote.

    Attributes:
        text: the request; "" if the checkpoint has no tokenizer.
        token_ids: the request's tokens, without the markers around them.
    """

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MissingAudio:
    """The micro-turn had less sound than it lasts; silence was appended in its place."""

    ms: float


@dataclass(frozen=True, slots=True)
class MergedTurns:
    """`count` earlier micro-turns were waiting too: appended in the same pass, without output."""

    count: int


@dataclass(frozen=True, slots=True)
class Forgot:
    """The session was full: positions [begin, end) were forgotten before the micro-turn.

    What lies behind keeps its numbers. See `Window`.
    """

    begin: int
    end: int


Event: TypeAlias = Delegation | MissingAudio | MergedTurns | Forgot


@dataclass(frozen=True, slots=True)
class Window:
    """What an endless session remembers: the rest is forgotten when `max_positions` are full.

    The oldest middle goes, in blocks of 64 positions, before a call whose rows would not fit, and
    as much of it that head and recent part are left. A row is a token, 50 ms of sound or a patch of
    a picture, so a silent micro-turn takes 5 positions, and an hour of them 90,000.

    Attributes:
        head: positions from the beginning that stay for ever, rounded up to 64.
        recent: newest positions that stay. Where one call brings more rows than there is room
            for, fewer do, down to the longest window of the model.
    """

    head: int
    recent: int


@dataclass(frozen=True, slots=True)
class StageTiming:
    """Wall-clock microseconds of one micro-turn, by stage.

    Attributes:
        encode_us: sound and pictures to rows.
        append_us: the pass over the new rows; on a GPU, which goes on by itself, with most of the
            tokens.
        decode_us: the passes that wrote the output tokens.
        total_us: all of it, bookkeeping included.
    """

    encode_us: int
    append_us: int
    decode_us: int
    total_us: int


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes after a micro-turn.

    Attributes:
        sequence_bytes: keys, values and convolution state that the session holds, drafting layers
            included; what forks share counts fully for each. `Session.memory` says it by part.
    """

    sequence_bytes: int


@dataclass(frozen=True, slots=True)
class InputSummary:
    """What a micro-turn appended before it decoded.

    Attributes:
        rows: rows of text, sound and pictures.
        merged_turns: earlier micro-turns appended in the same pass.
        missing_ms: milliseconds of sound that had not come and were appended as silence.
    """

    rows: int
    merged_turns: int
    missing_ms: float


@dataclass(frozen=True, slots=True)
class MicroTurn:
    """One micro-turn: what the model put out, and what it cost.

    Attributes:
        index: number of the micro-turn in its session, from 0.
        epoch: raised by every interruption; output of an older epoch should not be played.
        token_ids: all output tokens, control tokens included.
        text: the new text for the user, without control tokens and delegated text. A character
            whose bytes are split over tokens comes out when it is complete, perhaps a turn later.
        events: what happened besides, in order.
        timing: microseconds by stage.
        memory: bytes that the session holds after it.
        input: what was appended.
        stopped: why the output ended: the model chose to "listen", wrote an end-of-sequence token
            ("eos"), reached the "limit" of tokens, or was "interrupted".
        drafted: tokens guessed and computed ahead; see `speculate` of `Engine.open_session`.
        accepted: of those, the ones that the model then put out.
    """

    index: int
    epoch: int
    token_ids: tuple[int, ...]
    text: str
    events: tuple[Event, ...]
    timing: StageTiming
    memory: MemoryUse
    input: InputSummary
    stopped: Stopped
    drafted: int = 0
    accepted: int = 0
