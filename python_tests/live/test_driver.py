"""The driver on a made-up clock: when turns run, what they are given, who is not disturbed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from live_scene import TURN, Scene, drain, sound, tokens

from duplex_engine import CapacityError, Engine, InvalidArgument, SessionClosed
from duplex_engine.live import AudioFilled, CostModel, Entry, LiveEngine, OutputLost, Refused
from duplex_engine.live.outbox import MAX_WAITING
from duplex_engine.live.session import MAX_JOBS
from duplex_engine.models.random import write_random_checkpoint

pytestmark = pytest.mark.core


def test_a_live_stream_equals_the_same_stream_stepped(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        live = scene.talk(session, 8)
    with engine.open_session() as offline:
        stepped = [offline.step(sound(n)).token_ids for n in range(8)]
    assert tokens(live) == stepped
    assert any(len(ids) > 1 for ids in stepped)
    assert [out.turn.index for out in live] == list(range(8))
    assert all(out.late_us == 0 and out.events == () for out in live)
    assert scene.tokens_again(session.id) == stepped


def test_any_cut_of_the_sound_gives_the_same_output(engine: Engine) -> None:
    scene = Scene(engine)
    whole = np.concatenate([sound(n) for n in range(4)])
    rng = np.random.default_rng(1)
    with scene.live.open() as session:
        at = 0
        while at < len(whole):
            n = int(rng.integers(1, 900))
            session.push_audio(whole[at : at + n])
            at += n
            scene.run(min(n, len(whole) - at + n) / 16)
        out = drain(session)
    with engine.open_session() as offline:
        assert tokens(out)[:4] == [offline.step(sound(n)).token_ids for n in range(4)]


def test_a_turn_runs_as_soon_as_its_sound_is_whole(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        session.push_audio(sound(0)[: TURN - 1])
        scene.run(150)
        assert drain(session) == []
        session.push_audio(sound(0)[TURN - 1 :])
        scene.run(0)
        (out,) = drain(session)
        assert (out.turn.index, out.late_us) == (0, 0)
        # The next is due 200 ms after that, and 100 ms of patience later it is silence.
        scene.run(299)
        assert drain(session) == []
        scene.run(1)
        (out,) = drain(session)
        assert out.events == (AudioFilled(200.0),)
        assert out.late_us == 100_000


def test_long_chunks_and_bursts_get_no_silence_between_them(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        for n in range(4):
            session.push_audio(sound(n, 3 * TURN))
            scene.run(600)
        assert [out.turn.input.merged_turns for out in drain(session)] == [2] * 4
        session.push_audio(sound(9, 20 * TURN))  # four seconds at once
        scene.run(0)
        session.push_text([300])
        scene.run(1100)  # what is typed waits a second for more sound, and no longer
        assert scene.entries[session.id][-1].value["text"] == [300]
        assert scene.live.counters["filled_ms"] == 200


def test_sessions_due_together_run_in_one_pass(engine: Engine) -> None:
    scene = Scene(engine)
    sessions = [scene.live.open() for _ in range(3)]
    for n in range(4):
        for i, session in enumerate(sessions):
            session.push_audio(sound(10 * i + n))
        scene.run(200)
    assert scene.passes == [3, 3, 3, 3]
    for i, session in enumerate(sessions):
        with engine.open_session() as offline:
            expected = [offline.step(sound(10 * i + n)).token_ids for n in range(4)]
        assert tokens(drain(session)) == expected
        session.close()


def test_a_slow_machine_merges_turns_and_drops_none(engine: Engine) -> None:
    scene = Scene(engine, step_us=500_000)  # 2.5 times too slow
    with scene.live.open() as session:
        for n in range(10):
            session.push_audio(sound(n))
            scene.now_us += 200_000
            if n % 5 == 4:
                scene.live.poll()
        out = drain(session)
        assert sum(1 + o.turn.input.merged_turns for o in out) == out[-1].turn.index + 1 == 10
        assert [o.turn.input.merged_turns for o in out] == [4, 4]
        assert scene.live.counters["merged_turns"] == 8
        heard = [e.value["audio"] for e in scene.entries[session.id]]
    assert np.array_equal(np.concatenate(heard), np.concatenate([sound(n) for n in range(10)]))
    assert tokens(out) == scene.tokens_again(session.id)


def test_all_kinds_of_input_and_op_ids(engine: Engine) -> None:
    scene = Scene(engine)
    picture = np.full((16, 16, 3), 90, np.uint8)
    with scene.live.open() as session:
        for _ in range(2):
            statuses = [
                session.push_text([300, 301], "a").status,
                session.push_result([302], "b").status,
                session.push_image(picture, "c").status,
                session.push_audio(sound(0), 0).status,
            ]
        assert statuses == ["repeated"] * 4
        scene.run(0)
        (out,) = drain(session)
        with engine.open_session() as offline:
            turn = offline.step(sound(0), picture, [300, 301], result=[302])
        assert out.turn.token_ids == turn.token_ids
        assert scene.live.counters["refused_repeated"] == 4
        for _ in range(5):
            last = session.push_image(picture)
        assert last.status == "full"
        assert session.push_text([300] * 3000).status == "full"
        scene.run(300)
        (out,) = drain(session)
        assert Refused("full", "image") in out.events
        scene.run(1000)  # one picture a turn
        assert [e.value["image"] is not None for e in scene.entries[session.id]] == [
            *[True] * 5,
            False,
            False,
        ]


def test_bad_input_is_the_caller_s_alone(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session, scene.live.open() as other:
        loud = sound(0)
        loud[5] = np.nan
        for push in (
            lambda: session.push_audio(loud),
            lambda: session.push_audio("sound"),
            lambda: session.push_audio(sound(0), seq=-1),
            lambda: session.push_audio(sound(0), seq=True),
            lambda: session.push_text([10**6]),
            lambda: session.push_result([[1]]),
            lambda: session.push_image(np.zeros((400, 400, 3), np.uint8)),
            lambda: session.push_image(np.zeros((4, 4), np.uint8)),
            lambda: session.playback_ack("x"),  # type: ignore[arg-type]
        ):
            with pytest.raises(InvalidArgument):
                push()
        assert session.push_audio(np.zeros(16_000 * 60 * 60, np.int16)).status == "too_fast"
        for n in range(3):
            other.push_audio(sound(n))
            session.push_audio(sound(n + 50))
            scene.run(200)
        assert tokens(drain(session)) == scene.tokens_again(session.id)
        with engine.open_session() as offline:
            expected = [offline.step(sound(n)).token_ids for n in range(3)]
        assert tokens(drain(other)) == expected


def test_a_session_that_is_full_ends_alone(engine: Engine) -> None:
    scene = Scene(engine)
    full, other = scene.live.open(max_positions=64), scene.live.open()
    for n in range(20):
        other.push_audio(sound(n))
        if full.ended is None:
            full.push_audio(sound(n))
        scene.run(200)
    assert full.ended == "capacity"
    assert isinstance(full.error, CapacityError)
    assert list(full)[-1].turn.index >= 2  # what came before can be read, then it ends
    with pytest.raises(SessionClosed):
        full.push_audio(sound(0))
    assert full.playback_ack(0) is False
    with engine.open_session() as offline:
        expected = [offline.step(sound(n)).token_ids for n in range(20)]
    assert tokens(drain(other)) == expected
    other.close()


def test_an_exception_in_a_callback_ends_that_session(engine: Engine) -> None:
    scene = Scene(engine)
    bad, other = scene.live.open(), scene.live.open()

    def fail(_: object) -> None:
        raise RuntimeError("the client's socket")

    thread = bad.on_turn(fail)
    heard: list[tuple[int, ...]] = []
    other_thread = other.on_turn(lambda out: heard.append(out.turn.token_ids))
    for n in range(3):
        for session in (bad, other):
            if session.ended is None:
                session.push_audio(sound(n))
        scene.run(200)
        thread.join(5)
    assert bad.ended == "callback"
    assert str(bad.error) == "the client's socket"
    other.close()
    other_thread.join(5)
    with engine.open_session() as offline:
        assert heard == [offline.step(sound(n)).token_ids for n in range(3)]


def test_an_error_of_the_pass_ends_its_sessions_and_no_more(engine: Engine) -> None:
    scene = Scene(engine)
    session = scene.live.open()
    good, scene.step_many = scene.step_many, lambda _: 1 / 0
    session.push_audio(sound(0))
    scene.run(0)
    assert (session.ended, type(session.error)) == ("error", ZeroDivisionError)
    scene.step_many = good
    with scene.live.open() as other:
        assert len(scene.talk(other, 2)) == 2


def test_nobody_reads(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session, scene.live.open() as other:
        for n in range(MAX_WAITING + 6):
            session.push_audio(sound(n))
            other.push_audio(sound(n))
            scene.run(200)
            drain(other)
        out = drain(session)
        assert len(out) == MAX_WAITING
        assert out[0].events == (OutputLost(6),)
        assert out[0].turn.index == 6
        assert scene.live.counters["output_lost"] == 6


def test_closing_in_the_middle_of_a_step(engine: Engine) -> None:
    scene = Scene(engine)
    session, other = scene.live.open(), scene.live.open()
    good = scene.step_many

    def close_then_step(requests: object) -> object:
        session.close()
        return good(requests)

    for s in (session, other):
        s.push_audio(sound(0))
    scene.step_many = close_then_step
    scene.run(0)
    assert drain(session) == []
    assert session.ended == "closed"
    assert len(drain(other)) == 1
    session.close()
    other.close()


def test_calls_at_a_boundary(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        scene.talk(session, 3)
        fork = session.at_boundary(lambda inner: inner.fork())
        failing = session.at_boundary(lambda _: 1 / 0)
        for _ in range(MAX_JOBS - 2):
            session.at_boundary(lambda inner: inner.length)
        with pytest.raises(CapacityError, match="calls that wait"):
            session.at_boundary(lambda inner: inner.length)
        scene.run(0)
        with pytest.raises(ZeroDivisionError):
            failing.result(0)
        with scene.live.adopt(fork.result(0)) as other:
            for s in (session, other):
                s.push_audio(sound(7))
            scene.run(0)
            assert tokens(drain(other)) == tokens(drain(session))
        waiting = session.at_boundary(lambda inner: inner.length)
    with pytest.raises(SessionClosed):
        waiting.result(0)


def test_a_session_that_would_break_the_pass_is_not_adopted(engine: Engine, tmp_path: Path) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        scene.talk(session, 1)
        future = session.at_boundary(
            lambda inner: (inner, inner.fork(background=True), inner.fork())
        )
        scene.run(0)
        inner, background, fork = future.result(0)
        write_random_checkpoint(tmp_path)
        with Engine.load(tmp_path, memory="32MiB", threads=1) as other:
            for wrong in (inner, background, other.open_session()):
                with pytest.raises(InvalidArgument, match="adopt"):
                    scene.live.adopt(wrong)
        with pytest.raises(InvalidArgument, match="adopt"):
            scene.live.open(background=True)
        background.close()
        with scene.live.adopt(fork):
            pass
        assert len(scene.talk(session, 2)) == 2


def test_a_journal_that_raises_is_told_no_more(engine: Engine) -> None:
    scene = Scene(engine)
    told: list[str] = []

    def fails(session_id: str, _: Entry) -> None:
        told.append(session_id)
        if len(told) == 3:
            raise OSError("disk full")

    live = LiveEngine(
        engine,
        clock=lambda: scene.now_us / 1e6,
        cost=CostModel(learn=False),
        journal=fails,
    )
    scene.live = live
    with live.open() as session, live.open() as other:
        for n in range(4):
            other.push_audio(sound(n))
            assert len(scene.talk(session, 1)) == 1
        assert len(drain(other)) == 4
        assert len(told) == 3
        assert (str(live.journal_error), live.counters["journal_failed"]) == ("disk full", 1)


def test_a_session_closed_at_a_boundary_ends_as_closed(engine: Engine) -> None:
    scene = Scene(engine)
    session = scene.live.open()
    session.at_boundary(lambda inner: inner.close())
    session.push_audio(sound(0))
    scene.run(0)
    assert session.ended == "closed"
    with scene.live.open() as other:
        assert len(scene.talk(other, 1)) == 1


def test_a_closed_engine_or_driver_ends_all(tmp_path: Path) -> None:
    with Engine.load(write_random_checkpoint(tmp_path), memory="32MiB", threads=1) as engine:
        scene = Scene(engine)
        session = scene.live.open()
        engine.close()
        session.push_audio(sound(0))
        scene.run(0)
        assert session.ended == "engine closed"
        scene.live.close()
        with pytest.raises(SessionClosed):
            scene.live.open()


def test_a_model_that_does_not_end_its_output_is_refused(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, interaction=False)
    with (
        Engine.load(tmp_path, memory="32MiB", threads=1) as engine,
        pytest.raises(InvalidArgument, match="interaction checkpoint"),
    ):
        LiveEngine(engine)


@pytest.mark.parametrize("options", [{"patience_ms": 0}, {"lease_s": -1}, {"lease_s": "x"}])
def test_bad_options(engine: Engine, options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        LiveEngine(engine, cost=CostModel(learn=False), **options)  # type: ignore[arg-type]
