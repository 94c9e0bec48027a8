"""What the last micro-turns were given and said, so that unheard output can be taken back.

Owns the small ring of inputs and the choice of where to rewind to. Does not rewind: see
`turns.py`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from duplex_engine.live.intake import Result
from duplex_engine.live.types import TurnInput

__all__ = ["MAX_RECORDS", "Heard", "Record", "merge_inputs", "truncated_to"]

MAX_RECORDS = 32  # as many marks as a session keeps


@dataclass(frozen=True, slots=True)
class Record:
    """One step: `begin` is the sequence's length before it, `index` that of its micro-turn."""

    index: int
    begin: int
    given: TurnInput
    spoke: bool


class Heard:
    """What one session's user has heard, as far as the client tells."""

    def __init__(self) -> None:
        self._records: deque[Record] = deque(maxlen=MAX_RECORDS)
        self._acked: int | None = None  # no client that says nothing is taken for deaf
        self._lost_speech: int | None = None  # newest speaking turn that left the ring

    def add(self, record: Record) -> None:
        """Notes a step."""
        if len(self._records) == MAX_RECORDS and self._records[0].spoke:
            self._lost_speech = self._records[0].index
        self._records.append(record)

    def ack(self, index: int) -> bool:
        """All output up to micro-turn `index` was heard; False changes nothing.

        An index that was acknowledged before, or has not been put out yet, is not believed.
        """
        newest = self._records[-1].index if self._records else -1
        if index > newest or (self._acked is not None and index <= self._acked):
            return False
        self._acked = index
        return True

    def unheard(self) -> tuple[int | None, list[Record]]:
        """The first micro-turn that spoke unheard, and the records from there on.

        (None, []) if all was heard; no records if that micro-turn is too old.
        """
        if self._acked is None:
            return None, []
        if self._lost_speech is not None and self._lost_speech > self._acked:
            return self._lost_speech, []
        records = list(self._records)
        for n, record in enumerate(records):
            if record.spoke and record.index > self._acked:
                return record.index, records[n:]
        return None, []

    def take_back(self, n_records: int) -> tuple[TurnInput, list[Result]]:
        """Drops the newest records; returns their inputs as one, and their results."""
        inputs = [self._records.pop().given for _ in range(n_records)][::-1]
        results = [(given.result, given.asked) for given in inputs if given.result]
        return merge_inputs(inputs), results

    def drop_from(self, length: int) -> None:
        """The sequence was truncated to `length`: what stood behind cannot be taken back any more.

        Its micro-turns come again by the same numbers, and have not been heard.
        """
        while self._records and self._records[-1].begin >= length:
            first = self._records.pop().index
            if self._acked is not None:
                self._acked = min(self._acked, first - 1)

    def settle(self) -> None:
        """Lets the past be: what was put out until now counts as heard."""
        if self._records and self._acked is not None:
            self._acked = max(self._acked, self._records[-1].index)


def merge_inputs(inputs: list[TurnInput]) -> TurnInput:
    """Several steps' inputs as one step that appends all of them, but one result, the newest's."""
    return TurnInput(
        n_turns=sum(given.n_turns for given in inputs),
        audio=np.concatenate([given.audio for given in inputs]),
        text=[token for given in inputs for token in given.text],
        result=inputs[-1].result,
        asked=inputs[-1].asked,
        images=[image for given in inputs for image in given.images],
    )


def truncated_to(before: list[int], after: list[int]) -> int | None:
    """The length to which a session was truncated between two looks at its `marks`, or None."""
    gone = [mark for mark in before if after and mark > after[0] and mark not in after]
    if not gone:
        return None
    return max(mark for mark in after if mark < gone[0])
