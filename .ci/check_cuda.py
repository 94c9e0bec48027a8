"""Compiles every CUDA kernel for every GPU and checks the compiler's report and the machine code.

A kernel must compile without warnings, spill nothing, have no stack frame, keep to its registers,
and hold the instructions that its row of KERNELS names and none that it excludes. Needs nvcc, the
packages of SASS_TOOLS, and no GPU. Usage: check_cuda.py, from the repository root.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path("csrc/backend/cuda")
GPUS = ("90a", "100a", "103a")
FLAGS = [
    "-std=c++20", "-O3", "--expt-relaxed-constexpr", "--fmad=false", "-Xptxas=-v",
    "-Werror=all-warnings", f"-I{FOLDER}", "-Icsrc", "-c",
]  # fmt: skip
SASS_TOOLS = ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")  # the Makefile has the versions

BARRIER = "BAR.SYNC"
SUM, EXCHANGE = "SHFL.DOWN", "SHFL.BFLY"
DOUBLE = r"D(ADD|FMA|MUL|SETP|MNMX)"
TENSOR = "[HI]MMA"
LOCAL = r"(LDL|STL)"
WEIGHTS = "LDG.E.NA.LTC256B.128.CONSTANT"  # 16 bytes, streamed past the first-level cache
TAPE = "LDG.E.NA.LTC256B.128"  # the same for what another kernel may just have written
WEIGHTS_OF_8 = "LDG.E.NA.LTC256B.64.CONSTANT"
AHEAD = "UBLKPF.L2"  # to the second-level cache
COPY = "LDGSTS.E.BYPASS.128"
FOUR, STORE_FOUR = "LDG.E.128", "STG.E.128"  # columns of float32
# The wait for the grid before, and the word to the next. Kernels of Runtime::launch_early() have
# them, those of launch() do not; those between GPUs let none begin while they wait.
EARLY = ("ACQBULK", "PREEXIT")
NOT_EARLY = re.compile(r"(pack|sample)/|rows/(embed|fold)|turn/take")
BETWEEN_GPUS = re.compile(r"(all_reduce|root)/")
NORM = {BARRIER: 2, SUM: 4, COPY: 1}
# Between GPUs, 16 bytes at a time; a multicast store is a store to another address. Both ways of a
# load: the first look, and the loop. A wait that is too long ends in a trap.
EXCHANGE_OF_RANKS = {
    "STG.E.128.STRONG.SYS": 3,
    "LDG.E.128.STRONG.SYS": 2,
    "MEMBAR.ALL.SYS": 1,
    "ATOMG.E.ADD.STRONG.GPU": 1,
    AHEAD: 1,
    "BPT.TRAP": 1,
    BARRIER: 1,
}
SUM_OF_RANKS = EXCHANGE_OF_RANKS | {"LDG.E.128.STRONG.SYS": 4, "FADD": 4}
SUM_AND_NORM = SUM_OF_RANKS | {"STG.E.128.STRONG.SYS": 4, SUM: 4, BARRIER: 4, "FFMA": 4}


@dataclass(frozen=True)
class Rule:
    """What one kernel keeps to. Instructions are named by their beginning, with how often at least;
    local memory is excluded everywhere."""

    must: dict[str, int]
    registers: int = 64
    must_not: tuple[str, ...] = (DOUBLE, TENSOR)


QUANTISED = Rule(
    {"IMMA.16832.S8.S8": 16, WEIGHTS: 4, "LDG.E.128": 8, "STS.64": 16, BARRIER: 9, "FFMA": 32},
    registers=96,
    must_not=(DOUBLE, "HMMA"),
)

KERNELS = {
    "all_reduce/all_gather_kernel": Rule(EXCHANGE_OF_RANKS, registers=40),
    # The words of eight ranks at once, or of four rows; 480 threads have 136 registers each.
    "all_reduce/one_shot_kernel": Rule(SUM_AND_NORM, registers=136),
    "all_reduce/reduce_scatter_kernel": Rule(SUM_OF_RANKS, registers=72),
    # The switch adds.
    "all_reduce/switch_kernel": Rule(
        EXCHANGE_OF_RANKS
        | {"LDGMC.E.ADD.F32": 1, "REDG.E.ADD.STRONG.SYS": 1, SUM: 4, BARRIER: 6, "FFMA": 4},
        registers=112,
    ),
    "all_reduce/two_shot_kernel": Rule(SUM_AND_NORM, registers=120),
    # Four taps with their weights and the row itself, at once. 1024 threads have 64 registers each.
    "append/conv_add_norm_kernel": Rule(NORM | {BARRIER: 4, FOUR: 5, "LD.E.128": 4}),
    # Keys, values, queries, and codes of the first two; tau of the log scaling and the scale of a
    # value are computed in double.
    "append/kv_append_kernel": Rule(
        {BARRIER: 5, SUM: 8, EXCHANGE: 5, COPY: 1, FOUR: 5, "ST.E.U8": 4},
        registers=80,
        must_not=(TENSOR,),
    ),
    # The walk, and scores of a thread. Keys and values come by 16-byte copies, in four groups.
    "attention/attention_kernel": Rule(
        {
            COPY: 4,
            "LDGDEPBAR": 4,
            "DEPBAR.LE": 2,
            BARRIER: 5,
            EXCHANGE: 4,
            SUM: 4,
            "FFMA": 32,
        },
        registers=96,
        must_not=(TENSOR,),
    ),
    # Two thread blocks on a multiprocessor. Keys and values of a warp are 16 loads, for 8 products
    # each; a head in chunks loads in another place.
    "attention_bf16/attention_bf16_kernel": Rule(
        {"HMMA.16816.F32.BF16": 16, TAPE: 32, FOUR: 2, EXCHANGE: 5, SUM: 5, BARRIER: 4},
        registers=128,
        must_not=(re.escape(WEIGHTS),),
    ),
    "attention_bf16/combine_kernel": Rule(
        {"FFMA": 5, FOUR: 4, EXCHANGE: 5, BARRIER: 3}, registers=80
    ),
    "attention_bf16/combine_many_kernel": Rule({"FFMA": 5, FOUR: 1, EXCHANGE: 5}, registers=80),
    # As bfloat16, with half the loads and products. Maxima and sums of queries, maxima of blocks.
    "attention_int8/attention_int8_kernel": Rule(
        {
            "IMMA.16832.U8.S8": 4,
            "IMMA.16832.S8.U8": 4,
            TAPE: 16,
            FOUR: 2,
            EXCHANGE: 14,
            BARRIER: 4,
        },
        registers=128,
        must_not=("HMMA", re.escape(WEIGHTS)),
    ),
    # Sixteen blocks on their way: a sum and a maximum of each.
    "attention_int8/combine_kernel": Rule(
        {"FFMA": 16, "LDG.E": 32, SUM: 4, BARRIER: 2}, registers=96
    ),
    # Experts of every format look for their rows first: two barriers.
    "linear/expert_f32_kernel": Rule({"FFMA": 16, BARRIER: 2}),
    "linear/linear_f32_kernel": Rule({"FFMA": 16}),
    "linear_bf16/expert_bf16_kernel": Rule(
        {"HMMA.16816.F32.BF16": 24, WEIGHTS: 16, AHEAD: 1, "LDG.E.128": 12, BARRIER: 6},
        registers=80,
        must_not=(DOUBLE,),
    ),
    # Eight tiles of sums, and four steps of weights on their way.
    "linear_bf16/linear_bf16_kernel": Rule(
        {"HMMA.16816.F32.BF16": 8, WEIGHTS: 8, AHEAD: 1, "LDG.E.128": 4, BARRIER: 2},
        registers=144,
        must_not=(DOUBLE,),
    ),
    # A step of a warp: 2 or 4 tiles by 4, twice 8 products a tile. Steps come by 16-byte copies.
    "linear_large/linear_large_kernel": Rule(
        {
            "HMMA.16816.F32.BF16": 16,
            COPY: 4,
            "LDS.128": 8,
            "LDGDEPBAR": 4,
            "DEPBAR.LE": 1,
            BARRIER: 1,
        },
        registers=152,
        must_not=(DOUBLE,),
    ),
    # As bfloat16, with half the weights to load; codes become numbers two at a time.
    "linear_mxfp8/expert_mxfp8_kernel": Rule(
        {
            "HMMA.16816.F32.BF16": 24,
            WEIGHTS: 8,
            AHEAD: 1,
            "HMUL2.BF16": 16,
            "LDG.E.128": 12,
            BARRIER: 6,
        },
        registers=80,
        must_not=(DOUBLE,),
    ),
    "linear_mxfp8/linear_mxfp8_kernel": Rule(
        {
            "HMMA.16816.F32.BF16": 8,
            WEIGHTS: 4,
            AHEAD: 1,
            "HMUL2.BF16": 16,
            "LDG.E.128": 4,
            BARRIER: 2,
        },
        registers=144,
        must_not=(DOUBLE,),
    ),
    # As bfloat16, with a quarter of the weights to load and a table of sizes in shared memory: one
    # look-up for eight codes, which pick bytes.
    "linear_nvfp4/expert_nvfp4_kernel": Rule(
        {
            "HMMA.16816.F32.BF16": 24,
            WEIGHTS_OF_8: 8,
            AHEAD: 1,
            "LDS.128": 16,
            "PRMT": 160,
            "LDG.E.128": 12,
            BARRIER: 7,
        },
        registers=80,
        must_not=(DOUBLE, "HMUL2"),
    ),
    "linear_nvfp4/linear_nvfp4_kernel": Rule(
        {
            "HMMA.16816.F32.BF16": 8,
            WEIGHTS_OF_8: 4,
            AHEAD: 1,
            "LDS.128": 8,
            "PRMT": 80,
            "LDG.E.128": 4,
            BARRIER: 3,
        },
        registers=144,
        must_not=(DOUBLE, "HMUL2"),
    ),
    # Weights of a round and of the next; group sums of two rows in one store.
    # Up to 128 registers, two thread blocks fit on a multiprocessor.
    "linear_quantised/expert_quantised_kernel": replace(
        QUANTISED, must=QUANTISED.must | {BARRIER: 12}, registers=112
    ),
    "linear_quantised/linear_quantised_kernel": QUANTISED,
    "linear_quantised/quantise_rows_kernel": Rule({EXCHANGE: 4, "STG.E.U16": 1}),
    # Eight experts of four columns on their way.
    "moe/combine_kernel": Rule({"FFMA": 32, FOUR: 8, STORE_FOUR: 1}),
    "pack/pack_kernel": Rule({"STG.E.U16": 1}),
    "pack/pack_mxfp8_kernel": Rule({"STG.E.U8": 2}),
    "pack/pack_nvfp4_kernel": Rule({"STG.E.U8": 1}),
    "pack/pack_quantised_kernel": Rule({"STG.E.U16": 1}),
    "root/broadcast_kernel": Rule(EXCHANGE_OF_RANKS, registers=72),
    "root/gather_kernel": Rule(
        {name: n for name, n in EXCHANGE_OF_RANKS.items() if name != AHEAD} | {"STG.E": 4},
        registers=72,
    ),
    # Sigmoids in double, as on the CPU; sixteen slices of a logit on their way.
    "router/route_kernel": Rule(
        {BARRIER: 4, EXCHANGE: 10, "DFMA": 1, "LDG.E": 16}, must_not=(TENSOR,)
    ),
    # Weights of a thread, all on their way before the rows; products with two rows.
    "router/router_kernel": Rule({"LDG.E": 33, "FFMA": 64, EXCHANGE: 4, BARRIER: 1}),
    "rows/embed_audio_kernel": Rule(NORM),
    "rows/embed_text_kernel": Rule(NORM),
    "rows/fold_kernel": Rule({"STG.E": 1}),
    "rows/norm_kernel": Rule(NORM),
    "rows/silu_mul_kernel": Rule({"FFMA": 2}),
    # Four loads of a thread on their way, for the best and for a list; sums in shared memory. What
    # an id weighs is not fused: the CPU's compiler does not fuse it either. 1024 threads leave 64
    # registers.
    "sample/sample_kernel": Rule(
        {FOUR: 8, "ATOMS.ADD": 8, BARRIER: 8, "FMUL": 6, "FADD": 6, "F2I.U64": 2}
    ),
    "turn/gather_rows_kernel": Rule({FOUR: 1, STORE_FOUR: 1}),
    # The driver's function that sets the condition of a graph's loop.
    "turn/take_tokens_kernel": Rule({BARRIER: 1, "CALL.ABS": 1}),
}

ENTRY = re.compile(r"Compiling entry function '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
NAME = re.compile(r"(\w+_kernel)")
FUNCTION = re.compile(r"Function : (\w+)")
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel, and how often its machine code has each instruction."""

    gpu: str
    kernel: str  # file/name
    registers: int
    stack_bytes: int
    spill_bytes: int
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        """Instructions that begin with a pattern."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def demangled(symbol: str) -> str:
    """The C++ name of a symbol."""
    command = ["c++filt", symbol]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(binary: Path) -> dict[str, Counter[str]]:
    """The instructions of each function."""
    tools = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"
    if not (tools / "cuobjdump").is_file():
        raise SystemExit(f"expected cuobjdump in {tools}; install {' and '.join(SASS_TOOLS)}")
    result = subprocess.run(
        [str(tools / "cuobjdump"), "-sass", str(binary)],
        env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},  # it calls nvdisasm
        capture_output=True,
        text=True,
        check=True,
    )
    parts = re.split(r"(?=Function : )", result.stdout)[1:]
    return {FUNCTION.findall(part)[0]: Counter(OPCODE.findall(part)) for part in parts}


def compile_for(gpu: str, source: Path) -> list[Usage]:
    """The kernels of one source; raises SystemExit with the compiler's words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.o"
        command = [
            "nvcc", *FLAGS, f"-gencode=arch=compute_{gpu},code=sm_{gpu}", str(source),
            "-o", str(binary),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise SystemExit(f"{source} for sm_{gpu}: {result.stderr}")
        instructions = disassemble(binary)
    usages = []
    for part in re.split(r"(?=Compiling entry function)", result.stderr)[1:]:
        entry, frame, registers = ENTRY.search(part), FRAME.search(part), REGISTERS.search(part)
        assert entry is not None, part
        assert frame is not None, part
        assert registers is not None, part
        name = NAME.search(demangled(entry[1]))
        assert name is not None, part
        stack, stores, loads = map(int, frame.groups())
        kernel = f"{source.stem}/{name[1]}"
        code = instructions[entry[1]]
        usages.append(Usage(gpu, kernel, int(registers[1]), stack, stores + loads, code))
    return usages


def compile_all() -> list[Usage]:
    """Every kernel for every GPU; templates give several for one name."""
    jobs = [(gpu, source) for source in sorted(FOLDER.glob("kernels/*.cu")) for gpu in GPUS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [u for found in pool.map(lambda job: compile_for(*job), jobs) for u in found]


def problems_of(u: Usage, rule: Rule) -> list[str]:
    """What one kernel does not keep to."""
    where = f"{u.kernel} on sm_{u.gpu}"
    problems = []
    if u.registers > rule.registers or u.stack_bytes or u.spill_bytes:
        problems.append(
            f"{where}: expected at most {rule.registers} registers, no stack and no "
            f"spills, found {u.registers}, {u.stack_bytes} and {u.spill_bytes} bytes"
        )
    early = () if NOT_EARLY.match(u.kernel) else EARLY
    if BETWEEN_GPUS.match(u.kernel):
        early = EARLY[:1]
    for pattern, least in (rule.must | dict.fromkeys(early, 1)).items():
        if u.count(re.escape(pattern)) < least:
            found = u.count(re.escape(pattern))
            problems.append(f"{where}: expected {pattern} {least} times or more, found {found}")
    for pattern in (LOCAL, *rule.must_not, *(name for name in EARLY if name not in early)):
        if u.count(pattern):
            problems.append(f"{where}: expected no {pattern}, found {u.count(pattern)}")
    return problems


def check(usages: list[Usage]) -> list[str]:
    """Every problem of all kernels, and of the table itself."""
    names = {u.kernel for u in usages}
    problems = [f"{name}: has no rule" for name in sorted(names - KERNELS.keys())]
    problems += [f"{name}: has a rule, is no kernel" for name in sorted(KERNELS.keys() - names)]
    for u in usages:
        if u.kernel in KERNELS:
            problems += problems_of(u, KERNELS[u.kernel])
    return problems


def main() -> int:
    """Prints the registers of every kernel, then every problem; returns the exit status."""
    usages = compile_all()
    problems = check(usages)
    print(f"{'registers':28}", *(f"sm_{gpu:6}" for gpu in GPUS))
    for kernel in sorted({u.kernel for u in usages}):
        most = {
            gpu: max(u.registers for u in usages if (u.kernel, u.gpu) == (kernel, gpu))
            for gpu in GPUS
        }
        print(f"{kernel:28}", *(f"{most[gpu]:6}   " for gpu in GPUS))
    print("\n".join([*problems, f"check_cuda: {len(KERNELS)} kernels, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
