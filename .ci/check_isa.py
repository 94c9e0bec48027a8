"""Checks that code for one instruction set cannot leak into the rest of the program.

An inline function or template that a kernel file emits is a weak symbol, and the linker keeps any
one copy of it: if that is the AVX-512 copy, a machine without AVX-512 crashes in unrelated code.
So every weak function in the object of kernels_<isa>.cpp must be of that file alone: its name, or
that of one of its template arguments, lies in namespace <isa>. Needs an optimised build.
Usage: check_isa.py <build folder>.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path


def weak_functions(object_file: Path) -> list[str]:
    """The names, demangled, of the weak functions that an object file defines."""
    command = ["nm", "--defined-only", "--demangle", "--format=posix", str(object_file)]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    matches = (re.match(r"(.*) W [0-9a-f]+ [0-9a-f]*$", line) for line in symbols.splitlines())
    return [match[1] for match in matches if match]


def main() -> int:
    """Prints every problem; returns the exit status."""
    build = Path(sys.argv[1])
    problems = []
    n_objects = 0
    for entry in json.loads((build / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        if "-mavx" not in entry["command"]:
            continue
        n_objects += 1
        namespace = source.stem.removeprefix("kernels_") + "::"
        for name in weak_functions(Path(entry["directory"]) / entry["output"]):
            if namespace not in name:
                problems.append(f"{source.name}: {name} is not of namespace {namespace}")
    print("\n".join([*problems, f"check_isa: {n_objects} objects, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
