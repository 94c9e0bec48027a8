"""The PTX of every CUDA kernel, interpreted, against NumPy.

It proves what the host run of the kernels (csrc/tests/simt/) cannot: the inline PTX, its operands
and constraints, and what nvcc made of the rest. The interpreter shares no code with that run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache

import pytest
from ptx.cases import CASES, kernels_of, run_in_both_orders
from ptx.compile import GPUS, compile_all
from ptx.device import Device
from ptx.machine import Order, Stuck
from ptx.memory import MemoryFault
from ptx.operations import operation
from ptx.program import UnsupportedPtx

# What lies between two barriers must come out alike, whichever warp is ahead.
ORDERS = {"90a": Order.FIRST, "100a": Order.LAST, "103a": Order.TOGETHER}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH"),
]


@pytest.fixture(scope="module")
def ptx() -> dict[str, dict[str, str]]:
    """Text by GPU and file."""
    return compile_all()


@pytest.fixture(scope="module")
def run(ptx: dict[str, dict[str, str]]) -> Callable[[str, str], set[str]]:
    """Runs a case for a GPU, once, and gives the names of the kernels that it launched."""
    kernels = {gpu: kernels_of(texts) for gpu, texts in ptx.items()}

    @cache
    def run_case(gpu: str, name: str) -> set[str]:
        device = Device(kernels[gpu], ORDERS[gpu])
        CASES[name](device)
        return device.launched

    return run_case


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gpu", GPUS)
def test_kernel_computes_what_it_should(
    run: Callable[[str, str], set[str]],
    gpu: str,
    name: str,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("gpu", gpu)
    record_property("kernels", " ".join(sorted(run(gpu, name))))


def test_every_kernel_has_a_case(
    ptx: dict[str, dict[str, str]], run: Callable[[str, str], set[str]]
) -> None:
    launched = set().union(*[run("90a", name) for name in CASES])
    assert launched == kernels_of(ptx["90a"]).keys()


# A word of the PTX, what takes its place, and a case that must notice.
SWAPPED = r"\1\3, \2"
FEW_INT8, FEW_INT4 = "linear_few_rows-int8", "linear_few_rows-int4"
MUTANTS = {
    "rows of A": (r"(mma\S+\s+\{[^}]*\}, \{)(%r\d+), (%r\d+)", SWAPPED, "linear_8_rows-bfloat16"),
    "halves of B": (r"(, \{)(%r\d+), (%r\d+)(?=\}, \{)", SWAPPED, "linear_8_rows-bfloat16"),
    "rows of A, int8": (r"(mma\S+s8\.s32\s+\{[^}]*\}, \{)(%r\d+), (%r\d+)", SWAPPED, FEW_INT8),
    "halves of B, int4": (r"(s8\.s32[^;]*, \{)(%r\d+), (%r\d+)(?=\}, \{)", SWAPPED, FEW_INT4),
    "signs of A": (r"s32\.u8\.s8", "s32.s8.s8", "attention_int8"),
    "signs of B": (r"s32\.s8\.u8", "s32.s8.s8", "attention_int8"),
    "words loaded": (r"(\.nc\S+ \{)(%r\d+), (%r\d+)", SWAPPED, "linear_8_rows-bfloat16"),
    "a wait": (r"cp\.async\.wait_group 1", "cp.async.wait_group 2", "attention-float32"),
    "groups of copies": (r"cp\.async\.commit_group;", "", "attention-float32"),
    "a shuffle": (r"shfl\.sync\.bfly", "shfl.sync.down", "attention-float32"),
    "barriers": (r"bar\.sync\s+0;", "", "attention-float32"),
    "the wait for the grid before": (r"griddepcontrol\.wait;", "", "linear_8_rows-bfloat16"),
    "a wait behind the rows": (
        r"griddepcontrol\.wait;((?s:.)*?)(\n\s*ret;)",
        r"\1\n\tgriddepcontrol.wait;\2",
        "silu_mul-float32",
    ),
    "a product": (r"fma\.rn(\S+\s+%f\d+, )%f\d+", r"fma.rn\g<1>0f3F800000", "linear-float32"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_ptx_is_noticed(ptx: dict[str, dict[str, str]], mutant: str) -> None:
    pattern, replacement, case = MUTANTS[mutant]
    changed = {stem: re.sub(pattern, replacement, text) for stem, text in ptx["90a"].items()}
    assert changed != ptx["90a"]
    kernels = kernels_of(changed)
    with pytest.raises((AssertionError, MemoryFault, Stuck)):
        run_in_both_orders(kernels, case)


@pytest.mark.parametrize("opcode", ["sin.approx.f32", "add.f32", "mul.hi.s32", "cvt.rna.tf32.f32"])
def test_what_has_no_meaning_yet_is_refused(opcode: str) -> None:
    with pytest.raises(UnsupportedPtx):
        operation(opcode)
