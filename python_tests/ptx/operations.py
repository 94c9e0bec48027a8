"""What PTX instructions without side effects compute, on arrays with one element for each thread.

`operation(opcode)` finds it. An opcode that is not in the tables, or a type that its row does not
name, is an error: only what has been thought about is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from ptx.program import UnsupportedPtx

Array = NDArray[np.generic]
Function = Callable[..., Array]

TYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16,
    "u16": np.uint16, "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
INTEGERS = "s16 u16 s32 u32 s64 u64"
BITS = "b16 b32 b64"
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


@dataclass(frozen=True)
class Operation:
    """A function with the types of its result and of its sources."""

    result: str
    sources: tuple[str, ...]
    function: Function


def fused_float(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f32. The product is exact in double; the sum is rounded to odd there, then once."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    of_addend = total - product
    error = (product - (total - of_addend)) + (addend - of_addend)
    bits = np.atleast_1d(total).view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    is_inexact = (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    return np.where(is_inexact, bits + step, bits).view(np.float64).astype(np.float32)


def fused_double(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f64 through 80 bits, so the last place may differ: nvcc uses it in exp, log and 1/x,
    whose results are rounded to float32 later."""
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c).astype(np.float64)


def divide(a: Array, b: Array) -> Array:
    """Towards zero."""
    if np.any(b == 0):
        raise ZeroDivisionError("an integer division by zero")
    quotient = a // b
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0)))


def high_product(a: Array, b: Array) -> Array:
    """The upper half of a product."""
    wide = a.astype(np.uint64) * b.astype(np.uint64)
    return (wide >> np.uint64(32)).astype(np.uint32)


def shift_left(a: Array, count: Array) -> Array:
    """Counts of the width or more give zero."""
    width = a.dtype.itemsize * 8
    return np.where(count < width, a << np.minimum(count, width - 1).astype(a.dtype), a * 0)


def shift_right(a: Array, count: Array) -> Array:
    """Counts of the width or more leave copies of the sign."""
    width = a.dtype.itemsize * 8
    shifted = a >> np.minimum(count, width - 1).astype(a.dtype)
    return np.where((count < width) | (a.dtype.kind == "i"), shifted, a * 0)


def reciprocal_seed(a: Array) -> Array:
    """rcp.approx.ftz.f64: the upper word of the reciprocal of the upper word."""
    upper = ~np.uint64(0xFFFFFFFF)
    x = (np.atleast_1d(a).view(np.uint64) & upper).view(np.float64)
    return ((1.0 / x).view(np.uint64) & upper).view(np.float64)


def flush(x: Array) -> Array:
    """Zero for what is below the normal numbers."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, x * 0, x)


def to_u64(a: Array) -> Array:
    """cvt.rzi.u64.f32: the ends of the range for what lies beyond, zero for what is no number."""
    inside = np.where((a >= 0) & (a < 2.0**64), a, 0).astype(np.uint64)
    return np.where(a >= 2.0**64, ~np.uint64(0), inside)


def extract(a: Array, begin: Array, length: Array) -> Array:
    """bfe.u32."""
    mask = shift_left(np.ones_like(a), length) - np.uint32(1)
    return shift_right(a, begin & 0xFF) & mask


def insert(a: Array, b: Array, begin: Array, length: Array) -> Array:
    """bfi: the lowest bits of a in place of some of b."""
    ones = shift_left(np.ones_like(a), length & 0xFF) - a.dtype.type(1)
    mask = shift_left(ones, begin & 0xFF)
    return (shift_left(a, begin & 0xFF) & mask) | (b & ~mask)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt.b32: each byte is one of the eight of a and b, or its sign, as a nibble says."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(a.shape, np.uint64)
    for i in range(4):
        choice = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = both >> ((choice & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte > 127, np.uint64(255), np.uint64(0))
        result |= np.where(choice > 7, sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def multiply_bfloat16(a: Array, b: Array) -> Array:
    """mul.rn.bf16x2: the products of the two halves, each rounded to nearest even."""
    wide = [
        np.stack([x << np.uint32(16), x & np.uint32(0xFFFF0000)], -1).view(np.float32)
        for x in np.broadcast_arrays(a, b)
    ]
    bits = (wide[0] * wide[1]).view(np.uint32).astype(np.uint64)
    halves = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return (halves[..., 0] | halves[..., 1] << np.uint64(16)).astype(np.uint32)


# opcode without its type -> types, number of sources, function; all of one type
SIMPLE: dict[str, tuple[str, int, Function]] = {
    "add": (INTEGERS, 2, lambda a, b: a + b),
    "add.rn": ("f32 f64", 2, lambda a, b: a + b),
    "sub": (INTEGERS, 2, lambda a, b: a - b),
    "sub.rn": ("f32 f64", 2, lambda a, b: a - b),
    "mul.lo": (INTEGERS, 2, lambda a, b: a * b),
    "mul.rn": ("f32 f64", 2, lambda a, b: a * b),
    "mad.lo": (INTEGERS, 3, lambda a, b, c: a * b + c),
    "div": (INTEGERS, 2, divide),
    "rem": (INTEGERS, 2, lambda a, b: a - divide(a, b) * b),
    "div.rn": ("f32 f64", 2, lambda a, b: a / b),
    "rcp.rn": ("f32 f64", 1, lambda a: (1 / a).astype(a.dtype)),
    "sqrt.rn": ("f32 f64", 1, np.sqrt),
    # exp2 to 2^-22.5 of its value, says PTX: the tests' bounds hold with this one's error too
    "ex2.approx.ftz": ("f32", 1, lambda a: flush(np.exp2(flush(a)))),
    "rcp.approx.ftz": ("f64", 1, reciprocal_seed),
    "min": (INTEGERS, 2, np.minimum),
    "max": (INTEGERS, 2, np.maximum),
    "neg": ("s16 s32 s64 f32 f64", 1, lambda a: -a),
    "abs": ("s16 s32 s64 f32 f64", 1, np.abs),
    "copysign": ("f32 f64", 2, lambda a, b: np.copysign(b, a)),
    "and": (f"pred {BITS}", 2, lambda a, b: a & b),
    "or": (f"pred {BITS}", 2, lambda a, b: a | b),
    "xor": (f"pred {BITS}", 2, lambda a, b: a ^ b),
    "not": (f"pred {BITS}", 1, lambda a: ~a),
    "mov": (f"pred f32 f64 {INTEGERS} {BITS}", 1, lambda a: a),
}
FLOATS: dict[str, Function] = {  # where a type has a meaning of its own
    "fma.rn.f32": fused_float,
    "fma.rn.f64": fused_double,
    "min.f32": np.fmin,
    "min.f64": np.fmin,
    "max.f32": np.fmax,
    "max.f64": np.fmax,
}
COMPARISONS: dict[str, Function] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "num": lambda a, b: (a == a) & (b == b),
}  # with `u` behind them: true where one is not a number
OPPOSITE = {
    "equ": "ne",
    "neu": "eq",
    "ltu": "ge",
    "leu": "gt",
    "gtu": "le",
    "geu": "lt",
    "nan": "num",
}


def comparison(name: str, kind: str) -> Operation:
    """setp."""
    if name in OPPOSITE and kind in ("f32", "f64"):
        ordered = COMPARISONS[OPPOSITE[name]]
        return Operation("pred", (kind, kind), lambda a, b: ~ordered(a, b))
    return Operation("pred", (kind, kind), COMPARISONS[name])


def conversion(rounding: str, result: str, source: str) -> Operation:
    """cvt."""
    to = TYPES[result]
    is_float = (result[0] == "f", source[0] == "f")
    if is_float == (False, False) and rounding == "":
        return Operation(result, (source,), lambda a: a.astype(to))
    if (is_float == (True, False) and rounding == "rn") or (rounding, result, source) in (
        ("rn", "f32", "f64"),
        ("", "f64", "f32"),
    ):
        return Operation(result, (source,), lambda a: a.astype(to))
    if (rounding, result, source) == ("rni", "f32", "f32"):
        return Operation(result, (source,), np.rint)
    if (rounding, result, source) == ("rzi", "u64", "f32"):
        return Operation(result, (source,), to_u64)
    if (rounding, result, source) == ("rzi", "s32", "f32"):
        limits = np.iinfo(np.int32)
        return Operation(
            result,
            (source,),
            lambda a: np.clip(np.nan_to_num(a.astype(np.float64)), limits.min, limits.max).astype(
                to
            ),
        )
    raise UnsupportedPtx(f"cvt.{rounding}.{result}.{source}")


def operation(opcode: str) -> Operation:
    """The operation of an opcode; UnsupportedPtx where there is none."""
    name, _, kind = opcode.rpartition(".")
    try:
        if opcode in FLOATS:
            n_sources = 3 if opcode.startswith("fma") else 2
            return Operation(kind, (kind,) * n_sources, FLOATS[opcode])
        if name in SIMPLE and kind in SIMPLE[name][0].split():
            return Operation(kind, (kind,) * SIMPLE[name][1], SIMPLE[name][2])
        if name == "mul.wide":
            to = TYPES[WIDER[kind]]
            return Operation(WIDER[kind], (kind, kind), lambda a, b: a.astype(to) * b.astype(to))
        if opcode == "mul.hi.u32":
            return Operation(kind, (kind, kind), high_product)
        if name == "shl":
            return Operation(kind, (kind, "u32"), shift_left)
        if name == "shr":
            return Operation(kind, (kind, "u32"), shift_right)
        if name == "bfe" and kind == "u32":
            return Operation(kind, (kind, "u32", "u32"), extract)
        if opcode == "mul.rn.bf16x2":
            return Operation("u32", ("u32", "u32"), multiply_bfloat16)
        if name == "bfi":
            bits = kind.replace("b", "u")
            return Operation(kind, (bits, bits, "u32", "u32"), insert)
        if opcode == "prmt.b32":
            return Operation(kind, ("u32",) * 3, permute)
        if name == "selp":
            return Operation(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))
        if name.startswith("setp."):
            return comparison(name.removeprefix("setp."), kind)
        if name.startswith("cvt."):
            *_, result = words = name.split(".")
            return conversion(words[1] if len(words) == 3 else "", result, kind)
    except KeyError as error:
        raise UnsupportedPtx(opcode) from error
    raise UnsupportedPtx(opcode)
