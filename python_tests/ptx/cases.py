"""Every case of every kernel, by name."""

from __future__ import annotations

from ptx import (
    cases_all_reduce,
    cases_append,
    cases_attention,
    cases_gated,
    cases_kv_int8,
    cases_linear,
    cases_moe,
    cases_quantised,
    cases_rows,
    cases_sample,
    cases_turn,
)
from ptx.device import Case, Device
from ptx.machine import Order
from ptx.program import Kernel, parse

CASES: dict[str, Case] = {
    **cases_rows.CASES,
    **cases_append.CASES,
    **cases_attention.CASES,
    **cases_kv_int8.CASES,
    **cases_linear.CASES,
    **cases_quantised.CASES,
    **cases_gated.CASES,
    **cases_moe.CASES,
    **cases_all_reduce.CASES,
    **cases_sample.CASES,
    **cases_turn.CASES,
}


def kernels_of(texts: dict[str, str]) -> dict[str, Kernel]:
    """The kernels of PTX files (text by stem), by "file/name"."""
    return {
        f"{stem}/{name}": kernel
        for stem, text in texts.items()
        for name, kernel in parse(text).items()
    }


def run_in_both_orders(kernels: dict[str, Kernel], case: str) -> None:
    """The orders in which one warp waits for no other."""
    for order in (Order.FIRST, Order.LAST):
        CASES[case](Device(kernels, order))
