"""How many lines of the CUDA kernels the host run's tests reach.

The kernels are built as C++ with gcov's counters, in a program with the tests of them alone.
Usage: cover_cuda.py <build folder>, from the repository root; needs g++ and its gcov.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from host_kernels import CUDA, TESTS, HostBuild

LEAST = 0.95  # of the lines


def lines_of(folder: Path) -> dict[str, dict[int, int]]:
    """How often each line of each kernel file ran; headers together for all who include them."""
    found: dict[str, dict[int, int]] = {}
    for notes in sorted(folder.glob("*.gcno")):
        command = ["gcov", "--json-format", "--stdout", str(notes.resolve())]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
        for file in json.loads(result.stdout)["files"]:
            path = Path(file["file"])
            if (CUDA / "kernels").resolve() != path.resolve().parent:
                continue
            counts = found.setdefault(path.name, {})
            for line in file["lines"]:
                number = line["line_number"]
                counts[number] = max(counts.get(number, 0), line["count"])
    return found


def measure(build: Path) -> dict[str, dict[int, int]]:
    """Builds, runs the tests and reads the counters."""
    folder = build / "coverage"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    host = HostBuild(build, CUDA, folder, ("--coverage", "-O1"))
    program = host.build(host.stems())
    subprocess.run([str(program), TESTS], check=True, capture_output=True)
    return lines_of(folder)


def main() -> int:
    """Prints the share of every file and the lines that nothing reached."""
    found = measure(Path(sys.argv[1]))
    n_lines = n_reached = 0
    for name, counts in sorted(found.items()):
        missing = sorted(number for number, count in counts.items() if count == 0)
        n_lines += len(counts)
        n_reached += len(counts) - len(missing)
        print(f"{name:16} {len(counts) - len(missing):4} of {len(counts):4} lines; not {missing}")
    share = n_reached / n_lines
    print(f"cover_cuda: {n_reached} of {n_lines} lines, {share:.1%}; expected {LEAST:.0%} or more")
    return 0 if share >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
