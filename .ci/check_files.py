"""Checks the budget and hygiene of every file that git tracks or would track.

Fails on files that are too long or too large, and on text that ties the tree to one machine.
The layer rules are in check_layers.py. Run from the repository root.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

MAX_LINES = {".h": 150, ".cuh": 150, ".cpp": 400, ".cu": 400, ".py": 500}
HARD_MAX_LINES = 600  # no exception goes beyond this
MAX_FILE_BYTES = 8_000_000
LARGE_FILE = Path("duplex_engine/models/reference/model.safetensors")  # the one that may be larger
MAX_TREE_BYTES = 60_000_000

# path -> why it may be longer than MAX_LINES
LONG_FILES: dict[str, str] = {
    "csrc/tests/sequence/fixtures.h": "shared by four test files, inline throughout",
    "csrc/tests/simt/fake_driver.h": "one class, call by call as the driver's, inline throughout",
    "csrc/tests/simt/rank_scene.h": "shared by the tests on the host and on a GPU, inline",
    "csrc/backend/op_args.h": "one struct for each operation, to be read side by side",
}

MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:tmp|work|root|home)/\w")


def tree_files() -> list[Path]:
    """Paths of the files in the work tree that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    paths = {Path(name.decode()) for name in output.split(b"\0") if name}
    return sorted(path for path in paths if path.is_file())


def length_problems(path: Path, n_lines: int) -> list[str]:
    """The complaints about one file's length."""
    limit = MAX_LINES.get(path.suffix)
    if limit is None:
        return []
    if str(path) in LONG_FILES:
        limit = HARD_MAX_LINES
    if n_lines <= limit:
        return []
    return [f"{path}: expected at most {limit} lines, found {n_lines}; split it by concept"]


def text_problems(path: Path, text: str) -> list[str]:
    """The complaints about one text file."""
    problems = length_problems(path, text.count("\n"))
    for number, line in enumerate(text.splitlines(), start=1):
        if MACHINE_PATH.search(line):
            problems.append(f"{path}:{number}: names a path of one machine: {line.strip()}")
    return problems


def main() -> int:
    """Prints every problem; returns the exit status."""
    problems: list[str] = []
    total_bytes = 0
    paths = tree_files()
    for path in paths:
        content = path.read_bytes()
        total_bytes += len(content)
        if len(content) > MAX_FILE_BYTES and path != LARGE_FILE:
            problems.append(
                f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {len(content)}"
            )
        if b"\0" not in content:
            problems += text_problems(path, content.decode())
    if total_bytes > MAX_TREE_BYTES:
        problems.append(f"tree: expected at most {MAX_TREE_BYTES} bytes, found {total_bytes}")
    stale = set(LONG_FILES) - {str(path) for path in paths}
    problems += [f"{name}: listed in LONG_FILES but not in the tree" for name in sorted(stale)]
    print("\n".join([*problems, f"check_files: {len(paths)} files, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
