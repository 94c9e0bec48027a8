"""Programs that end or are killed, or whose main thread ends, while a live engine is at work."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from live_scene import Scene

from duplex_engine import Engine

BEGIN = """
import sys, threading, time
import numpy as np
from duplex_engine import Engine
from duplex_engine.live import CostModel, LiveEngine
engine = Engine.load("reference", threads=1)
live = LiveEngine(engine, lease_s=0.2, folder=sys.argv[1], cost=CostModel(learn=False)).start()
session = live.open()
"""
# A step of 2,000 rows is at work when Python's end begins, which takes its time.
ENDS_IN_A_STEP = """
class Slow:
    def __del__(self, sleep=time.sleep): sleep(0.5)
slow = Slow()
session.push_text([5] * 2000)
session.push_audio(np.zeros(3200, np.float32))
time.sleep(0.02)
"""
GOES_ON_IN_A_THREAD = """
other = live.open(lease_s=60)
def serve():
    time.sleep(0.1)
    live.background(other, (None for _ in range(3)))
    while session.ended is None:
        time.sleep(0.01)
    restored = live.resume(session.token)
    print(session.ended, session.error, live.error, other.ended, restored.ended)
    live.close()
threading.Thread(target=serve).start()
"""


@pytest.mark.parametrize(
    ("program", "told"),
    [(ENDS_IN_A_STEP, ""), (GOES_ON_IN_A_THREAD, "lease None None None None\n")],
    ids=["in a step", "in a thread"],
)
def test_a_program_without_an_end_of_its_own(program: str, told: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, told, "")


KILLED = """
import os, signal, sys
from duplex_engine import Engine
from duplex_engine.live import CostModel, LiveEngine
Engine.restore = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with Engine.load("reference", threads=1) as engine:
    LiveEngine(engine, folder=sys.argv[1], cost=CostModel(learn=False)).resume(sys.argv[2])
"""


def test_a_process_that_is_killed_while_it_resumes(engine: Engine, tmp_path: Path) -> None:
    scene = Scene(engine, lease_s=2, folder=tmp_path)
    token = scene.live.open().detach()
    scene.run(2100)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), token], timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    scene.live.resume(token).close()
    assert list(tmp_path.iterdir()) == []
