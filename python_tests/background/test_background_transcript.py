"""The conversation as text: roles, times, bounds, rewinds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from duplex_engine import (
    Delegation,
    Engine,
    InputSummary,
    InvalidArgument,
    MemoryUse,
    MicroTurn,
    StageTiming,
)
from duplex_engine.background import Transcript

SOUND = np.zeros(3200, np.float32)


def turn(index: int, text: str = "", *requests: str, merged: int = 0) -> MicroTurn:
    return MicroTurn(
        index=index,
        epoch=0,
        token_ids=(),
        text=text,
        events=tuple(Delegation(request, (5, 6)) for request in requests),
        timing=StageTiming(0, 0, 0, 0),
        memory=MemoryUse(0),
        input=InputSummary(4, merged, 0.0),
        stopped="listen",
    )


def lines(transcript: Transcript) -> list[str]:
    return str(transcript).splitlines()


def test_roles_and_times() -> None:
    transcript = Transcript()
    transcript.add({"audio": SOUND}, turn(0))
    transcript.add({"audio": SOUND, "text": "hello"}, turn(1, " good"))
    transcript.add({"audio": SOUND}, turn(2, " day"))
    picture = np.zeros((48, 64, 3), np.uint8)
    transcript.add({"audio": SOUND, "image": picture}, turn(3, "", "weather paris"))
    transcript.add({"audio": SOUND}, turn(4, " sunny"), ["sunny"])
    transcript.add({"result": "warm"}, turn(5))
    assert lines(transcript) == [
        "[0.0-1.0 s] (sound)",
        "[0.2-0.4 s] user typed: hello",
        "[0.2-0.6 s] assistant: good day",
        "[0.6-0.8 s] (picture of 64x48)",
        "[0.6-0.8 s] assistant asked the background: weather paris",
        "[0.8-1.0 s] background result: sunny",
        "[0.8-1.0 s] assistant: sunny",
        "[1.0-1.2 s] background result: warm",
    ]
    entry = transcript.entries[2]
    assert (entry.role, entry.first_turn, entry.last_turn) == ("model", 1, 2)
    assert (entry.start_ms, entry.end_ms) == (200, 600)


def test_a_picture_of_any_library_has_its_size() -> None:
    transcript = Transcript()
    transcript.add({"image": Image.new("RGB", (64, 48))}, turn(0))
    assert lines(transcript) == ["[0.0-0.2 s] (picture of 64x48)"]


def test_a_pause_ends_what_was_said_and_what_was_heard() -> None:
    transcript = Transcript()
    for index in range(12):
        heard = {} if index in (4, 5) else {"audio": SOUND}
        transcript.add(heard, turn(index, {0: "a", 2: "b", 9: "c"}.get(index, "")))
    assert lines(transcript) == [
        "[0.0-0.8 s] (sound)",
        "[0.0-0.6 s] assistant: ab",
        "[1.2-2.4 s] (sound)",
        "[1.8-2.0 s] assistant: c",
    ]


def test_merged_turns_do_not_cut_the_sound() -> None:
    transcript = Transcript()
    transcript.add({"audio": SOUND}, turn(0))
    transcript.add({"audio": SOUND}, turn(4, merged=3))
    assert lines(transcript) == ["[0.0-1.0 s] (sound)"]


def test_the_oldest_goes_first() -> None:
    transcript = Transcript(max_entries=3)
    for index in range(10):
        transcript.add({"audio": SOUND, "text": f"t{index}"}, turn(index))
    assert (
        transcript.n_dropped == 10
    )  # of ten texts and three spans of sound: a lost one is begun again
    assert lines(transcript)[0] == f"({transcript.n_dropped} older entries are left out)"
    assert [e.text for e in transcript.entries if e.role == "user"][-1] == "t9"
    assert len(transcript.entries) == 3


def test_characters_are_bounded_too() -> None:
    transcript = Transcript(max_chars=100)
    for index in range(50):
        transcript.add({"text": "x" * 30}, turn(index))
    assert sum(len(e.text) for e in transcript.entries) <= 100
    transcript.add({"text": "y" * 10**6}, turn(50))
    assert [len(e.text) for e in transcript.entries] == [100]
    for index in range(51, 500):  # one entry that only grows
        transcript.add({}, turn(index, "zz"))
    assert sum(len(e.text) for e in transcript.entries) <= 100


def test_a_rewind_takes_back_what_came_since() -> None:
    transcript = Transcript()
    for index in range(6):
        transcript.add({"audio": SOUND, "text": f"t{index}"}, turn(index))
    transcript.add({"audio": SOUND, "text": "again"}, turn(3))
    assert [e.text for e in transcript.entries if e.role == "user"] == ["t0", "t1", "t2", "again"]
    (sound,) = (e for e in transcript.entries if e.role == "sound")
    assert (sound.first_turn, sound.last_turn) == (0, 3)


def test_token_ids_are_read(reference: Engine) -> None:
    tokenizer = reference.tokenizer
    assert tokenizer is not None
    transcript = Transcript(tokenizer)
    transcript.add({"text": tokenizer.encode("hello monday")}, turn(0))
    transcript.add({"text": np.array([], np.int32)}, turn(1))
    assert lines(transcript) == ["[0.0-0.2 s] user typed: hello monday"]
    unread = Transcript()
    unread.add({"text": [5, 6, 7]}, turn(0, "", ""))
    assert [e.text for e in unread.entries] == ["(3 tokens)", "(2 tokens)"]


@pytest.mark.parametrize("name", ["max_entries", "max_chars", "turn_ms"])
def test_bounds_are_positive(name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        Transcript(**{name: 0})


def test_an_entry_is_a_value() -> None:
    transcript = Transcript()
    transcript.add({}, turn(0, "a"))
    before = transcript.entries
    transcript.add({}, turn(1, "b"))
    assert before[0].text == "a"
    assert transcript.entries[0] == replace(before[0], text="ab", last_turn=1)
