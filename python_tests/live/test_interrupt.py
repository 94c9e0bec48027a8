"""Interruptions: epochs, what was heard, and a context that agrees with it."""

from __future__ import annotations

import numpy as np
import pytest
from live_scene import Scene, drain, sound, tokens

from duplex_engine import Engine
from duplex_engine.live import Entry, Interrupted, LiveTurn, NotRewound, Rewound

pytestmark = pytest.mark.core


def speaking(turns: list[LiveTurn]) -> list[int]:
    return [out.turn.index for out in turns if len(out.turn.token_ids) > 1]


def test_what_was_not_heard_is_taken_back_and_its_input_kept(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        turns = scene.talk(session, 10)
        spoke = speaking(turns)
        # Heard until just before a silent turn, behind which the model speaks again.
        heard = next(n - 1 for n in range(1, 9) if n not in spoke and max(spoke) > n)
        first = next(index for index in spoke if index > heard)
        assert first > heard + 1
        assert session.playback_ack(heard)
        assert session.interrupt() == 1
        session.push_audio(sound(90))
        scene.run(0)
        (out,) = drain(session)
        n_again = 10 - first
        assert out.events[:2] == (Interrupted(1), Rewound(first, n_again))
        assert out.epoch == out.turn.epoch == 1
        assert out.turn.index == 10
        assert out.turn.input.merged_turns == n_again
        # The same as a session in which those micro-turns were merged from the beginning.
        more = scene.talk(session, 5, seed=7)
        with engine.open_session() as offline:
            for n in range(first):
                offline.step(sound(n))
            for n in range(first, 10):
                offline.feed(sound(n))
            again = [offline.step(sound(n)).token_ids for n in (90, *range(7000, 7005))]
            assert again == tokens([out, *more])
            assert any(len(ids) > 1 for ids in again)
        assert tokens([*turns, out, *more]) == scene.tokens_again(session.id)


def test_without_acks_the_context_stays(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        turns = scene.talk(session, 6)
        session.interrupt()
        turns += scene.talk(session, 2, seed=1)
        assert turns[6].events == (Interrupted(1),)
        assert [entry.call for entry in scene.entries[session.id]] == ["step"] * 8


def test_output_of_older_epochs_is_not_delivered(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        for n in range(3):
            session.push_audio(sound(n))
            scene.run(200)
        good = scene.step_many

        def interrupt_then_step(requests: object) -> object:
            session.interrupt()
            return good(requests)

        scene.step_many = interrupt_then_step
        session.push_audio(sound(3))
        scene.run(0)
        scene.step_many = good
        assert drain(session) == []  # three that nobody read, and one that was at work
        assert scene.live.counters["stale_turns"] == 1
        session.push_audio(sound(4))
        scene.run(0)
        (out,) = drain(session)
        assert (out.epoch, out.turn.index) == (1, 4)
        assert len(scene.tokens_again(session.id)) == 5


def test_a_repeated_interrupt_raises_the_epoch_once(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        assert [session.interrupt("x"), session.interrupt("x"), session.interrupt("y")] == [1, 1, 2]
        assert session.epoch == 2


def test_late_and_absurd_acks_change_nothing(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        assert not session.playback_ack(0)  # nothing was put out yet
        turns = scene.talk(session, 6)
        assert session.playback_ack(3)
        for ack in (3, 2, -5, 6, 2**31 - 1):
            assert not session.playback_ack(ack)
        assert not session.playback_ack(4, epoch=1)
        assert session.playback_ack(4, epoch=0)
        session.interrupt()
        assert not session.playback_ack(5, epoch=0)  # too late to count
        turns += scene.talk(session, 2, seed=1)
        assert tokens(turns) == scene.tokens_again(session.id)
    assert not session.playback_ack(5)


def test_too_old_to_take_back_stays_and_says_so(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        turns = scene.talk(session, 4)
        first = speaking(turns)[0]
        assert session.playback_ack(0) or first == 0
        turns += scene.talk(session, 60, seed=1)
        session.interrupt()
        turns += scene.talk(session, 2, seed=2)
        events = turns[-2].events
        assert any(isinstance(event, NotRewound) for event in events)
        session.interrupt()  # it is settled: the next interruption does not try again
        turns += scene.talk(session, 2, seed=3)
        assert not any(isinstance(event, NotRewound) for event in turns[-2].events)
        assert scene.live.counters["not_rewound"] == 1
        assert tokens(turns) == scene.tokens_again(session.id)


def test_interrupting_again_and_again(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        turns = scene.talk(session, 3)
        session.playback_ack(0)
        for n in range(12):
            session.push_text([300 + n])
            turns += scene.talk(session, 1, seed=10 + n)
            session.interrupt()
        turns += scene.talk(session, 2, seed=40)
        assert tokens(turns) == scene.tokens_again(session.id)
        assert turns[-1].turn.index == 16
        assert scene.live.counters["rewound"] > 3


def test_what_a_caller_truncated_does_not_come_back(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        turns = scene.talk(session, 10)
        assert session.playback_ack(max(speaking(turns)[0], 6))
        length = session._heard._records[5].begin
        session.at_boundary(lambda inner: inner.truncate(length))
        scene.run(0)
        assert scene.entries[session.id][-1] == Entry("truncate", length)
        more: list[LiveTurn] = []
        while not any(index > 5 for index in speaking(more)):
            more += scene.talk(session, 1, seed=1 + len(more))
        assert more[0].turn.index == 5  # again, and not heard yet
        assert session.playback_ack(5)
        session.interrupt()
        more += scene.talk(session, 2, seed=90)
        heard = [e.value["audio"] for e in scene.entries[session.id] if e.call == "step"]
        gone = [sound(n) for n in range(6, 10)]
        again = np.concatenate(heard[10:])
        assert not any(
            np.array_equal(again[at : at + len(piece)], piece)
            for piece in gone
            for at in range(0, len(again), len(piece))
        )
        assert tokens([*turns, *more]) == scene.tokens_again(session.id)
