"""A process that is killed loses what came after its last snapshot, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.cpu
def test_a_killed_process_goes_on_from_its_last_snapshot() -> None:
    command = [sys.executable, "-m", "bench.crash", "--kills", "5"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    counts = dict(line.rsplit(": ", 1) for line in answer.stdout.splitlines())
    assert counts["kills"] == "5"
    assert counts["turns that differ"] == counts["restarts from a wrong place"] == "0"
    assert int(counts["turns"]) > 5
