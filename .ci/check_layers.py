"""Checks that a C++ layer can include the headers of the layers below it and no others.

CMake gives each layer include roots for exactly those headers. This script asks the compiler, with
each layer's own command from compile_commands.json, which headers of the tree it would find, and
compares the answer with the table below. It also forbids the one way round the roots, an include
relative to the including file. Usage: check_layers.py <build folder>, from the repository root.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

SOURCE_ROOT = Path("csrc")
# A library of its own, with include paths of its own: "device/x.h" is the GPU's here and the host's
# twin under SIMT, which is what the kernels' tests rest on.
CUDA, SIMT = Path("csrc/backend/cuda"), Path("csrc/tests/simt")
ON_A_GPU = Path("csrc/tests/gpu")
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
CUDA_SEES = {"host", "kernels", "device", "backend", "core"}
GENERATED = {"backend_list.inc"}

# folder of csrc/ -> the folders it may include from, besides itself
BELOW: dict[str, set[str]] = {
    "core": set(),
    "backend": {"core"},
    "backend/cpu": {"backend", "core"},
    "backend/loaded": {"backend", "core"},
    "parallel": {"backend", "core"},
    "sequence": {"backend", "core"},
    "encoders": {"sequence", "backend", "core"},
    "model": {"sequence", "backend", "core"},
    "ranks": {"model", "sequence", "parallel", "backend", "core"},
    "engine": {"encoders", "ranks", "model", "sequence", "parallel", "backend", "core"},
    "bindings": {"engine", "encoders", "ranks", "model", "sequence", "parallel", "backend", "core"},
}


def layer_commands(build: Path) -> dict[str, tuple[list[str], str]]:
    """For each layer: a compile command without source and output, and its working folder."""
    commands: dict[str, tuple[list[str], str]] = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        if not source.is_relative_to(SOURCE_ROOT.resolve()):
            continue
        layer = source.relative_to(SOURCE_ROOT.resolve()).parent.as_posix()
        words = shlex.split(entry["command"])
        commands[layer] = (words[: words.index("-o")], entry["directory"])
    return commands


def visible_headers(command: list[str], folder: str, headers: list[str]) -> set[str]:
    """Those of `headers` that an include in a file compiled by `command` would find."""
    probe = "".join(f'#if __has_include("{name}")\n@"{name}"\n#endif\n' for name in headers)
    result = subprocess.run(
        [*command, "-x", "c++", "-E", "-P", "-"],
        cwd=folder, input=probe, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(re.findall(r'@"([^"]+)"', result.stdout))


def visibility_problems(build: Path, headers: list[str]) -> list[str]:
    """The differences between what each layer can include and what BELOW allows."""
    problems = []
    commands = layer_commands(build)
    for layer, below in BELOW.items():
        if layer not in commands:
            problems.append(f"csrc/{layer}: no source of this layer in {build}")
            continue
        allowed = {name for name in headers if Path(name).parent.as_posix() in below | {layer}}
        visible = visible_headers(*commands[layer], headers)
        problems += [f"csrc/{layer}: can include {name}" for name in sorted(visible - allowed)]
        problems += [f"csrc/{layer}: cannot include {name}" for name in sorted(allowed - visible)]
    return problems


def spelling_problems() -> list[str]:
    """Quoted includes that are not written from csrc/."""
    problems = []
    for path in sorted(SOURCE_ROOT.rglob("*.*")):
        in_cuda = any(path.is_relative_to(folder) for folder in (CUDA, SIMT, ON_A_GPU))
        roots = [SOURCE_ROOT, CUDA, SIMT] if in_cuda else [SOURCE_ROOT]
        for name in INCLUDE.findall(path.read_text()):
            known = name in GENERATED or any((root / name).is_file() for root in roots)
            if ".." in name or not known:
                problems.append(f'{path}: "{name}" is not written as "layer/file.h"')
            elif path.is_relative_to(CUDA) and name.split("/")[0] not in CUDA_SEES:
                problems.append(f'{path}: "{name}" is of a layer above')
    return problems


def main() -> int:
    """Prints every problem; returns the exit status."""
    headers = [
        path.relative_to(SOURCE_ROOT).as_posix()
        for path in sorted(SOURCE_ROOT.rglob("*.h"))
        if path.relative_to(SOURCE_ROOT).parts[0] != "tests" and not path.is_relative_to(CUDA)
    ]
    folders = {Path(name).parent.as_posix() for name in headers}
    problems = [f"csrc/{name}: not in the table of layers" for name in sorted(folders - set(BELOW))]
    problems += spelling_problems() + visibility_problems(Path(sys.argv[1]), headers)
    print("\n".join([*problems, f"check_layers: {len(BELOW)} layers, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
