"""What the model's output tokens mean: text for the user, delegations, control tokens.

Owns the state that a delegation or a half-written character carries from one micro-turn to the
next, and the form in which a caller gets a micro-turn. Read `text.py` for the characters,
docs/MODEL.md for the layout of a micro-turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy as shallow_copy
from typing import Any

from duplex_engine import _core
from duplex_engine.arrays import SAMPLE_RATE, token_ids
from duplex_engine.config import ModelConfig
from duplex_engine.text import TextStream, Tokenizer
from duplex_engine.types import (
    Delegation,
    Event,
    Forgot,
    InputSummary,
    MemoryUse,
    MergedTurns,
    MicroTurn,
    MissingAudio,
    StageTiming,
)

__all__ = ["OutputReader", "micro_turn"]

SAMPLES_PER_MS = SAMPLE_RATE // 1000
MAX_REQUEST = 1_024  # tokens of a delegation; a model that writes more has forgotten to end it


class OutputReader:
    """Reads one session's output tokens in order."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._text = None if tokenizer is None else TextStream(tokenizer)
        self._request: list[int] | None = None  # tokens of the delegation being written
        self._control = set(config.text.eos_token_ids)
        if (layout := config.interaction) is not None:
            self._control.update(getattr(layout, key) for key in layout.token_keys)

    def copy(self) -> OutputReader:
        """A second reader that goes on from the same point."""
        other = shallow_copy(self)
        other._text = None if self._text is None else self._text.copy()
        other._request = None if self._request is None else self._request.copy()
        return other

    def state(self) -> dict[str, Any]:
        """What `restored` needs, as plain JSON."""
        return {
            "request": self._request,
            "text": None if self._text is None else self._text.state(),
        }

    def restored(self, state: dict[str, Any]) -> OutputReader:
        """A reader that goes on where one of the same model left off.

        Raises:
            KeyError, TypeError, ValueError: not what `state` gave.
        """
        other = OutputReader(self._config, self._tokenizer)
        if state["request"] is not None:
            other._request = token_ids(state["request"], self._config.text.vocab_size, "request")
        if other._text is not None and state["text"] is not None:
            other._text.restore(state["text"])
        return other

    def read(self, ids: Iterable[int]) -> tuple[str, list[Delegation]]:
        """Takes the tokens of one micro-turn; returns its text and the delegations it completed.

        A second `delegate` inside a request starts the request again. One that grows longer than
        `MAX_REQUEST` tokens is dropped, and what follows it is text.
        """
        layout = self._config.interaction
        pieces: list[str] = []
        delegations: list[Delegation] = []
        for token in ids:
            if layout is not None and token == layout.delegate:
                self._request = []
            elif layout is not None and token == layout.delegate_end:
                if self._request is not None:
                    delegations.append(self._delegation(self._request))
                self._request = None
            elif token in self._control:
                continue
            elif self._request is not None:
                self._request.append(token)
                if len(self._request) > MAX_REQUEST:
                    self._request = None
            elif self._text is not None:
                pieces.append(self._text.push(token))
        return "".join(pieces), delegations

    def _delegation(self, ids: list[int]) -> Delegation:
        text = "" if self._tokenizer is None else self._tokenizer.decode(ids)
        return Delegation(text, tuple(ids))


def micro_turn(turn: _core.Turn, text: str, delegations: Iterable[Delegation]) -> MicroTurn:
    """The core's turn as a caller gets it, with what its tokens mean."""
    missing_ms = turn.missing_samples / SAMPLES_PER_MS
    events: list[Event] = []
    begin, end = turn.forgotten
    if begin < end:
        events.append(Forgot(begin, end))
    if turn.merged_turns:
        events.append(MergedTurns(turn.merged_turns))
    if turn.missing_samples:
        events.append(MissingAudio(missing_ms))
    stopped: Any = turn.stopped
    return MicroTurn(
        index=turn.turn - 1,
        epoch=turn.epoch,
        token_ids=tuple(turn.token_ids),
        text=text,
        events=(*events, *delegations),
        timing=StageTiming(turn.encode_us, turn.append_us, turn.decode_us, turn.total_us),
        memory=MemoryUse(turn.kv_bytes),
        input=InputSummary(turn.n_rows, turn.merged_turns, missing_ms),
        stopped=stopped,
        drafted=turn.n_drafted,
        accepted=turn.n_accepted,
    )
