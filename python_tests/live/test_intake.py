"""Numbered sound in every disorder, op ids, and the caps on what may wait: without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex_engine import InvalidArgument
from duplex_engine.arrays import Resampler
from duplex_engine.live.intake import (
    BURST_MS,
    MAX_REMEMBERED,
    MAX_WAITING_IDS,
    MAX_WAITING_MS,
    AudioIntake,
    Mailbox,
)
from duplex_engine.live.types import TurnInput

CHUNK = 800  # samples of a numbered chunk: a quarter of a micro-turn


def piece(n: int, samples: int = CHUNK) -> Any:
    """Chunk n holds n + 1 everywhere, so that it can be told from silence."""
    return np.full(samples, n + 1, np.float32)


def push(intake: AudioIntake, n: int, now_us: int = 0, rate: int = 16_000) -> str:
    return intake.push(piece(n), n, rate, now_us)


def levels(sound: Any) -> list[int]:
    return [int(value) for value in sound[::CHUNK]]


def test_chunks_are_put_in_order_and_taken_once() -> None:
    intake = AudioIntake(200)
    assert [push(intake, n) for n in (1, 3, 3, 0, 1, 2, 0)] == [
        "queued",
        "queued",
        "repeated",
        "queued",
        "repeated",
        "queued",
        "repeated",
    ]
    assert intake.n_whole == 1
    sound, filled_ms = intake.take(1)
    assert (levels(sound), filled_ms) == ([1, 2, 3, 4], 0)
    assert push(intake, 2) == "repeated"


def test_a_chunk_that_never_comes_is_silence_and_refused_afterwards() -> None:
    intake = AudioIntake(200)
    for n in (0, 2, 3, 4):
        push(intake, n)
    assert intake.n_whole == 0
    sound, filled_ms = intake.take(1)
    assert (levels(sound), filled_ms) == ([1, 0, 3, 4], 50)
    assert push(intake, 1) == "late"
    assert push(intake, 1) == "late"
    for n in (5, 6, 7):
        assert push(intake, n) == "queued"
    assert levels(intake.take(1)[0]) == [5, 6, 7, 8]


def test_the_rest_of_a_chunk_whose_head_was_filled_is_kept() -> None:
    intake = AudioIntake(200)
    third = 1280  # 80 ms: two and a half chunks are a micro-turn
    for n in range(2):
        intake.push(piece(n, third), n, 16_000, 0)
    sound, filled_ms = intake.take(1)
    assert filled_ms == 40
    assert [int(v) for v in sound[:: third // 2]] == [1, 1, 2, 2, 0]
    assert intake.push(piece(2, third), 2, 16_000, 0) == "queued"
    assert intake.waiting_ms == 40
    assert intake.push(piece(3, third), 3, 16_000, 0) == "queued"
    assert intake.push(piece(4, third), 4, 16_000, 0) == "queued"
    assert [int(v) for v in intake.take(1)[0][:: third // 2]] == [3, 4, 4, 5, 5]


def test_a_stream_that_paused_goes_on_where_time_is_now() -> None:
    intake = AudioIntake(200)
    for n in range(4):
        push(intake, n)
    for _ in range(6):  # the first has sound, then the client says nothing for a second
        intake.take(1)
    assert push(intake, 4) == "late"  # one chunk may just be late
    assert push(intake, 5) == "queued"  # two in a row: the stream has moved
    for n in (6, 7, 8):
        assert push(intake, n) == "queued"
    assert levels(intake.take(1)[0]) == [6, 7, 8, 9]
    assert push(intake, 4) == "late"


def test_a_chunk_far_ahead_is_refused_unless_the_stream_jumped() -> None:
    intake = AudioIntake(200)
    push(intake, 0)
    assert push(intake, 40) == "early"
    assert push(intake, 41) == "queued"
    assert push(intake, 42) == "queued"
    assert levels(intake.take(1)[0]) == [1, 42, 43, 0]


def test_sound_without_a_number_follows_what_came_before() -> None:
    intake = AudioIntake(200)
    assert [push(intake, n) for n in (0, 2, 3)] == ["queued"] * 3
    assert intake.push(piece(99, 0), None, 16_000, 0) == "queued"  # nothing follows nothing
    assert push(intake, 1) == "queued"
    assert push(intake, 5) == "queued"
    assert intake.push(piece(99, 2 * CHUNK), None, 16_000, 0) == "queued"  # 4 will not come
    assert push(intake, 4) == "late"
    assert [push(intake, n) for n in (6, 7, 8, 9)] == ["queued"] * 4
    sound, filled_ms = intake.take(3)
    assert (levels(sound), filled_ms) == ([1, 2, 3, 4, 0, 6, 100, 100, 7, 8, 9, 10], 50)


def test_more_than_real_time_and_a_burst_is_refused() -> None:
    intake = AudioIntake(200)
    n_burst = int(BURST_MS / 50)
    assert [push(intake, n) for n in range(n_burst)] == ["queued"] * n_burst
    assert push(intake, n_burst) == "too_fast"
    assert push(intake, n_burst, 40_000) == "too_fast"
    assert push(intake, n_burst, 50_000) == "queued"  # the same chunk again, when there is time
    assert intake.waiting_ms == BURST_MS + 50
    for n in range(1, 400):  # and at its pace for ever
        assert push(intake, n_burst + n, 50_000 + n * 50_000) == "queued"
        if n % 4 == 0:
            intake.take(1)


def test_sound_that_no_turn_takes_is_refused() -> None:
    intake = AudioIntake(200)
    n_most = int(MAX_WAITING_MS / 50)
    assert [push(intake, n, n * 50_000) for n in range(n_most)] == ["queued"] * n_most
    assert push(intake, n_most, n_most * 50_000) == "full"
    assert intake.waiting_ms == MAX_WAITING_MS
    intake.take(1)
    assert push(intake, n_most, n_most * 50_000) == "queued"  # the same chunk again


def test_what_is_remembered_is_bounded() -> None:
    intake, mailbox = AudioIntake(200), Mailbox()
    for n in range(5 * MAX_REMEMBERED):
        push(intake, n, n * 50_000)
        mailbox.push_ids("text", [1], f"op {n}")
        if intake.n_whole:
            intake.take(1)
            mailbox.take(TurnInput(1, None))
    assert len(intake._seen._keys) == len(mailbox._ops._keys) == MAX_REMEMBERED
    assert not intake._ahead
    assert push(intake, 0, 10**12) == "late"


def test_numbers_begin_anew_after_a_reconnection() -> None:
    intake = AudioIntake(200)
    for n in range(4):
        push(intake, n)
    intake.restart_numbering()
    assert [intake.push(piece(9, 1600), n, 16_000, 0) for n in (1, 0)] == ["queued"] * 2
    assert levels(intake.take(2)[0]) == [1, 2, 3, 4, 10, 10, 10, 10]


def test_what_was_queued_ahead_of_a_gap_is_kept() -> None:
    for how in ("reconnection", "jump"):
        intake = AudioIntake(200)
        assert [push(intake, n) for n in (0, 2, 5)] == ["queued"] * 3
        if how == "reconnection":
            intake.restart_numbering()
        else:
            assert [push(intake, n) for n in (90, 91)] == ["early", "queued"]
        first = 0 if how == "reconnection" else 92
        assert [push(intake, first + n) for n in range(2)] == ["queued"] * 2
        sound, filled_ms = intake.take(2)
        newest = [1, 2] if how == "reconnection" else [92, 93]
        assert (levels(sound), filled_ms) == ([1, 0, 3, 0, 0, 6, *newest], 150)


def test_other_rates_are_resampled_in_order() -> None:
    rng = np.random.default_rng(0)
    whole = rng.standard_normal(48_000).astype(np.float32)
    chunks = np.split(whole, 50)
    intake = AudioIntake(200)
    for n in (1, 0, *range(3, 50), 2):
        assert intake.push(chunks[n], n, 48_000, 0) == "queued"
    sound, filled_ms = intake.take(5)
    assert filled_ms == 0
    assert np.array_equal(sound, Resampler(48_000).push(whole))
    _, filled_ms = intake.take(1)
    assert filled_ms == pytest.approx(200, abs=1)


def test_another_rate_or_length_is_refused_and_nothing_taken() -> None:
    intake = AudioIntake(200)
    push(intake, 0)
    for samples, seq, rate in ((CHUNK, 1, 8_000), (CHUNK - 1, 1, 16_000), (0, 1, 16_000)):
        with pytest.raises(InvalidArgument):
            intake.push(np.zeros(samples, np.float32), seq, rate, 0)
    assert push(intake, 1) == "queued"
    fresh = AudioIntake(200)
    with pytest.raises(InvalidArgument):
        fresh.push(np.zeros(5, np.float32), None, 3, 0)
    assert push(fresh, 0, rate=8_000) == "queued"


def test_a_first_chunk_that_is_too_early_fixes_nothing() -> None:
    intake = AudioIntake(200)
    assert intake.push(piece(99, 480), 99, 48_000, 0) == "early"
    assert [push(intake, n) for n in range(4)] == ["queued"] * 4
    assert levels(intake.take(1)[0]) == [1, 2, 3, 4]


def test_the_mailbox_is_bounded_and_knows_its_ops() -> None:
    mailbox = Mailbox()
    assert mailbox.push_ids("text", [1] * MAX_WAITING_IDS, "a") == "queued"
    assert mailbox.push_ids("text", [1], "b") == "full"
    assert mailbox.push_ids("text", [1], "a") == "repeated"
    assert mailbox.push_ids("result", [2], "c") == "queued"
    given = TurnInput(1, None)
    mailbox.take(given)
    assert (len(given.text), given.result) == (MAX_WAITING_IDS, [2])
    assert mailbox.push_ids("text", [1], "b") == "queued"  # what was refused may come again
    assert not mailbox.is_new("b")
    assert mailbox.is_new(None)
    assert mailbox.is_new(None)


@given(st.data())
def test_whatever_arrives_time_and_sound_add_up(data: st.DataObject) -> None:
    """Lost, late, twice, in any order: each micro-turn has its length, each chunk is heard once,
    in its place or not at all."""
    intake = AudioIntake(200)
    arrivals: list[tuple[float, int]] = []
    for n in range(48):
        if data.draw(st.integers(0, 9)) == 0:
            continue
        arrivals.append((n * 50 + data.draw(st.integers(0, 180)), n))
        if data.draw(st.integers(0, 9)) == 0:
            arrivals.append((n * 50 + data.draw(st.integers(0, 400)), n))
    arrivals.sort()
    heard: list[int] = []
    queued: set[int] = set()
    filled_ms = 0.0
    for turn in range(12):
        while arrivals and arrivals[0][0] <= (turn + 1) * 200 + 100:
            at_ms, n = arrivals.pop(0)
            if push(intake, n, int(at_ms * 1000)) == "queued":
                assert n not in queued
                queued.add(n)
        sound, ms = intake.take(1)
        assert len(sound) == 3200
        filled_ms += ms
        heard += levels(sound)
    told = [level - 1 for level in heard if level]
    assert told == sorted(set(told))
    assert set(told) <= queued
    assert sum(level == 0 for level in heard) * 50 == filled_ms
