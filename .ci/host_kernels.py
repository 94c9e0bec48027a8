"""Builds the CUDA library's files as C++ once more, with other sources or flags, and their tests.

It takes the commands from a build folder that `make test` or CMake made, so nothing else is
compiled again.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

CUDA = Path("csrc/backend/cuda")
TESTS = "cuda:*"  # the names of the tests that judge kernels


class HostBuild:
    """A program of its own in `folder`, whose kernels come from `sources`."""

    def __init__(self, build: Path, sources: Path, folder: Path, flags: Sequence[str] = ()) -> None:
        self._build, self._sources, self._folder, self._flags = build, sources, folder, flags
        commands = subprocess.run(
            ["ninja", "-C", str(build), "-t", "commands", "duplex_tests"],
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        made = re.compile(
            r"-o (\S+/((?:generated/kernels|duplex_simt\.dir/csrc/backend/cuda/\w+)/(\w+)\.\S+\.o))"
        )
        found = [(made.search(command), command) for command in commands]
        self._compile = {match[3]: (command, match[1]) for match, command in found if match}
        self._kernels = [match[3] for match, _ in found if match and "generated" in match[2]]
        link = commands[-1].removeprefix(": && ").removesuffix(" && :")
        other = re.compile(r"CMakeFiles/duplex_tests\.dir/csrc/tests/\w+/")
        self._link = [word for word in shlex.split(link) if not other.match(word)]

    def stems(self) -> list[str]:
        """The names of all kernel files."""
        return self._kernels

    def build(self, stems: Sequence[str]) -> Path:
        """The program with these files, of kernels, host/ or device/, compiled anew."""
        link = [*self._link, *self._flags]
        running = []
        for stem in stems:
            command, target = self._compile[stem]
            words = [*shlex.split(command), *self._flags]
            words[words.index(f"-I{CUDA.resolve()}")] = f"-I{self._sources.resolve()}"
            source = Path(words[-1])
            if source.is_relative_to(CUDA.resolve()):
                own = source.relative_to(CUDA.resolve())
                words[-1] = str((self._sources / own).resolve())
            made = str((self._folder / f"{stem}.o").resolve())
            words[words.index("-o") + 1] = made
            link[link.index(target)] = made
            running.append(subprocess.Popen(words, cwd=self._build))
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit(f"{', '.join(stems)}: expected to compile")
        program = (self._folder / "tests").resolve()
        link[link.index("-o") + 1] = str(program)
        subprocess.run(link, cwd=self._build, check=True)
        return program
