"""Clients that go away: leases, detaching, coming back, and the bounds on both."""

from __future__ import annotations

import pytest
from live_scene import Scene, drain, sound, tokens

from duplex_engine import Engine, InvalidArgument, SessionBusy, SessionClosed

pytestmark = pytest.mark.core


def test_a_session_that_nobody_touches_is_detached_then_closed(engine: Engine) -> None:
    scene = Scene(engine, lease_s=2)
    session, other = scene.live.open(), scene.live.open(lease_s=100)
    scene.run(1900)
    assert session.attached
    scene.run(200)
    assert not session.attached
    n_turns = scene.live.counters["turns"]
    scene.run(1000)
    assert scene.live.counters["turns"] - n_turns in (4, 5)  # of the other alone
    scene.run(1000)
    assert session.ended == "lease"
    assert scene.live.counters["leases_ended"] == 1
    assert other.attached
    with pytest.raises(SessionClosed, match="lease"):
        session.push_audio(sound(0))
    other.close()


@pytest.mark.parametrize("sign", ["audio", "text", "ack", "interrupt", "touch"])
def test_any_sign_of_life_keeps_it(engine: Engine, sign: str) -> None:
    scene = Scene(engine, lease_s=2)
    with scene.live.open() as session:
        for _ in range(5):
            scene.run(1500)
            {
                "audio": lambda: session.push_audio(sound(0)),
                "text": lambda: session.push_text([300]),
                "ack": lambda: session.playback_ack(0),
                "interrupt": session.interrupt,
                "touch": session.touch,
            }[sign]()
        assert session.attached


def test_detach_and_resume_go_on_with_the_same_stream(engine: Engine) -> None:
    scene = Scene(engine)
    with scene.live.open() as session:
        for n in range(3):
            session.push_audio(sound(n), n)
            scene.run(200)
        with pytest.raises(SessionBusy, match="detach it first"):
            scene.live.resume(session.token)
        token = session.detach()
        assert session.detach() == token
        scene.run(5000)  # time stands still for it
        assert scene.live.resume(token) is session
        assert session.attached
        for n in range(3):  # numbered anew
            session.push_audio(sound(3 + n), n)
            scene.run(200)
        turns = drain(session)
        with engine.open_session() as offline:
            assert tokens(turns) == [offline.step(sound(n)).token_ids for n in range(6)]
        with pytest.raises(SessionClosed):
            scene.live.resume(token)  # a token is good once


def test_who_comes_back_has_a_whole_lease_and_a_whole_period(engine: Engine) -> None:
    scene = Scene(engine, lease_s=2)
    with scene.live.open() as session:
        token = session.detach()
        scene.run(1900)
        scene.live.resume(token)
        scene.run(290)  # a period, and the patience for its sound
        assert drain(session) == []
        scene.run(20)
        assert len(drain(session)) == 1  # what it missed is no backlog
        scene.run(1600)
        assert session.attached
        scene.run(200)
        assert not session.attached


@pytest.mark.parametrize("token", [[], "", "../../etc/passwd", "a" * 23, 5, None, "a/b" + "c" * 19])
def test_what_is_no_token_is_refused(engine: Engine, token: object) -> None:
    scene = Scene(engine)
    with pytest.raises(InvalidArgument, match="token"):
        scene.live.resume(token)  # type: ignore[arg-type]
    with pytest.raises(SessionClosed):
        scene.live.resume("A" * 22)


def test_a_detached_session_whose_lease_ends_is_gone(engine: Engine) -> None:
    scene = Scene(engine, lease_s=2)
    session = scene.live.open()
    token = session.detach()
    scene.run(1900)
    assert session.ended is None
    scene.run(200)
    assert session.ended == "lease"
    with pytest.raises(SessionClosed):
        scene.live.resume(token)


def test_a_session_that_was_closed_while_its_client_was_away_is_gone(engine: Engine) -> None:
    scene = Scene(engine)
    session = scene.live.open()
    token = session.detach()
    session.close()
    with pytest.raises(SessionClosed):
        scene.live.resume(token)
