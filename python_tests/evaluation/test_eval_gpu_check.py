"""The comparisons of `gpu-check`: the CUDA kernels on the host pass, other arithmetic does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from duplex_engine import Engine
from duplex_engine.cli import app
from duplex_engine.evaluation import gpu_check
from duplex_engine.models import write_random_checkpoint

pytestmark = pytest.mark.cpu
N_TURNS = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("moe"), "moe")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "weights", "kv_dtype"), gpu_check.FORMATS)
def test_the_cuda_kernels_compute_what_the_cpu_computes(
    checkpoint: Path,
    dtype: gpu_check.Dtype,
    weights: gpu_check.Weights,
    kv_dtype: gpu_check.KvDtype,
) -> None:
    """Whole micro-turns, by the sources that nvcc compiles, run thread by thread on the host."""
    options = (dtype, N_TURNS, weights, kv_dtype)
    checks = list(gpu_check.checks("cuda_host", str(checkpoint), *options))
    assert [check for check in checks if not check.passed] == []
    assert any("memory of the CPU" in check.name for check in checks) == (dtype == "float32")


def test_a_device_that_computes_something_else_is_found_out(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    load = Engine.load

    def other(path: Any, *, device: str = "cpu", dtype: Any, **options: Any) -> Engine:
        return load(path, dtype=dtype if device == "cpu" else "bfloat16", **options)

    monkeypatch.setattr(Engine, "load", other)
    failed = [
        check.name
        for check in gpu_check.checks("other", str(checkpoint), "float32", N_TURNS)
        if not check.passed
    ]
    assert "float32: memory of the CPU" in failed


def test_the_command(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = ["gpu-check", str(checkpoint), "--device", "cpu", "--no-timings", "--turns", "10"]
    result = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "same  float32: memory of the CPU" in result.output
    assert '"passed": true' in out.read_text()
    assert CliRunner().invoke(app, ["gpu-check", "--shape", "cube"]).exit_code == 2
