"""Programs that end, or whose main thread does, while a live engine is at work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
