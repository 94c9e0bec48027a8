"""Calls that are refused half-way, or that Ctrl-C ends, leave a session that goes on."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from random_models import TURN, load, sound, words, write

from duplex_engine import (
    CapacityError,
    Engine,
    InvalidArgument,
    Session,
    SessionBusy,
    SessionClosed,
    Window,
)
from duplex_engine.exclusive import Exclusive

pytestmark = pytest.mark.core


def test_a_thread_that_was_thrown_out_is_let_in_again() -> None:
    inside = Exclusive(lambda: None)
    inside.__enter__()  # and Ctrl-C ends the call before __exit__
    with inside, pytest.raises(SessionBusy):
        in_a_thread(inside.__enter__)
    in_a_thread(inside.__enter__)


def test_what_is_closed_is_not_entered() -> None:
    def refuse() -> None:
        raise SessionClosed("closed")

    inside = Exclusive(refuse)
    with pytest.raises(SessionClosed):
        in_a_thread(inside.__enter__)
    with pytest.raises(SessionClosed):
        inside.__enter__()


def in_a_thread(call: object) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()  # type: ignore[operator]
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def test_a_turn_that_ctrl_c_kept_from_being_read_can_be_rewound_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(write(tmp_path, "dense")) as engine, engine.open_session() as session:
        session.step(text=words(5))

        def ctrl_c(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Session, "_finish", ctrl_c)
            with pytest.raises(KeyboardInterrupt):
                session.step(text=words(5))
        newest = session.marks[-1]
        session.step(text=words(3))
        session.truncate(newest)
        assert session.length == newest
        session.step(text=words(3))


def test_sound_that_is_refused_leaves_the_rate_open(tmp_path: Path) -> None:
    with load(write(tmp_path, "dense")) as engine, engine.open_session() as session:
        long = np.zeros(48_000 * 1300, np.float32)
        with pytest.raises(CapacityError, match="samples wait already"):
            session.feed(audio=long, sample_rate=48_000)
        session.step(sound(TURN))


def test_sound_that_is_refused_makes_nothing_forgotten(tmp_path: Path) -> None:
    options = {"max_positions": 512, "endless": Window(0, 256)}
    with load(write(tmp_path, "dense")) as engine, engine.open_session(**options) as session:
        session.append(text=words(508))
        too_loud = np.full(48_000, 3.4e38, np.float32)
        too_loud[::2] *= -1  # finite, but not what the resampler makes of it
        with pytest.raises(InvalidArgument, match="finite"):
            session.append(audio=too_loud, sample_rate=48_000)
        assert (session.length, session.forgotten) == (508, [])


def test_a_request_that_is_none_leaves_the_others_untouched(tmp_path: Path) -> None:
    with load(write(tmp_path, "dense")) as engine, engine.open_session() as session:
        other = engine.open_session()
        for wrong in ((other, None), (other, {1: 2}), ("no session", {}), (None, {})):
            with pytest.raises(InvalidArgument, match="step_many: expected"):
                engine.step_many([(session, {"audio": sound(TURN)}), wrong])  # type: ignore[list-item]
        assert session.step(sound(TURN)).input.merged_turns == 0


@pytest.mark.parametrize("speculate", [0, 4])
def test_a_session_that_drafts_forks_wherever_one_that_does_not_may(
    tmp_path: Path, speculate: int
) -> None:
    folder = write(tmp_path, "local", mtp_layers=2)
    with (
        Engine.load(folder, threads=1, memory="32MiB", max_positions=2000, mtp_layers=2) as engine,
        engine.open_session(speculate=speculate) as session,
    ):
        session.append(text=words(700))
        with session.fork(300) as fork:
            assert fork.decode(5) == session.decode(5)
