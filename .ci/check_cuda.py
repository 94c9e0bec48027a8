"""Compiles every CUDA kernel for every GPU and checks what the compiler says about it.

A kernel must compile without warnings, spill nothing, have no stack frame, and use no more
registers than its budget. Needs nvcc and no GPU. Usage: check_cuda.py, from the repository root.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path

FOLDER = Path("csrc/backend/cuda")
GPUS = ("90a", "100a", "103a")
FLAGS = [
    "-std=c++20", "-O3", "--expt-relaxed-constexpr", "--fmad=false", "-Xptxas=-v",
    "-Werror=all-warnings", f"-I{FOLDER}", "-Icsrc", "-c",
]  # fmt: skip
BUDGET = 64  # registers of a kernel not named here
BUDGETS = {
    "attention_kernel": 96,  # the walk, and scores of a thread
    "expert_bf16_kernel": 72,
    "linear_bf16_kernel": 136,  # eight tiles of sums, and four steps of weights on their way
}
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
NAME = re.compile(r"(\w+_kernel)")


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel."""

    gpu: str
    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def demangled(symbol: str) -> str:
    """The C++ name of a symbol."""
    command = ["c++filt", symbol]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_for(gpu: str, source: Path) -> list[Usage]:
    """The kernels of one source; raises SystemExit with the compiler's words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc", *FLAGS, f"-gencode=arch=compute_{gpu},code=sm_{gpu}", str(source),
            "-o", f"{folder}/kernels.o",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{source} for sm_{gpu}: {result.stderr}")
    usages = []
    for part in re.split(r"(?=Compiling entry function)", result.stderr)[1:]:
        entry, frame, registers = ENTRY.search(part), FRAME.search(part), REGISTERS.search(part)
        assert entry is not None, part
        assert frame is not None, part
        assert registers is not None, part
        name = NAME.search(demangled(entry[1]))
        assert name is not None, part
        stack, stores, loads = map(int, frame.groups())
        usages.append(Usage(gpu, name[1], int(registers[1]), stack, stores + loads))
    return usages


def main() -> int:
    """Prints the registers of every kernel, then every problem; returns the exit status."""
    jobs = [(gpu, source) for source in sorted(FOLDER.glob("kernels/*.cu")) for gpu in GPUS]
    with ThreadPoolExecutor(cpu_count()) as pool:
        usages = [u for found in pool.map(lambda job: compile_for(*job), jobs) for u in found]
    most: dict[str, dict[str, int]] = {}
    problems = []
    for u in usages:
        of_kernel = most.setdefault(u.kernel, {})
        of_kernel[u.gpu] = max(of_kernel.get(u.gpu, 0), u.registers)
        budget = BUDGETS.get(u.kernel, BUDGET)
        if u.registers > budget or u.stack_bytes or u.spill_bytes:
            problems.append(
                f"{u.kernel} on sm_{u.gpu}: expected at most {budget} registers, no stack and no "
                f"spills, found {u.registers}, {u.stack_bytes} and {u.spill_bytes} bytes"
            )
    print(f"{'registers':24}", *(f"sm_{gpu:6}" for gpu in GPUS))
    for kernel, registers in sorted(most.items()):
        print(f"{kernel:24}", *(f"{registers[gpu]:6}   " for gpu in GPUS))
    problems += [f"{name}: has a budget, is no kernel" for name in sorted(BUDGETS.keys() - most)]
    print("\n".join([*problems, f"check_cuda: {len(most)} kernels, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
