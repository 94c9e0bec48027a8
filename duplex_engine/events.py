"""What the model's output tokens mean: text for the user, delegations, control tokens.

Owns the state that a delegation or a half-written character carries from one micro-turn to the
next. Read `text.py` for the characters, docs/MODEL.md for the layout of a micro-turn.
"""

from __future__ import annotations

from collections.abc import Iterable

from duplex_engine.config import ModelConfig
from duplex_engine.text import TextStream, Tokenizer
from duplex_engine.types import Delegation

__all__ = ["OutputReader"]


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
        other = OutputReader(self._config, self._tokenizer)
        other._text = None if self._text is None else self._text.copy()
        other._request = None if self._request is None else self._request.copy()
        return other

    def read(self, token_ids: Iterable[int]) -> tuple[str, list[Delegation]]:
        """Takes the tokens of one micro-turn; returns its text and the delegations it completed.

        A second `delegate` inside a request starts the request again.
        """
        layout = self._config.interaction
        pieces: list[str] = []
        delegations: list[Delegation] = []
        for token in token_ids:
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
            elif self._text is not None:
                pieces.append(self._text.push(token))
        return "".join(pieces), delegations

    def _delegation(self, ids: list[int]) -> Delegation:
        text = "" if self._tokenizer is None else self._tokenizer.decode(ids)
        return Delegation(text, tuple(ids))
