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


@pytest.mark.parametrize("weights", gpu_check.CODED)
def test_codes_have_the_bits_of_their_values(
    monkeypatch: pytest.MonkeyPatch, weights: gpu_check.Coded
) -> None:
    checks = list(gpu_check.coded_checks("cuda_host", weights, N_TURNS))
    assert [check.passed for check in checks] == [True, True]
    assert all(check.name.startswith(f"{weights} weights") for check in checks)
    write = gpu_check.write_random_checkpoint

    def inexact(*args: Any, **options: Any) -> Path:
        return write(*args, **options | {"exact_in": None})

    monkeypatch.setattr(gpu_check, "write_random_checkpoint", inexact)
    checks = list(gpu_check.coded_checks("cuda_host", weights, N_TURNS))
    assert not any(check.passed for check in checks)


def test_every_format_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = gpu_check.Shape("smallest", (20,), gpu_check.TIMED_FORMATS, "512MiB")
    monkeypatch.setitem(gpu_check.SHAPES, "smallest", shape)
    monkeypatch.setattr(gpu_check, "WARM_UP", 1)
    monkeypatch.setattr(gpu_check, "PREFILL", 20)
    monkeypatch.setattr(gpu_check, "N_SESSIONS", (1, 2))
    timed = list(gpu_check.timings("cuda_host", "smallest", n=1))
    held = {(timing.weights, timing.kv_dtype) for timing in timed}
    assert held == {
        ("bfloat16", "bfloat16"),
        ("bfloat16", "int8"),
        ("int8", "bfloat16"),
        ("int4", "bfloat16"),
        ("mxfp8", "bfloat16"),
        ("nvfp4", "bfloat16"),
    }
    assert len(timed) == len(held) * (4 + 2 + 1)
    assert all(0 < timing.median_ms <= timing.p99_ms for timing in timed)
    one = {timing.weights: timing.floor_bytes for timing in timed if timing.what == "decode 1"}
    assert one["nvfp4"] < one["mxfp8"] < one["bfloat16"]


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
