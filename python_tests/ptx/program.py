"""Reads the PTX that nvcc emits: kernels, their parameters, registers and instructions.

Nothing is executed here; machine.py does that. What the text holds beyond this is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ENTRY = re.compile(r"\.entry\s+(\w+)\((.*?)\)(?:\s*\.\w+[^{]*)?\s*\{", re.S)
PARAMETER = re.compile(r"\.param\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([%\w]+)(?:<(\d+)>)?")
SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]")
NAME = re.compile(r"(?=(\d\d?)([a-z]\w*))")  # a length and what follows, at every place
ARGUMENT = re.compile(r"IL[bi](\d+)E")  # a number, or whether
CALL = re.compile(r"call\.uni\s+(\w+),\s*\(\s*([^)]*?)\s*\)\s*;")
ARGUMENT_OF_CALL = re.compile(r"\.param\s+\.(b32|b64)\s+(\w+)")
STORE_OF_CALL = re.compile(r"st\.param\.(b32|b64)\s+\[(\w+)(?:\+0)?\],")
SCOPE = re.compile(r"^\{(?=\s|$)|(?:^|\s)\}$")  # a block of inline assembly
WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "f32": 32, "b64": 64, "u64": 64, "f64": 64}


class UnsupportedPtx(Exception):
    """The text holds what the interpreter does not know."""


@dataclass(frozen=True)
class Address:
    """[base + offset]; the base is a register or a name."""

    base: str
    offset: int


# A register, a name or a number in the text's own words; an address; or several registers.
Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """One instruction; `guard` is the predicate it depends on, with whether it is negated."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    text: str


@dataclass
class Kernel:
    """One .entry of a PTX file."""

    name: str  # with its template argument: linear_bf16_kernel<4>
    parameter: str
    parameter_bytes: int
    shared: set[str]  # names of the dynamic shared memory
    widths: dict[str, int] = field(default_factory=dict)  # of the registers, in bits
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def split_operands(text: str) -> list[str]:
    """Splits at the commas that are in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += letter in "[{"
        depth -= letter in "]}"
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def parse_operand(text: str) -> Operand:
    """One operand; `a|b` is two registers, as of shfl."""
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or "0"))
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if "|" in text:
        return tuple(text.split("|"))
    return text


def parse_instruction(text: str) -> Instruction:
    """One statement without its semicolon."""
    guard, rest = None, text
    if text.startswith("@"):
        word, rest = text[1:].split(None, 1)
        guard = (word.lstrip("!"), word.startswith("!"))
    opcode, *operands = rest.split(None, 1)
    parsed = tuple(parse_operand(part) for part in split_operands("".join(operands)))
    return Instruction(opcode, parsed, guard, text)


def kernel_name(symbol: str) -> str:
    """`linear_bf16_kernel<4>` of a mangled symbol."""
    # From behind: a file's hash before it may end in a number that happens to fit.
    for length, rest in reversed(NAME.findall(symbol)):
        name = rest[: int(length)]
        if name.endswith("_kernel"):
            argument = ARGUMENT.match(rest[int(length) :])
            return name if argument is None else f"{name}<{argument[1]}>"
    raise UnsupportedPtx(f"expected the name of a kernel, found {symbol}")


def parse_body(kernel: Kernel, body: str) -> None:
    """Adds the registers, labels and instructions of a kernel.

    The arguments of a call are registers here, which it stores to before.
    """
    body = re.sub(r"//.*", "", body)
    body = CALL.sub(lambda call: f"call.uni {call[1]}, {{{' '.join(call[2].split())}}};", body)
    body = STORE_OF_CALL.sub(r"mov.\1 \2,", body)
    for line in body.split("\n"):
        for statement in filter(None, map(str.strip, SCOPE.sub("", line.strip()).split(";"))):
            if statement.startswith(".pragma"):
                continue
            if statement.startswith(".param"):
                kernel.widths.update(
                    {name: WIDTHS[kind] for kind, name in ARGUMENT_OF_CALL.findall(statement)}
                )
            elif statement.startswith(".reg"):
                for kind, name, count in REGISTERS.findall(statement):
                    names = [f"{name}{i}" for i in range(int(count))] if count else [name]
                    kernel.widths.update(dict.fromkeys(names, WIDTHS[kind]))
            elif statement.endswith(":"):
                kernel.labels[statement[:-1]] = len(kernel.code)
            else:
                kernel.code.append(parse_instruction(statement))


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX file by name."""
    shared = set(SHARED.findall(text))
    kernels = {}
    for entry in ENTRY.finditer(text):
        parameters = PARAMETER.findall(entry[2])
        if len(parameters) != 1:
            raise UnsupportedPtx(f"expected a kernel of one struct, found {entry[0]}")
        name, size = parameters[0]
        kernel = Kernel(kernel_name(entry[1]), name, int(size), shared)
        parse_body(kernel, text[entry.end() : text.index("\n}", entry.end())])
        kernels[kernel.name] = kernel
    return kernels
