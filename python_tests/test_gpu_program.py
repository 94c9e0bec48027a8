"""The program that checks the sums over ranks on a GPU, where it was built (docs/GPU.md)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

NO_GPU = 77
BUILDS = Path(__file__).parents[1] / "build"


@pytest.mark.parametrize("program", sorted(BUILDS.glob("*/duplex_gpu_tests")), ids=str)
def test_without_a_gpu_it_checks_nothing_and_says_so(program: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == NO_GPU
    assert "nothing was checked: backend 'cuda': expected an NVIDIA GPU" in result.stderr
