"""Calls that are refused half-way, or that Ctrl-C ends, leave a session that goes on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from random_models import TURN, load, sound, words, write

from duplex_engine import (
    CapacityError,
    Engine,
    Forgot,
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


@pytest.mark.slow
def test_what_interrupts_a_call_is_not_lost_while_it_waits(tmp_path: Path) -> None:
    with Engine.load(write(tmp_path, "dense"), memory="64MiB", max_positions=20_000) as engine:
        session, other = engine.open_session(), engine.open_session(endless=None)
        session.append(text=words(5))
        holding = threading.Thread(target=other.append, kwargs={"text": words(12_000)})
        holding.start()
        time.sleep(0.05)  # it has the lane
        said: list[int] = []
        waiting = threading.Thread(target=lambda: said.extend(session.decode(5000)))
        waiting.start()
        time.sleep(0.05)
        started = time.perf_counter()
        session.feed(audio=sound(TURN))
        other.feed(audio=sound(TURN))  # waits for no append either
        assert not holding.is_alive() or time.perf_counter() - started < 0.05
        session.interrupt()
        for thread in (holding, waiting):
            thread.join()
        assert 1 <= len(said) < 5000


def test_an_interrupted_turn_has_the_old_epoch(tmp_path: Path) -> None:
    with load(write(tmp_path, "dense", interaction=False), max_positions=4000) as engine:
        for trial in range(12):  # while sound is encoded, rows are appended, tokens are said
            with engine.open_session() as session:
                session.feed(audio=sound(16_000 * 20, seed=trial))
                stop = threading.Timer(0.001 * (1 + trial), session.interrupt)
                stop.start()
                turn = session.step(max_tokens=400)
                stop.join()
                assert turn.stopped != "interrupted" or turn.epoch == session.epoch - 1


def test_sessions_of_two_lanes_are_refused_before_they_are_fed(tmp_path: Path) -> None:
    with load(write(tmp_path, "dense")) as engine:
        pair = [engine.open_session(background=background) for background in (False, True)]
        with pytest.raises(InvalidArgument, match="sessions of one lane"):
            engine.step_many([(session, {"audio": sound(TURN)}) for session in pair])
        for session in pair:
            assert session.step(sound(TURN)).input.merged_turns == 0


def test_sound_that_does_not_fit_an_endless_session_waits(tmp_path: Path) -> None:
    options = {"max_positions": 400, "endless": Window(64, 128)}
    with load(write(tmp_path, "dense")) as engine, engine.open_session(**options) as session:
        session.step(sound(TURN))
        session.feed(audio=sound(120 * TURN))
        turns = [session.step() for _ in range(8)]
        merged = [turn.input.merged_turns for turn in turns]
        assert 20 < merged[0] < 80
        assert sum(merged) + sum(turn.input.missing_ms == 0 for turn in turns) == 120
    with load(write(tmp_path / "plain", "dense", interaction=False)) as engine:
        session = engine.open_session(**options)
        session.feed(audio=sound(500 * 800))
        assert [session.step(max_tokens=1).input.rows for _ in range(2)] == [400, 101]


def test_what_a_call_between_turns_forgot_is_told(tmp_path: Path) -> None:
    options = {"max_positions": 400, "endless": Window(64, 128)}
    with load(write(tmp_path, "dense")) as engine, engine.open_session(**options) as session:
        for seed in range(4):
            session.append(text=words(150, seed))
        (hole,) = session.forgotten
        session.snapshot(tmp_path / "before")
        (told,) = session.step(sound(TURN)).events
        assert told == Forgot(*hole)
        assert session.step(sound(TURN)).events == ()
        assert engine.restore(tmp_path / "before").step(sound(TURN)).events == (told,)


DAEMON = """
import threading, time
from duplex_engine import Engine
session = Engine.load("reference", threads=1).open_session()
def go():
    while True:
        session.append(text=[5] * 100)
threading.Thread(target=go, daemon=True).start()
time.sleep(0.1)
"""


def test_a_program_ends_while_a_daemon_thread_is_inside_a_call() -> None:
    done = subprocess.run([sys.executable, "-c", DAEMON], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
