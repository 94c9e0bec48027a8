"""The comparison of prompts in `gpu-check`: it holds on the host run of the CUDA kernels."""

from __future__ import annotations

import pytest

from duplex_engine.evaluation import gpu_prompts

pytestmark = pytest.mark.cpu


def test_a_prompt_in_pieces_leaves_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt, as many rows are slow here."""
    monkeypatch.setattr(gpu_prompts, "N_ROWS", gpu_prompts.N_ROWS[:1])
    [check] = gpu_prompts.prompt_checks("cuda_host")
    assert check.passed
    assert check.name == "bfloat16: a prompt of 100 rows, in pieces"
