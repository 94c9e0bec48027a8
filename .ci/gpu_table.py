"""Writes the table of kernels in docs/GPU.md from what was really compiled and run.

Usage, from the repository root: gpu_table.py <build folder> compiles, disassembles and runs every
kernel on the host and in the interpreter of its PTX; it refuses where anything fails. gpu_table.py
--check only compares the kernels' sources with those that the table was made from.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import check_cuda
import cover_cuda
from check_cuda import GPUS, KERNELS, Usage
from host_kernels import TESTS

PAGE = Path("docs/GPU.md")
SOURCES = [
    *sorted((check_cuda.FOLDER / "kernels").glob("*")),
    *sorted((check_cuda.FOLDER / "device").glob("*.cuh")),
]
BEGIN, END = "<!-- kernels: begin, written by `make cuda-table` from ", "<!-- kernels: end -->"

# The host run's tests of each kernel: beginnings of their names.
HOST_TESTS = {
    "all_reduce/all_gather_kernel": "cuda: all_reduce",
    "all_reduce/one_shot_kernel": "cuda: all_reduce",
    "all_reduce/reduce_scatter_kernel": "cuda: all_reduce",
    "all_reduce/switch_kernel": "cuda: all_reduce",
    "all_reduce/two_shot_kernel": "cuda: all_reduce",
    "append/conv_add_norm_kernel": "cuda: conv_add_norm",
    "append/kv_append_kernel": "cuda: kv_append",
    "attention/attention_kernel": "cuda: attention",
    "attention_bf16/attention_bf16_kernel": "cuda: attention",
    "attention_bf16/combine_kernel": "cuda: attention",
    "attention_bf16/combine_many_kernel": "cuda: attention",
    "attention_int8/attention_int8_kernel": "cuda: attention",
    "attention_int8/combine_kernel": "cuda: attention",
    "linear/expert_f32_kernel": "cuda: experts",
    "linear/linear_f32_kernel": "cuda: linear in float32",
    "linear_bf16/expert_bf16_kernel": "cuda: experts",
    "linear_bf16/linear_bf16_kernel": "cuda: linear in bfloat16",
    "linear_large/linear_large_kernel": "cuda: linear of many rows",
    "linear_mxfp8/expert_mxfp8_kernel": "cuda: experts in MXFP8",
    "linear_mxfp8/linear_mxfp8_kernel": "cuda: MXFP8",
    "linear_nvfp4/expert_nvfp4_kernel": "cuda: experts in NVFP4",
    "linear_nvfp4/linear_nvfp4_kernel": "cuda: NVFP4",
    "linear_quantised/expert_quantised_kernel": "cuda: experts of quantised",
    "linear_quantised/linear_quantised_kernel": "cuda: quantised linear",
    "linear_quantised/quantise_rows_kernel": "cuda: quantised linear",
    "moe/combine_kernel": "cuda: experts",
    "pack/pack_kernel": "cuda: pack places",
    "pack/pack_mxfp8_kernel": "cuda: MXFP8",
    "pack/pack_nvfp4_kernel": "cuda: NVFP4",
    "pack/pack_quantised_kernel": "cuda: pack quantises",
    "root/broadcast_kernel": "cuda: root",
    "root/gather_kernel": "cuda: root",
    "router/route_kernel": "cuda: the router",
    "router/router_kernel": "cuda: experts",
    "rows/embed_audio_kernel": "cuda: embed_audio",
    "rows/embed_text_kernel": "cuda: embed_text",
    "rows/fold_kernel": "cuda: fold",
    "rows/norm_kernel": "cuda: norm",
    "rows/silu_mul_kernel": "cuda: silu_mul",
    "sample/sample_kernel": "cuda: sample",
    "turn/gather_rows_kernel": "cuda: turn",
    "turn/take_tokens_kernel": "cuda: turn",
}


def digest() -> str:
    """Of the sources that the table speaks about."""
    content = b"".join(path.name.encode() + path.read_bytes() for path in SOURCES)
    return hashlib.sha256(content).hexdigest()[:12]


def host_assertions(build: Path) -> dict[str, int]:
    """Assertions of the host run that held, by test; refuses where one did not."""
    program = str(build / "duplex_tests")
    names = subprocess.run(
        [program, "--list-test-names-only", TESTS], capture_output=True, text=True
    )
    found = {}
    for name in filter(None, map(str.strip, names.stdout.splitlines())):
        command = [program, name.replace(",", r"\,"), "--reporter", "xml"]
        result = subprocess.run(command, capture_output=True, text=True)
        total = ET.fromstring(result.stdout).find("OverallResults")
        if result.returncode != 0 or total is None:
            raise SystemExit(f"{name}: expected to pass in {program}")
        found[name] = int(total.attrib["successes"])
    return found


def ptx_cases() -> dict[tuple[str, str], int]:
    """Cases that passed, by kernel and GPU; refuses where one did not."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # note: the other family of reports has no room for what a test says of itself.
        options = ["-q", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", "python_tests/ptx", *options]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"the interpreter's cases fail: {result.stdout}")
        found: dict[tuple[str, str], int] = defaultdict(int)
        for case in ET.parse(report).iter("testcase"):
            values = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
            for kernel in {name.split("<")[0] for name in values.get("kernels", "").split()}:
                found[kernel, values["gpu"]] += 1
    return found


def evidence(usages: list[Usage]) -> str:
    """How often the required instructions are there, at least, in any of the machine codes."""
    rule = KERNELS[usages[0].kernel]
    counts = {
        pattern: min(u.count(pattern.replace(".", r"\.")) for u in usages) for pattern in rule.must
    }
    return ", ".join(f"{n} `{pattern}`" for pattern, n in counts.items())


def rows(usages: list[Usage], host: dict[str, int], ptx: dict[tuple[str, str], int]) -> list[str]:
    """The lines of the table."""
    found = [
        "| kernel | registers sm_90a / 100a / 103a | instructions, at least | host run | PTX run |",
        "|---|---|---|---|---|",
    ]
    for kernel in sorted(KERNELS):
        own = [u for u in usages if u.kernel == kernel]
        registers = [max(u.registers for u in own if u.gpu == gpu) for gpu in GPUS]
        n_host = sum(n for name, n in host.items() if name.startswith(HOST_TESTS[kernel]))
        n_ptx = [ptx[kernel, gpu] for gpu in GPUS]
        if n_host == 0 or 0 in n_ptx:
            raise SystemExit(f"{kernel}: expected tests of it, found {n_host} and {n_ptx}")
        found.append(
            f"| {kernel.removesuffix('_kernel')} | {' / '.join(map(str, registers))} "
            f"| {evidence(own)} | {n_host} | {' / '.join(map(str, n_ptx))} |"
        )
    return found


def write(build: Path) -> None:
    """Compiles, runs and replaces the table."""
    usages = check_cuda.compile_all()
    problems = check_cuda.check(usages)
    if problems:
        raise SystemExit("\n".join(problems))
    table = rows(usages, host_assertions(build), ptx_cases())
    counts = [n for of_file in cover_cuda.measure(build).values() for n in of_file.values()]
    reached = sum(n > 0 for n in counts)
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    if END not in rest:
        raise SystemExit(f"{PAGE}: expected {BEGIN} and {END}")
    table.append(
        f"\nThe host run reaches {reached} of the {len(counts)} lines of the kernel files "
        f"({reached / len(counts):.1%})."
    )
    PAGE.write_text(
        f"{before}{BEGIN}{digest()} -->\n" + "\n".join(table) + f"\n{END}" + rest.split(END)[1]
    )


def main() -> int:
    """Returns the exit status."""
    if sys.argv[1] != "--check":
        write(Path(sys.argv[1]))
        return 0
    if f"{BEGIN}{digest()} -->" in PAGE.read_text():
        return 0
    print(f"{PAGE}: the kernels have changed since its table was made: run `make cuda-table`")
    return 1


if __name__ == "__main__":
    sys.exit(main())
