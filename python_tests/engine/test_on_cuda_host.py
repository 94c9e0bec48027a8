"""Some tests of this folder once more, on the CUDA backend, whose kernels run on the host: so that
a run of all of them on a GPU (docs/GPU.md) meets nothing that could have been seen without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from duplex_engine import _core

FOLDER = Path(__file__).parent
TESTS = [
    "test_exactness.py::test_the_last_logits_are_the_last_of_all",
    "test_forked_process.py",
    "test_lanes.py::test_one_step_takes_sessions_of_one_lane",
    "test_mtp_loading.py::test_drafting_layers_are_admitted_with_their_session",
    "test_resume.py::TestRoom",
    "test_resume.py::test_another_process_goes_on",
    "test_speculation.py::test_small_passes[2-0]",
]


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.skipif(
    "cuda_host" not in _core.backend_names(), reason="only a build with tests has it"
)
def test_a_few_tests_of_the_engine_on_another_device() -> None:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    answer = subprocess.run(
        [*command, *(str(FOLDER / test) for test in TESTS)],
        cwd=FOLDER.parents[1],
        env=os.environ | {"DUPLEX_TEST_DEVICE": "cuda_host"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    # What is about the CPU alone says so, and is left out.
    assert "test_a_fork_loads_an_engine_of_its_own SKIPPED" in answer.stdout
    n_passed = re.search(r" (\d+) passed, 2 skipped", answer.stdout)
    assert n_passed is not None, answer.stdout
    assert int(n_passed[1]) > len(TESTS)
