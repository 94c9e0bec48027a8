"""Damages the CUDA kernels in one place at a time and checks that a test notices.

Mutants: every barrier, every wait for copies and every commit of them is taken out, every wait is
made too short, and operands of the matrix product and of the 16-byte load change places; what
orders the streams of two lanes is taken out too. Those of a kernel and of the lanes are built as
C++ and judged by the host run's tests ("cuda: ..." and [lanes] of duplex_tests), those of
device/platform.cuh are compiled to PTX and judged by the interpreter's cases (python_tests/ptx).

Usage: mutate_cuda.py <build folder> [file, or file:line...], from the repository root.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from host_kernels import CUDA, TESTS, HostBuild

sys.path.insert(0, "python_tests")

from ptx.cases import CASES, kernels_of, run_in_both_orders
from ptx.compile import compile_all
from ptx.machine import Stuck
from ptx.memory import MemoryFault

WRAPPERS = "device/platform.cuh"
LANES = ("host/lanes.h", "host/lanes.cpp", "host/shared_pages.cpp")
TIMEOUT_S = 120

# (what to find, what takes its place, what that is)
IN_KERNELS = (
    (r"\bsync_block\(\);", ";", "no barrier"),
    (r"\bcommit_copies\(\);", ";", "no commit"),
    (r"\bwait_copies<\d+>\(\);", ";", "no wait"),
    (r"\bwait_copies<1>\(\);", "wait_copies<2>();", "a wait for one group less"),
    (r"(multiply_add\(\S+ \S+) (\S+), (\S+)\);", r"\1 \3, \2);", "halves of b change places"),
    (r"(multiply_add\(\S+) w\[0\]", r"\1 w[1]", "the other half of a"),
    (r"(multiply_add\(\S+) w\[1\]", r"\1 w[0]", "the other half of a"),
)
IN_LANES = (
    (
        r"(for \(Runtime\* \w+ : lanes_\)) (\S+(wait_for|synchronize)\(.*\);)",
        r"\1 if (false) \2",
        "no order",
    ),
    (r"(lanes_|stream_)->(synchronize|put_behind_all)\(.*\);", ";", "no order"),
    (r"\bwait\(\);", ";", "no wait"),
    (r"\n  unmap\(address\);", "\n  ;", "mapped over what was there"),
    (r"[+]{2}n_passes_;", ";", "no gate"),
    (r"ended_\.wait\(.*\);", ";", "no gate"),
)
IN_WRAPPERS = (
    (r"__syncthreads\(\);", ";", "no barrier"),
    (r'asm volatile\("cp\.async\.commit_group;" ::: "memory"\);', ";", "no commit"),
    (r'asm volatile\("cp\.async\.wait_group %0;" ::"n"\(kPending\) : "memory"\);', ";", "no wait"),
    (r'"n"\(kPending\)', '"n"(kPending + 1)', "a wait for one group less"),
    (r"\{%0, %1, %2, %3\}, \[%4\]", "{%1, %0, %2, %3}, [%4]", "words 0, 1 of a load"),
    (r"\{%0, %1, %2, %3\}, \[%4\]", "{%0, %2, %1, %3}, [%4]", "words 1, 2 of a load"),
    (r"\{%0, %1, %2, %3\}, \[%4\]", "{%0, %1, %3, %2}, [%4]", "words 2, 3 of a load"),
    (r"\{%4, %5, %6, %7\}", "{%5, %4, %6, %7}", "words 0, 1 of a"),
    (r"\{%4, %5, %6, %7\}", "{%4, %6, %5, %7}", "words 1, 2 of a"),
    (r"\{%4, %5, %6, %7\}", "{%4, %5, %7, %6}", "words 2, 3 of a"),
    (r"\{%8, %9\}", "{%9, %8}", "halves of b"),
    (r'\n      "\{%0, %1, %2, %3\}', '\n      "{%1, %0, %2, %3}', "results 0, 1"),
    (r'\n      "\{%0, %1, %2, %3\}', '\n      "{%0, %2, %1, %3}', "results 1, 2"),
    (r'\n      "\{%0, %1, %2, %3\}', '\n      "{%0, %1, %3, %2}', "results 2, 3"),
    (r"\{%0, %1, %2, %3\};", "{%1, %0, %2, %3};", "sums 0, 1"),
    (r"\{%0, %1, %2, %3\};", "{%0, %2, %1, %3};", "sums 1, 2"),
    (r"\{%0, %1, %2, %3\};", "{%0, %1, %3, %2};", "sums 2, 3"),
    (r"static_cast<unsigned>\(delta\)", "static_cast<unsigned>(delta + 1)", "another lane"),
    (r"__shfl_xor_sync", "__shfl_down_sync", "another shuffle"),
)

# Mutants that neither run can tell apart: (file, the line before, what) -> why.
EQUIVALENT = {
    ("kernels/moe.cu", "args.selection_bias[e];", "no barrier"): (
        "each lane goes on to read its own scores alone, and lane 0 overwrites others' after "
        "shuffles, which order memory in both runs; on the machine they need not"
    ),
}


@dataclass(frozen=True)
class Mutant:
    """One damaged file."""

    path: str  # below csrc/backend/cuda
    line: int
    what: str
    text: str

    def __str__(self) -> str:
        return f"{CUDA}/{self.path}:{self.line}: {self.what}"


def mutants_of(path: str) -> list[Mutant]:
    """All mutants of one file; code only, not comments."""
    text = (CUDA / path).read_text()
    found = []
    table = IN_WRAPPERS if path == WRAPPERS else IN_LANES if path in LANES else IN_KERNELS
    for pattern, replacement, what in table:
        matches = list(re.finditer(pattern, text))
        if path == WRAPPERS and not matches:
            raise SystemExit(f"{path}: expected {pattern}, found none")
        for match in matches:
            damaged = text[: match.start()] + match.expand(replacement) + text[match.end() :]
            line = text.count("\n", 0, match.end()) + 1
            found.append(Mutant(path, line, what, damaged))
    return found


def stems_of(host: HostBuild, path: str) -> list[str]:
    """The files to compile anew for a damaged file."""
    if path.endswith((".cu", ".cpp")):
        return [Path(path).stem]
    if path in LANES:
        return ["cuda_backend", "lanes", "shared_pages"]
    return ["attention"] if path == "kernels/attention.cuh" else host.stems()


def host_notices(host: HostBuild, path: str) -> bool:
    """Whether a test of the host run fails."""
    tests = "[lanes]" if path in LANES else TESTS
    command = [str(host.build(stems_of(host, path))), tests, "--abort"]
    try:
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def interpreter_notices(folder: Path) -> bool:
    """Whether a case of the interpreter fails."""
    kernels = kernels_of(compile_all(("90a",), folder)["90a"])
    for case in CASES:
        try:
            run_in_both_orders(kernels, case)
        except (AssertionError, MemoryFault, Stuck):
            return True
    return False


def main() -> int:
    """Prints every mutant that no test notices; returns the exit status."""
    build, only = Path(sys.argv[1]), sys.argv[2:]
    folder = build / "mutants"
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("backend", "core"):
        shutil.copytree(Path("csrc") / part, folder / part)
    host = HostBuild(build, folder / "backend/cuda", folder)
    paths = [f"kernels/{path.name}" for path in sorted((CUDA / "kernels").glob("*.cu*"))]

    def is_noticed(path: str) -> bool:
        return interpreter_notices(folder) if path == WRAPPERS else host_notices(host, path)

    survivors, equivalent, n_mutants = [], set(), 0
    for path in [*paths, *LANES, WRAPPERS]:
        source, copy = CUDA / path, folder / "backend/cuda" / path
        lines = source.read_text().splitlines()
        name = Path(path).name
        mutants = [
            m for m in mutants_of(path) if not only or {name, f"{name}:{m.line}"} & set(only)
        ]
        if mutants and is_noticed(path):
            raise SystemExit(f"{path}: a test fails before anything is damaged")
        for mutant in mutants:
            n_mutants += 1
            key = (path, lines[mutant.line - 2].strip(), mutant.what)
            if key in EQUIVALENT:
                equivalent.add(key)
                continue
            copy.write_text(mutant.text)
            if is_noticed(path):
                print("noticed ", mutant, flush=True)
            else:
                survivors.append(mutant)
                print("SURVIVED", mutant, flush=True)
        shutil.copyfile(source, copy)
    if not only and equivalent != EQUIVALENT.keys():
        raise SystemExit(f"EQUIVALENT: is no mutant: {EQUIVALENT.keys() - equivalent}")
    print(
        f"mutate_cuda: {n_mutants} mutants, {len(equivalent)} equivalent, "
        f"{len(survivors)} unnoticed",
        *survivors,
        sep="\n",
    )
    return 1 if survivors or n_mutants == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
