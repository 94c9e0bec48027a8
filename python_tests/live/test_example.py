"""The example of docs/LIVE.md runs as it is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu


def test_the_live_example(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "docs" / "examples" / "live.py"
    trace = tmp_path / "trace.json"
    command = [sys.executable, str(script), "--seconds", "2", "--trace", str(trace)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Interrupted(epoch=1)" in done.stdout
    assert "'refused_repeated': " in done.stdout
    assert json.loads(trace.read_text())["traceEvents"]
