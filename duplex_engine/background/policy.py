"""The choices that `Delegations` leaves to its user, with the ready-made ones.

Each is an argument of `Delegations`: `matter` (when a new request takes an old one's place),
`split` (how much of a result enters at a time), `wording` (what enters instead of a result).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from duplex_engine.background.task import Failure

__all__ = ["WORDING", "Split", "by_sentence", "same_request"]

# The text that came, to the pieces that may enter and the rest that waits for more.
Split: TypeAlias = Callable[[str], tuple[Sequence[str], str]]

# note: looks behind and gives nothing back, so that a long row of full stops is read once.
END = re.compile(r"(?<![.!?])[.!?]++[\"')\]]*+\s+|[。！？]+\s*")  # noqa: RUF001

# By failure, in order of preference. The last words are ones that the reference model can tell.
WORDING: Mapping[Failure, Sequence[str]] = {
    "error": ("the background work failed", "closed"),
    "timeout": ("the background work took too long", "late"),
    "too_many": ("too much background work at once", "late"),
}


def same_request(request: str) -> str:
    """The matter of a request is its words, whatever their case and spacing.

    So nothing takes another's place. For a policy under which a newer request on a topic replaces
    the older one, give a function that returns the topic; `lambda request: None` keeps the newest
    request alone.
    """
    return " ".join(request.split()).casefold()


def by_sentence(text: str) -> tuple[list[str], str]:
    """Every sentence that is complete and followed by a space, and what is left."""
    sentences: list[str] = []
    end = 0
    for match in END.finditer(text):
        sentences.append(text[end : match.end()].strip())
        end = match.end()
    return sentences, text[end:]
