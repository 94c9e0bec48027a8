"""A fork of the process may not use its parent's engine, and cannot harm its streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from devices import CUDA
from random_models import TURN, load, sound, words, write

from duplex_engine import DuplexError, Engine, InvalidArgument, Session, _core

pytestmark = pytest.mark.core


def begin(session: Session) -> None:
    session.append(text=words(70))
    session.step(sound(TURN))


def go_on(session: Session) -> bytes:
    session.step(sound(TURN, seed=1))
    return session.append(text=words(9, seed=1), logits="all").tobytes()


def in_a_fork(calls: list[Callable[[], object]]) -> list[str]:
    """What the calls raise in a fork of this process, one after the other."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        errors: list[str] = []
        try:
            for call in calls:
                try:
                    call()
                except DuplexError as error:
                    errors.append(str(error))
            os.write(writer, json.dumps(errors).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return list(json.loads(said))


def test_a_fork_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path, "dense")
    with load(folder) as engine:
        with engine.open_session() as twin:
            begin(twin)
            expected = go_on(twin)
        session, other = engine.open_session(), engine.open_session()
        begin(session)
        begin(other)
        background = session.fork(background=True)
        session.snapshot(tmp_path / "session")
        calls: list[Callable[[], object]] = [
            lambda: session.step(sound(TURN, seed=2)),
            lambda: session.append(text=words(3)),
            lambda: session.feed(text=words(3)),
            lambda: session.truncate(70),
            lambda: session.fork(),
            lambda: background.fork(),
            lambda: engine.step_many([(session, {"audio": sound(TURN)})]),
            lambda: engine.step_many([]),
            lambda: engine._core.embed("text", [9]),
            lambda: engine.open_session(),
            lambda: engine.restore(tmp_path / "session"),
        ]
        errors = in_a_fork(calls)
        assert len(errors) == len(calls)
        assert all("load an engine after the fork" in error for error in errors)
        assert in_a_fork([session.close, background.close, other.close, engine.close]) == []
        assert go_on(session) == go_on(other) == expected


FORK_IN_A_STEP = """
import os, signal, sys, threading, time
from duplex_engine import Engine, InvalidArgument

engine = Engine.load(sys.argv[1], threads=2, memory="32MiB", max_positions=2000)
session, other = engine.open_session(), engine.open_session()
for s in (session, other):
    s.append(text=[9] * 20)
background = session.fork(background=True)

def work():
    while True:
        session.step(text=[9, 10], max_tokens=4)
        session.truncate(20)

threading.Thread(target=work, daemon=True).start()
for _ in range(8):
    time.sleep(0.005)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        for call in (lambda: session.length, lambda: other.memory, lambda: other.marks,
                     lambda: engine.stats, lambda: Engine.load(sys.argv[1], beside=engine)):
            try:
                call()
                os._exit(1)
            except InvalidArgument:
                pass
        threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        other.close()
        engine.close()
        del session, other, background, engine
        sys.exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, status
print("held")
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.cpu
def test_a_fork_in_the_middle_of_a_step_ends_when_it_likes(tmp_path: Path) -> None:
    folder = write(tmp_path, "dense")
    command = [sys.executable, "-c", FORK_IN_A_STEP, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("held\n", 0), done.stderr


@pytest.mark.cpu
def test_a_fork_loads_an_engine_of_its_own(tmp_path: Path) -> None:
    folder = write(tmp_path, "dense")
    with load(folder) as engine, engine.open_session() as session:
        begin(session)

        def use() -> None:
            own: Engine = load(folder)
            with own.open_session() as stream:
                begin(stream)
                raise InvalidArgument(go_on(stream).hex())

        (found,) = in_a_fork([use])
        assert bytes.fromhex(found) == go_on(session)


@pytest.mark.skipif(CUDA not in _core.backend_names(), reason="only a build with tests has it")
def test_cuda_is_of_no_use_in_a_fork_of_who_used_it(tmp_path: Path) -> None:
    folder = write(tmp_path, "dense")
    load(folder, device=CUDA).close()
    (error,) = in_a_fork([lambda: load(folder, device=CUDA)])
    assert "expected a process of its own, found a fork of one that has used CUDA" in error
    load(folder, device=CUDA).close()
