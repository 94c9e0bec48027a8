"""Text to token ids and back, one token at a time.

Owns the tokenizer file and the rule that text leaves only when later tokens cannot change it. Does
not own which tokens are text: see `events.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as HuggingFaceTokenizer

from duplex_engine.arguments import MAX_INT32, integer
from duplex_engine.errors import CheckpointError, InvalidArgument

__all__ = ["TextStream", "Tokenizer"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character
MAX_INCOMPLETE = 3  # bytes of a UTF-8 character that can be there while it is incomplete
MAX_PENDING = 16  # tokens held back at most: a character has four bytes, the rest is garbage


class Tokenizer:
    """A checkpoint's `tokenizer.json`."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        # What a user types is text: a control token spelled out must not become one.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        unknown = getattr(tokenizer.model, "unk_token", None)  # stands for a word, spelled or not
        added = tokenizer.get_added_tokens_decoder()
        self._control = {
            id for id, token in added.items() if token.special and token.content != unknown
        }

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads the file; raises CheckpointError if it is damaged."""
        try:
            return cls(HuggingFaceTokenizer.from_buffer(path.read_bytes()))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path}: expected a tokenizer, found: {error}") from error

    def encode(self, text: str, name: str = "text") -> list[int]:
        """Text to token ids; a control token spelled in it stays text, or is left out where the
        vocabulary has no other way to write it (one that knows whole words alone).

        Raises:
            InvalidArgument: half of a surrogate pair is in it. `name` names the argument.
        """
        try:
            text.encode()  # JSON can spell a half, UTF-8 and so the library cannot
        except UnicodeEncodeError as error:
            raise InvalidArgument(
                f"{name}: expected valid Unicode, found a lone surrogate at index {error.start}; "
                "leave it out, or replace it: text.encode('utf-8', 'replace').decode()"
            ) from None
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [id for id in ids if id not in self._control]

    def decode(self, ids: list[int]) -> str:
        """Token ids to text; control tokens and ids without a token give nothing."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class TextStream:
    """Tokens in, text out, as soon as it is certain.

    The bytes of one character may be spread over several tokens; they are held back until the
    character is complete. The pieces joined are the text of all tokens at once.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []  # tokens whose text is not yet certain
        self._n_shown = 0  # characters of theirs that have left all the same
        # Decoders drop the space before the first word of a text: later pieces are decoded behind
        # a letter, which is then taken away.
        self._letter: list[int] = []

    def copy(self) -> TextStream:
        """A second stream that goes on from the same point."""
        other = TextStream(self._tokenizer)
        other._pending, other._n_shown = self._pending.copy(), self._n_shown
        other._letter = self._letter
        return other

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON."""
        return {"pending": self._pending, "shown": self._n_shown, "begun": bool(self._letter)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where another stream of the same tokenizer left off.

        Raises:
            KeyError, TypeError, ValueError: not what `state` gave.
        """
        self._pending = [integer(i, "pending", high=MAX_INT32) for i in state["pending"]]
        self._n_shown = integer(state["shown"], "shown")
        self._letter = self._tokenizer.encode("a") if state["begun"] else []

    def push(self, token_id: int) -> str:
        """Takes one token; returns the text that became certain, often ""."""
        self._pending.append(token_id)
        n_before = len(self._tokenizer.decode(self._letter))
        text = self._tokenizer.decode(self._letter + self._pending)[n_before:]
        n_held = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_INCOMPLETE)
        if len(self._pending) >= MAX_PENDING:
            n_held = 0
        end = max(len(text) - n_held, self._n_shown)
        certain = text[self._n_shown : end]
        self._n_shown = end
        if n_held == 0:
            self._pending, self._n_shown = [], 0
            if certain:
                self._letter = self._tokenizer.encode("a")
        return certain
