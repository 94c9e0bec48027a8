"""Damages the CUDA kernels in one place at a time and checks that a test notices.

Mutants: every barrier, every wait for copies or for the grid before and every commit of copies is
taken out, every wait is made too short, and operands of the matrix product and of the 16-byte load
change places; between GPUs, fences, meetings and waits are taken out, and buffers mixed up, between
the streams of two lanes what orders them; of the set-up of a group what is undone where a step
fails. Those of a kernel, of the lanes and of the set-up are built as C++ and judged by the host
run's tests ("cuda: ...", [lanes] and [groups] of duplex_tests), those of the files of WRAPPERS are
compiled to PTX and judged by the interpreter's cases (python_tests/ptx).

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

LANES = ("host/cuda_backend.cpp", "host/lanes.h", "host/lanes.cpp", "host/shared_pages.cpp")
GROUPS = ("device/multicast.cpp",)
TIMEOUT_S = 120

# (what to find, what takes its place, what that is)
IN_KERNELS = (
    (r"\bsync_block\(\);", "{}", "no barrier"),
    (r"\bwait_for_previous_grid\(\);", "{}", "no wait for the grid before"),
    (r"\bcommit_copies\(\);", ";", "no commit"),
    (r"\bwait_copies<\d+>\(\);", ";", "no wait"),
    (r"\bwait_copies<0>\(\);", "wait_copies<1>();", "a wait for one group less"),
    (r"\bwait_copies<1>\(\);", "wait_copies<2>();", "a wait for one group less"),
    (r"\bwait_copies<2>\(\);", "wait_copies<3>();", "a wait for one group less"),
    (r"(multiply_add\w*\(\S+ \S+) (\S+), (\S+)\);", r"\1 \3, \2);", "halves of b change places"),
    (r"\bfence_system\(\);", ";", "no fence"),
    (r"\b(call\.meet|meet_all)\(\w*\);", ";", "no meeting"),
    (r"if \(missing < 0\) return;", "return;", "a wait that ends at once"),
    (r"- expected\) < 0", "- expected) < -kRanks", "signals not waited for"),
    (r"\bmulticast_count_release\(.*\);", ";", "no signal"),
    (r"(words\.v\[[012]\] != kEmpty) &&", "", "a word that may be missing"),
    (r"&&\s+words\.v\[3\] != kEmpty", "", "a word that may be missing"),
    (r"bits == kEmpty \? 0x7fffffffu : bits", "bits", "a number that means none"),
    (r"i < state\.used_words\[old\]", "i < 0", "nothing is emptied"),
    (r"i < state\.used_words\[old\]", "i + 1 < state.used_words[old]", "the last stays"),
    (r"\bend_call\(call, (.+), (false|has_met)\);", r"end_call(call, \1 - 1, \2);", "one stays"),
    (r"buffer == 0 \? kBuffers - 1 : buffer - 1", "(buffer + 1) % 3", "the next is emptied"),
    (r"state\.buffer \+ 1 == kBuffers", "state.buffer + 2 == kBuffers", "two buffers"),
    (r"state\.n_done = 0;", "", "blocks are counted on"),
    (r"\+= has_met \? 1 : 0;", "+= has_met ? 0 : 0;", "signals are not counted"),
    (r"(multiply_add\(\S+ (?:w|codes))\[0\]", r"\1[1]", "the other half of a"),
    (r"(multiply_add\(\S+ (?:w|codes))\[1\]", r"\1[0]", "the other half of a"),
    (r"permute_bytes\(lower, upper", "permute_bytes(upper, lower", "the other bytes"),
    (r"(multiply_add\(\S+) low", r"\1 high", "the other half of a"),
    (r"(multiply_add\(\S+) high", r"\1 low", "the other half of a"),
    (r"\+\+turn\.\w+\[i\]\.position;", "{}", "a sequence stays where it is"),
    (r"2 \* own > args", "2 * own >= args", "a loop for half of the sequences"),
    (r"&& !is_stop\(turn, token\)", "", "no stop"),
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
    (r"if \(is_background\) runtime_\.keep_close\(\);", ";", "no order"),
    (r"lanes_->give_way\(\);", "{}", "no gate"),
    (r"const Lanes::Pass pass\(\*lanes_\);", ";", "no gate"),
)
IN_GROUPS = (
    (r"\) driver_\.(unmap|free|unbind|release)\(.*\);", ") {}", "is not given back"),
    (r"\bundo_multicast\(\);", ";", "nothing is undone"),
    (r"for \(Mapping& peer : peers_\) undo\(peer\);", ";", "nothing is undone"),
    (r"driver\.close\(handle\);", ";", "a descriptor stays open"),
    (r"is_bound_ = true;", ";", "nobody knows that it is bound"),
    (r"mapping\.is_mapped = true;", ";", "nobody knows that it is mapped"),
    (r"if \(problem\.empty\(\)\) (problem = together)", r"\1", "on, whatever has failed"),
    (
        r"check<BackendUnavailable>\(problem\.empty\(\), problem\);",
        ";",
        "a failure that is not told",
    ),
    (r"driver_\.allow_access\(.*\);", ";", "no access"),
    (r"\bround_up_to\(options_\.bytes, granularity_\);", "options_.bytes;", "a size of any kind"),
    (r'ranks_\.all_gather\(""\);', ";", "no meeting"),
)
IN_PLATFORM = (
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
    (r"mul\.rn\.bf16x2 %0, %1, %2", "mul.rn.bf16x2 %0, %1, %1", "a square"),
    (r"\{%0, %1\}, \[%2\]", "{%1, %0}, [%2]", "words of a load of two"),
    (r"prmt\.b32 %0, %1, %2, %3", "prmt.b32 %0, %2, %1, %3", "bytes of the other"),
    (r"atomicAdd_block\(shared, value\)", "(*shared += value) - value", "sums that are split"),
)
IN_CHAIN = (
    (r'asm volatile\("griddepcontrol\.wait;" ::: "memory"\);', ";", "no wait for the grid before"),
    (r"\{%0, %1, %2, %3\}, \[%4\]", "{%1, %0, %2, %3}, [%4]", "words 0, 1 of a load"),
    (r"\{%0, %1, %2, %3\}, \[%4\]", "{%0, %2, %1, %3}, [%4]", "words 1, 2 of a load"),
    (r"\{%0, %1, %2, %3\}, \[%4\]", "{%0, %1, %3, %2}, [%4]", "words 2, 3 of a load"),
)
IN_LOOP = ((r"goes_on \? 1u : 0u", "goes_on ? 0u : 1u", "the other way round"),)
WORDS = r"\{%0, %1, %2, %3\}, \[%4\]"
IN_SYSTEM = (
    *[(WORDS, f"{{{swapped}}}, [%4]", "words of a load change places")
      for swapped in ("%1, %0, %2, %3", "%0, %2, %1, %3", "%0, %1, %3, %2")],
    *[(r"\[%0\], \{%1, %2, %3, %4\}", f"[%0], {{{swapped}}}", "words of a store change places")
      for swapped in ("%2, %1, %3, %4", "%1, %3, %2, %4", "%1, %2, %4, %3")],
    (r'"r"\(1\)', '"r"(2)', "counts by two"),
)  # fmt: skip
WRAPPERS = {
    "device/platform.cuh": IN_PLATFORM,
    "device/chain.cuh": IN_CHAIN,
    "device/system.cuh": IN_SYSTEM,
    "device/loop.cuh": IN_LOOP,
}

# Mutants that neither run can tell apart: (file, the line before, what) -> why.
EQUIVALENT: dict[tuple[str, str, str], str] = {}


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
    others = WRAPPERS | dict.fromkeys(LANES, IN_LANES) | dict.fromkeys(GROUPS, IN_GROUPS)
    table = others.get(path, IN_KERNELS)
    for pattern, replacement, what in table:
        matches = list(re.finditer(pattern, text))
        if path in WRAPPERS and not matches:
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
    # A header of some files alone.
    users = {
        "attention": ["attention", "attention_bf16", "attention_int8"],
        "attention_walk": ["attention", "attention_bf16", "attention_int8"],
        "attention_parts": ["attention_bf16", "attention_int8"],
        "attention_bias": ["attention_bf16", "attention_int8"],
        "conv": ["append"],
        "kv_int8": ["append", "attention_int8"],
        "experts": ["linear", "linear_bf16", "linear_mxfp8", "linear_nvfp4", "linear_quantised"],
        "linear_bf16": ["linear_bf16", "linear_large", "linear_mxfp8", "linear_nvfp4"],
        "norm": ["append", "rows", "all_reduce"],
        "exchange": ["all_reduce", "root"],
        "exchange_launch": ["all_reduce", "root"],
        "words": ["all_reduce", "root"],
    }
    return users.get(Path(path).stem, host.stems())


def host_notices(host: HostBuild, path: str) -> bool:
    """Whether a test of the host run fails."""
    tests = "[lanes]" if path in LANES else "[groups]" if path in GROUPS else TESTS
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
    if not (build / "build.ninja").is_file():
        raise SystemExit(f"expected a build folder, found {build}\n\n{__doc__}")
    folder = build / "mutants"
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("backend", "core"):
        shutil.copytree(Path("csrc") / part, folder / part)
    host = HostBuild(build, folder / "backend/cuda", folder)
    paths = [f"kernels/{path.name}" for path in sorted((CUDA / "kernels").glob("*.cu*"))]

    def is_noticed(path: str) -> bool:
        return interpreter_notices(folder) if path in WRAPPERS else host_notices(host, path)

    survivors, equivalent, n_mutants = [], set(), 0
    for path in [*paths, *LANES, *GROUPS, *WRAPPERS]:
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
