"""PTX of the CUDA kernels, as nvcc emits it with the flags of the build."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

GPUS = ("90a", "100a", "103a")
SOURCES = Path(__file__).parents[2] / "csrc"
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "--fmad=false")


def compile_file(source: Path, gpu: str, sources: Path) -> str:
    """The PTX of one file of a tree of sources."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.ptx"
        command = [
            "nvcc", *FLAGS, f"-I{sources}/backend/cuda", f"-I{sources}", "-ptx", "-o", str(out),
            f"-gencode=arch=compute_{gpu},code=compute_{gpu}", str(source),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{source} for compute_{gpu}: {result.stderr}")
        return out.read_text()


def compile_all(gpus: tuple[str, ...] = GPUS, sources: Path = SOURCES) -> dict[str, dict[str, str]]:
    """The PTX of every file for every GPU: text by the file's stem."""
    files = sorted((sources / "backend/cuda/kernels").glob("*.cu"))
    jobs = [(source, gpu) for gpu in gpus for source in files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = list(pool.map(lambda job: compile_file(*job, sources), jobs))
    found: dict[str, dict[str, str]] = {gpu: {} for gpu in gpus}
    for (source, gpu), text in zip(jobs, texts, strict=True):
        found[gpu][source.stem] = text
    return found
