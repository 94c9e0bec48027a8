"""Checkpoints of codes and scales, and the plain float32 checkpoints that hold their values.

A twin of `csrc/model/source_tensor.cpp` that shares nothing with it: values come from the formats'
definitions, quantising from a search among all values. `FORMS` are the ways in which published
checkpoints spell codes (docs/CHECKPOINT.md); `quantise` writes one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
Tensors = dict[str, torch.Tensor]

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def minifloat(n_exponent: int, n_mantissa: int, bias: int) -> Array:
    """(codes,) the values of all codes of a small IEEE-like format, sign first."""
    codes = np.arange(1 << (1 + n_exponent + n_mantissa))
    mantissa = codes & ((1 << n_mantissa) - 1)
    exponent = codes >> n_mantissa & ((1 << n_exponent) - 1)
    size = np.where(
        exponent == 0,
        np.ldexp(mantissa / (1 << n_mantissa), 1 - bias),
        np.ldexp(1 + mantissa / (1 << n_mantissa), exponent - bias),
    )
    return np.where(codes >> (n_exponent + n_mantissa), -size, size).astype(np.float32)


E4M3 = minifloat(4, 3, 7)
E4M3[[0x7F, 0xFF]] = np.nan


def nearest(values: Array, table: Array) -> NDArray[np.uint8]:
    """The code of the table's value nearest to each of `values`."""
    order = np.argsort(table, kind="stable")
    order = order[np.isfinite(table[order])]
    bounds = (table[order][1:] + table[order][:-1]) / 2
    return order[np.searchsorted(bounds, values)].astype(np.uint8)


def blocks(values: Array, width: int) -> Array:
    """(..., columns) as (..., blocks, width), padded with zeros."""
    padding = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % width)]
    padded = np.pad(values, padding)
    return padded.reshape(*values.shape[:-1], -1, width)


def pairs(codes: NDArray[np.uint8]) -> torch.Tensor:
    """Two codes a byte, the first in the low half."""
    return torch.from_numpy(codes[..., ::2] | codes[..., 1::2] << 4)


def e4m3_tensor(codes: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Coded:
    """One tensor: its codes, its companions by role, and its values in float32."""

    codes: torch.Tensor
    block: torch.Tensor
    second: torch.Tensor | None
    values: Array


def micro(values: Array, width: int, table: Array, scale_of: Callable[[Array], Array]) -> Any:
    """Codes, block scales and exact products for blocks of `width` columns.

    scale_of: from the largest size of each block to (code, value) of its scale.
    """
    cut = blocks(values, width)
    scale_codes, scales = scale_of(np.abs(cut).max(axis=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.nan_to_num(cut / scales[..., None])
    codes = nearest(wanted, table)
    product = table[codes] * scales[..., None]
    assert np.array_equal(product.astype(np.float64), table[codes].astype(np.float64) *
                          scales[..., None].astype(np.float64))  # fmt: skip
    n = values.shape[-1]
    flat = (*values.shape[:-1], -1)
    return codes.reshape(flat)[..., :n], scale_codes, product.reshape(flat)[..., :n]


def nvfp4(values: Array, *, divides: bool = False) -> Coded:
    """The second scale belongs to a matrix: () of a tensor of two dimensions, (n,) of three."""
    largest = np.abs(values).max(axis=(-1, -2))
    second = (largest / np.float32(6 * 448)).astype(np.float32)
    if divides:
        second = np.float32(1) / second
    shaped = np.asarray(second)[..., None, None]
    unit = values * shaped if divides else values / shaped

    def scale_of(size: Array) -> tuple[Array, Array]:
        codes = nearest(size / 6, E4M3)
        return codes, E4M3[codes]

    codes, scales, product = micro(unit, 16, E2M1, scale_of)
    exact = product / shaped if divides else product * shaped
    return Coded(pairs(codes), e4m3_tensor(scales), torch.tensor(second), exact.astype(np.float32))


def mx(values: Array, table: Array) -> Coded:
    """MXFP8 or MXFP4: a power of two for 32 columns."""

    def scale_of(size: Array) -> tuple[Array, Array]:
        with np.errstate(divide="ignore"):
            exponent = np.ceil(np.log2(size / np.nanmax(table)))
        exponent = np.clip(np.nan_to_num(exponent, neginf=-127), -127, 127).astype(int)
        return (exponent + 127).astype(np.uint8), np.ldexp(np.float32(1), exponent)

    codes, scales, product = micro(values, 32, table, scale_of)
    coded = pairs(codes) if len(table) == 16 else e4m3_tensor(codes)
    return Coded(coded, torch.from_numpy(scales), None, product.astype(np.float32))


def fp8(values: Array, granularity: str) -> Coded:
    """F8_E4M3 with float scales: one for all ("tensor"), one a "row" or a "block" of 128 x 128."""
    rows, width = values.shape[-2:]
    shape = {"tensor": (rows, width), "row": (1, width), "block": (128, 128)}[granularity]
    n_rows, n_columns = -(-rows // shape[0]), -(-width // shape[1])
    lead = values.shape[:-2]
    scales = np.zeros((*lead, n_rows, n_columns), np.float32)
    exact = np.zeros(values.shape, np.float32)
    codes = np.zeros(values.shape, np.uint8)
    whole = np.float32(np.abs(values).max() / 448)
    for i in range(n_rows):
        for j in range(n_columns):
            at = np.s_[..., i * shape[0] : (i + 1) * shape[0], j * shape[1] : (j + 1) * shape[1]]
            scale = np.abs(values[at]).max(axis=(-1, -2)) / np.float32(448) + np.float32(1e-9)
            scale = np.broadcast_to(whole, lead) if granularity == "tensor" else scale
            scales[..., i, j] = scale
            codes[at] = nearest(values[at] / scale[..., None, None], E4M3)
            exact[at] = E4M3[codes[at]] * scale[..., None, None].astype(np.float32)
    kept = scales.reshape(-1)[:1] if granularity == "tensor" else scales
    return Coded(e4m3_tensor(codes), torch.from_numpy(kept.copy()), None, exact)


@dataclass(frozen=True)
class Form:
    """How a format is spelled: endings after the name, or after the name less ".weight"."""

    code: Callable[[Array], Coded]
    block: str  # "{name}" and "{module}" stand for the two
    codes: str = "{name}"
    second: str = ""
    unused: tuple[str, ...] = ()


FORMS = {
    "published": Form(
        nvfp4, "{name}.scale", second="{name}.scale2",
        unused=("{name}.input_amax", "{name}.original_shape"),
    ),
    "modelopt": Form(
        nvfp4, "{module}.weight_scale", second="{module}.weight_scale_2",
        unused=("{module}.input_scale",),
    ),
    "compressed-tensors": Form(
        lambda values: nvfp4(values, divides=True), "{module}.weight_scale",
        codes="{module}.weight_packed", second="{module}.weight_global_scale",
        unused=("{module}.input_global_scale",),
    ),
    "mxfp8": Form(lambda values: mx(values, E4M3), "{module}.weight_scale"),
    "mxfp4": Form(lambda values: mx(values, E2M1), "{module}.weight_scale",
                  codes="{module}.weight_packed"),
    "fp8-tensor": Form(lambda values: fp8(values, "tensor"), "{module}.weight_scale",
                       unused=("{module}.input_scale",)),
    "fp8-row": Form(lambda values: fp8(values, "row"), "{module}.weight_scale"),
    "fp8-block": Form(lambda values: fp8(values, "block"), "{name}_scale_inv"),
}  # fmt: skip

# Of two spellings: routed and shared experts, dense MLP, attention, embeddings, towers.
MATRICES = (
    "w13_weight", "w2_weight", "w13_dn.weight", "w2_md.weight", "gate_up_proj", "down_proj",
    "gate_proj", "up_proj", "wq_du.weight", "wk_dv.weight", "wv_dv.weight", "wr_du.weight",
    "wo_ud.weight", "_proj.weight", "embed.weight", "unembed.weight", "lm_head.weight",
    "gate.weight", "linear_0.weight", "encoder.weight",
)  # fmt: skip


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """Whether the tests quantise this tensor; packed codes need an even number of columns."""
    return name.endswith(MATRICES) and tensor.ndim >= 2 and tensor.shape[-1] % 2 == 0


def quantise(
    tensors: Tensors,
    form: Form,
    pick: Callable[[str, torch.Tensor], bool] = is_matrix,
) -> tuple[Tensors, Tensors]:
    """(a checkpoint of codes, the plain checkpoint of its values)."""
    coded: Tensors = {}
    plain: Tensors = {}
    for name, tensor in tensors.items():
        coded[name] = plain[name] = tensor
        if not pick(name, tensor):
            continue
        del coded[name]
        names = {"name": name, "module": name.removesuffix(".weight")}
        result = form.code(tensor.float().numpy())
        plain[name] = torch.from_numpy(np.ascontiguousarray(result.values))
        coded[form.codes.format(**names)] = result.codes.contiguous()
        coded[form.block.format(**names)] = result.block.contiguous()
        if form.second:
            assert result.second is not None
            coded[form.second.format(**names)] = result.second
        for unused in form.unused:
            value = torch.tensor(tensor.shape) if "shape" in unused else torch.ones(1)
            coded[unused.format(**names)] = value
    return coded, plain
