"""The conversation so far as text with roles and times: what a background worker is told.

Owns the entries and their bound. What was said to the model is sound, which has no text: the model
itself is the only one that heard it, so a span of sound is a mark, and the words of a question are
those in which the model hands it on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from duplex_engine.arguments import integer
from duplex_engine.arrays import rgb_image
from duplex_engine.text import Tokenizer
from duplex_engine.types import Delegation, MicroTurn

__all__ = ["Entry", "Role", "Transcript", "transcript_text"]

Role: TypeAlias = Literal["sound", "picture", "user", "result", "model", "request"]

LABELS: Mapping[Role, str] = {
    "sound": "(sound)",
    "picture": "(picture",
    "user": "user typed:",
    "result": "background result:",
    "model": "assistant:",
    "request": "assistant asked the background:",
}
PAUSE_TURNS = 2  # of silence, after which the model's text is a new entry


@dataclass(frozen=True, slots=True)
class Entry:
    """A part of the conversation.

    Attributes:
        role: "user" typed it, the "model" said it, the model handed it on as a "request", the
            "result" of one entered; "sound" and "picture" are marks.
        text: the words; "" for sound, "WIDTHxHEIGHT" for a picture.
        first_turn, last_turn: the micro-turns in which it began and ended.
        start_ms, end_ms: the same as times of the stream.
    """

    role: Role
    text: str
    first_turn: int
    last_turn: int
    turn_ms: int

    @property
    def start_ms(self) -> int:
        """When its first micro-turn began."""
        return self.first_turn * self.turn_ms

    @property
    def end_ms(self) -> int:
        """When its last micro-turn ended."""
        return (self.last_turn + 1) * self.turn_ms

    def __str__(self) -> str:
        time = f"[{self.start_ms / 1000:.1f}-{self.end_ms / 1000:.1f} s]"
        label = LABELS[self.role]
        if self.role == "picture":
            return f"{time} {label} of {self.text})"
        return f"{time} {label} {self.text.strip()}".rstrip()


class Transcript:
    """Takes each micro-turn, keeps the newest entries. Any thread may read it."""

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        *,
        turn_ms: int = 200,
        max_entries: int = 500,
        max_chars: int = 100_000,
    ) -> None:
        """Starts empty.

        Args:
            tokenizer: reads what was typed as token ids.
            turn_ms: how long a micro-turn lasts.
            max_entries, max_chars: beyond either, the oldest entries go.
        """
        self._tokenizer = tokenizer
        self._turn_ms = integer(turn_ms, "turn_ms", low=1)
        self._max_entries = integer(max_entries, "max_entries", low=1)
        self._max_chars = integer(max_chars, "max_chars", low=1)
        self._entries: dict[int, Entry] = {}  # by number, ascending
        self._next = 0
        self._turn = -1  # the newest micro-turn
        self._n_chars = 0
        self._n_dropped = 0
        self._newest: dict[Role, int] = {}  # number of the newest entry that may still grow
        self._lock = threading.Lock()

    def add(self, inputs: Mapping[str, Any], turn: MicroTurn, results: Iterable[str] = ()) -> None:
        """Takes one micro-turn: what was given to it, as in `StepInput`, and what came out.

        A micro-turn that was there already says that the session was rewound: what came since is
        taken back.

        results: texts that entered without standing in `inputs`.
        """
        with self._lock:
            if turn.index <= self._turn:
                self._rewind(turn.index)
            self._turn = turn.index
            for text in (*results, self._words(inputs.get("result"))):
                self._say("result", text, turn.index)
            self._say("user", self._words(inputs.get("text")), turn.index)
            if (image := inputs.get("image")) is not None:
                height, width, _ = rgb_image(image).shape
                self._append("picture", f"{width}x{height}", turn.index)
            if inputs.get("audio") is not None:
                self._hear(turn.index, turn.index - turn.input.merged_turns - 1)
            self._reply(turn.text, turn.index)
            for event in turn.events:
                if isinstance(event, Delegation):
                    request = event.text or self._words(event.token_ids)
                    self._say("request", request, turn.index)
            self._bound()

    def rewind(self, turn: int) -> None:
        """Takes back what came from micro-turn `turn` on."""
        with self._lock:
            self._rewind(turn)
            self._turn = min(self._turn, turn - 1)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What is kept, oldest first."""
        with self._lock:
            return tuple(self._entries.values())

    @property
    def n_dropped(self) -> int:
        """How many older entries are gone."""
        with self._lock:
            return self._n_dropped

    def __str__(self) -> str:
        return transcript_text(self.entries, self.n_dropped)

    def _words(self, value: object) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        ids = [int(i) for i in value]  # type: ignore[attr-defined]  # the session took them as ids
        text = "" if self._tokenizer is None else self._tokenizer.decode(ids)
        return text or f"({len(ids)} tokens)" if ids else ""

    def _say(self, role: Role, text: str, turn: int) -> None:
        if text.strip():
            self._append(role, text, turn)
            self._newest.pop("model", None)  # the model's next words answer this

    def _reply(self, text: str, turn: int) -> None:
        """The model's text comes in pieces, over several micro-turns."""
        number = self._newest.get("model")
        last = None if number is None else self._entries.get(number)
        if last is not None and number is not None and turn - last.last_turn <= PAUSE_TURNS:
            if text:
                self._grow(number, last.text + text, turn)
        elif text.strip():
            self._newest["model"] = self._append("model", text, turn)

    def _hear(self, turn: int, before: int) -> None:
        number = self._newest.get("sound")
        last = None if number is None else self._entries.get(number)
        if last is not None and number is not None and last.last_turn >= before:
            self._grow(number, "", turn)
        else:
            self._newest["sound"] = self._append("sound", "", turn)

    def _append(self, role: Role, text: str, turn: int) -> int:
        number, self._next = self._next, self._next + 1
        text = text[: self._max_chars]
        self._entries[number] = Entry(role, text, turn, turn, self._turn_ms)
        self._n_chars += len(text)
        return number

    def _grow(self, number: int, text: str, turn: int) -> None:
        entry, text = self._entries[number], text[: self._max_chars]
        self._entries[number] = replace(entry, text=text, last_turn=turn)
        self._n_chars += len(text) - len(entry.text)

    def _rewind(self, turn: int) -> None:
        for number in [n for n, e in self._entries.items() if e.last_turn >= turn]:
            entry = self._entries[number]
            if entry.first_turn >= turn:
                self._n_chars -= len(self._entries.pop(number).text)
            else:  # begun before: its end is not known any more
                self._entries[number] = replace(entry, last_turn=turn - 1)

    def _bound(self) -> None:
        while len(self._entries) > self._max_entries or self._n_chars > self._max_chars:
            oldest = next(iter(self._entries))
            self._n_chars -= len(self._entries.pop(oldest).text)
            self._n_dropped += 1


def transcript_text(entries: Sequence[Entry], n_dropped: int = 0) -> str:
    """One line for each entry, with its times; says first how many older ones are gone."""
    head = [f"({n_dropped} older entries are left out)"] if n_dropped else []
    return "\n".join([*head, *map(str, entries)])
