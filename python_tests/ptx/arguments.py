"""The kernels' argument structs as ctypes, and the layouts of what their pointers lead to.

They repeat csrc/backend/{views,op_args}.h and the kernels' own structs; machine.py compares their
size with the one in the PTX.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_bool, c_float, c_int32, c_int64, c_uint8, c_uint64

import numpy as np
from numpy.typing import NDArray

F32, BF16, INT8, INT4, MXFP8, NVFP4 = range(6)  # DType
BLOCK = 64  # positions of a block of keys and values
Floats = NDArray[np.float32]


def struct(name: str, **fields: type) -> type[Structure]:
    """A struct of the given members."""
    return type(name, (Structure,), {"_fields_": list(fields.items())})


I32, I64, F, U8, PTR = c_int32, c_int64, c_float, c_uint8, c_uint64
Rows = struct("Rows", data=PTR, stride=I64, dtype=U8)
PackedMatrix = struct("PackedMatrix", data=PTR, n_out=I32, n_in=I32, dtype=U8, is_paired=c_bool)
PackShape = struct(
    "PackShape", n_in=I32, in_group=I32, in_group_padded=I32, dtype=U8, pair_width=I32
)
TapeView = struct("TapeView", base=PTR, blocks_per_page=I64, page_bytes=I64, block_bytes=I64)
Segment = struct(
    "Segment", row_begin=I32, n_rows=I32, position=I64, whole=TapeView, local=TapeView,
    conv=TapeView, forgotten=PTR, n_forgotten=I32,
)  # fmt: skip
Segments = struct("Segments", data=PTR, count=I32, n_rows=I32)
Shape = struct("Shape", n_heads=I32, n_kv_heads=I32, d_head=I32, rel_extent=I32, window=I32)
MoeConfig = struct("MoeConfig", n_experts=I32, n_shared=I32, top_k=I32, d_expert=I32, route_scale=F)
Parts = PTR * 8  # of ConvAddNormArgs
ConvSlot = struct("ConvSlot", weight=PTR, offset_bytes=I64, channels=I32)

EmbedText = struct(
    "EmbedText", ids=PTR, table=PTR, table_dtype=U8, norm=PTR, eps=F, d_model=I32, n_rows=I32,
    out=PTR, out_stride=I64, rows=PTR,
)  # fmt: skip
EmbedAudio = struct(
    "EmbedAudio", bins=PTR, n_mels=I32, n_levels=I32, table=PTR, table_dtype=U8, norm=PTR, eps=F,
    d_model=I32, n_rows=I32, out=PTR, out_stride=I64, rows=PTR,
)  # fmt: skip
Norm = struct(
    "Norm", x=PTR, x_stride=I64, weight=PTR, eps=F, width=I32, n_rows=I32, activation=U8, out=Rows
)
SiluMul = struct("SiluMul", x=PTR, x_stride=I64, width=I32, up_offset=I64, n_rows=I32, out=Rows)
Fold = struct(
    "Fold", x=PTR, x_stride=I64, n_patches=I32, t=I32, h=I32, w=I32, c=I32, t_fold=I32,
    hw_fold=I32, out=Rows,
)  # fmt: skip
Linear = struct(
    "Linear", w=PackedMatrix, x=Rows, n_rows=I32, y=PTR, y_stride=I64, divisor=F, n_parts=I32,
    y_part_stride=I64, activated=Rows,
)  # fmt: skip
ExpertLinear = struct(
    "ExpertLinear", w=PackedMatrix, expert_stride_bytes=I64, first_expert=I32, n_experts=I32,
    choices=PTR, first_row=I32, n_rows=I32, per_row=I32, pairs_of_x=I32, x=Rows, y=PTR,
    y_stride=I64, activated=Rows,
)  # fmt: skip
MatrixScale = struct("MatrixScale", value=F, is_divisor=c_bool)
Pack = struct(
    "Pack", source=PTR, source_dtype=U8, n_rows=I64, row_stride=I64, shape=PackShape,
    n_in_padded=I64, first_out=I64, destination=PTR, scales=PTR, scale_row_stride=I64,
    matrix_scale=MatrixScale,
)  # fmt: skip
QuantiseRows = struct("QuantiseRows", x=Rows, n_in=I32, out=PTR, out_stride=I64)
ConvAddNorm = struct(
    "ConvAddNorm", segments=Segments, parts=Parts, n_parts=I32, x_stride=I64, scale=F,
    conv=ConvSlot, kernel=I32, hidden=PTR, hidden_stride=I64, norm=PTR, eps=F, width=I32, out=Rows,
)  # fmt: skip
KvAppend = struct(
    "KvAppend", segments=Segments, shape=Shape, d_head_padded=I32, qkvr=PTR, stride=I64,
    k_conv=ConvSlot, v_conv=ConvSlot, kernel=I32, q_norm=PTR, k_norm=PTR, eps=F, is_local=c_bool,
    log_scaling_floor=I32, log_scaling_alpha=F, layer_offset_bytes=I64, kv_dtype=U8, q=Rows,
)  # fmt: skip
Attention = struct(
    "Attention", segments=Segments, shape=Shape, d_head_padded=I32, d_rel=I32, q=Rows, r=PTR,
    r_stride=I64, rel_bank=PTR, rel_stride=I64, is_local=c_bool, log_scaling_floor=I32,
    log_scaling_alpha=F, layer_offset_bytes=I64, kv_dtype=U8, out=Rows,
)  # fmt: skip
AttentionLaunch = struct(
    "AttentionLaunch",
    args=Attention,
    first_group=I64,
    group_tiles=I32,
    n_parts=I32,
    bank_width=I32,
    partial=PTR,
)
Sample = struct("Sample", logits=PTR, stride=I64, n_vocab=I32, n_rows=I32, rows=PTR, tokens=PTR)
SAMPLE_ROW = np.dtype(
    [
        ("seed", np.uint64), ("temperature", np.float32), ("top_k", np.int32),
        ("top_p", np.float32), ("padding", np.int32), ("position", np.int64),
    ]
)  # fmt: skip
GatherRows = struct(
    "GatherRows", source=PTR, source_stride_bytes=I64, rows=PTR, is_wanted=PTR, to=PTR,
    row_bytes=I64,
)  # fmt: skip
TurnPlaces = struct(
    "TurnPlaces", count=I32, max_tokens=I32, n_stops=I32, segments=PTR, sampling=PTR, chosen=PTR,
    is_open=PTR, n_tokens=PTR, tokens=PTR, limits=PTR, stops=PTR,
)  # fmt: skip
TakeTokens = struct("TakeTokens", turn=TurnPlaces, is_first=c_bool, has_loop=c_bool, loop=PTR)
Router = struct("Router", w=PackedMatrix, x=Rows, n_rows=I32, parts=PTR, stride=I64)
Route = struct(
    "Route", config=MoeConfig, parts=PTR, n_slices=I32, slice_stride=I64, stride=I64,
    selection_bias=PTR, global_scale=F, choices=PTR,
)  # fmt: skip
Combine = struct(
    "Combine", choices=PTR, per_row=I32, down=PTR, down_stride=I64, y=PTR, y_stride=I64
)
MAX_RANKS = 8
RankGroup = struct(
    "RankGroup", rank=I32, n_ranks=I32, n_blocks=I32, own=PTR, peers=PTR * MAX_RANKS, multicast=PTR,
    buffer_bytes=I64, state=PTR, report=PTR, wait_limit_ns=PTR,
)  # fmt: skip
NextWeights = struct("NextWeights", data=PTR, bytes=I64)
AllReduce = struct(
    "AllReduce", group=RankGroup, part=PTR, part_stride=I64, op=ConvAddNorm, next=NextWeights
)
GatherSlices = struct(
    "GatherSlices", group=RankGroup, x=PTR, out=PTR, n_rows=I32, stride=I64, out_stride=I64,
    slices=I64 * (2 * MAX_RANKS),
)  # fmt: skip
Share = struct("Share", group=RankGroup, x=PTR, out=PTR, n_words=I64, next=NextWeights)
CHOICE = np.dtype([("expert", np.int32), ("weight", np.float32), ("place", np.int32)])


def raw(of: Structure) -> bytes:
    """The bytes of a struct."""
    return ctypes.string_at(ctypes.addressof(of), ctypes.sizeof(of))


def round_up(n: int, align: int) -> int:
    """To a multiple of `align`."""
    return -(-n // align) * align


# ---- bfloat16 and layouts


def encode(values: NDArray[np.floating], dtype: int) -> NDArray[np.generic]:
    """Numbers as they are stored: float32, or bfloat16 as uint16, rounded to nearest even."""
    x = np.ascontiguousarray(values, np.float32)
    if dtype == F32:
        return x
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(stored: NDArray[np.generic]) -> Floats:
    """The other way round."""
    if stored.dtype == np.float32:
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def rounded(values: NDArray[np.floating], dtype: int) -> Floats:
    """The nearest numbers of the type."""
    return decode(encode(values, dtype))


def pad(x: NDArray[np.generic], width: int) -> NDArray[np.generic]:
    """Zeros behind the columns."""
    return np.pad(x, ((0, 0), (0, width - x.shape[1])))


def paired(w: NDArray[np.generic]) -> NDArray[np.generic]:
    """Gates, and as many ups behind them, as outputs of a matrix: eight of either by turns."""
    halves = w.reshape(2, -1, 8, *w.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(0, 1)).reshape(w.shape)


def packed(
    w: Floats,
    dtype: int,
    of_matrix: tuple[float, bool] = (0.75, False),
    of_lower: tuple[float, bool] | None = None,
) -> NDArray[np.generic]:
    """A matrix (n_out, n_in), n_in a multiple of 16, as the linear kernels read it.

    float32: panels of 64 outputs, outputs innermost. bfloat16: for every 16 outputs and 32 inputs
    the two fragments of mma.m16n8k16 of 32 lanes, where inputs 8 t to 8 t + 7 belong to the lanes
    with lane % 4 = t: in pairs, the first two to the first fragment, which takes them for its
    columns 2 t, 2 t + 1 and 2 t + 8, 2 t + 9. of_matrix, of_lower: as in `packed_nvfp4`.
    """
    n_out, n_in = round_up(w.shape[0], 64), w.shape[1] if dtype == F32 else round_up(w.shape[1], 32)
    if dtype == MXFP8:
        return packed_mxfp8(w)
    if dtype == NVFP4:
        return packed_nvfp4(w, (of_matrix, of_lower or of_matrix))
    full = np.zeros((n_out, n_in), np.float32)
    full[: w.shape[0], : w.shape[1]] = w
    if dtype == F32:
        return full.reshape(n_out // 64, 64, n_in).transpose(0, 2, 1).copy()
    # (tile, row half, g, step, t, fragment, column half, pair) -> what a lane reads in order
    parts = full.reshape(n_out // 16, 2, 8, n_in // 32, 4, 2, 2, 2)
    return encode(parts.transpose(0, 3, 5, 2, 4, 6, 1, 7).copy(), BF16)


def exponents(w: Floats) -> NDArray[np.int64]:
    """Of the powers of two of MXFP8, for every 32 columns: 448 is the largest code."""
    largest = np.abs(w).reshape(len(w), -1, 32).max(2)
    with np.errstate(divide="ignore"):
        found = np.ceil(np.log2(largest.astype(np.float64) / 448))
    return np.clip(found, -127, 127).astype(np.int64)


E4M3 = np.array([m * 2.0**-9 if m < 8 else (8 + m % 8) * 2.0 ** (m // 8 - 10) for m in range(127)])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def packed_mxfp8(w: Floats) -> NDArray[np.uint8]:
    """The same in MXFP8: by tiles of 16 outputs, codes and behind them the exponents.

    A lane's 16 bytes of a step: words by fragment and half of the outputs, the first pair of
    columns in bytes 0 and 2. Exponents by the warp that needs them: of four steps 8 apart.
    """
    n_steps = -(-w.shape[1] // 32)
    full = np.zeros((round_up(w.shape[0], 64), n_steps * 32), np.float32)
    full[: w.shape[0], : w.shape[1]] = w
    found = exponents(full)
    unit = full.astype(np.float64) / 2.0 ** np.repeat(found, 32, 1)
    nearest = np.abs(np.abs(unit)[..., None] - E4M3).argmin(-1)  # cases have no ties
    codes = (nearest + 128 * np.signbit(full)).astype(np.uint8)
    parts = codes.reshape(-1, 2, 8, n_steps, 4, 2, 2, 2).transpose(0, 3, 2, 4, 5, 1, 7, 6)
    padded = np.zeros((len(full), round_up(n_steps, 32)), np.uint8)
    padded[:, :n_steps] = found + 127
    of_warps = padded.reshape(len(full) // 16, 2, 8, -1, 4, 8).transpose(0, 3, 5, 2, 4, 1)
    n_tiles = len(full) // 16
    return np.concatenate([parts.reshape(n_tiles, -1), of_warps.reshape(n_tiles, -1)], 1)


def nvfp4(w: Floats, of_matrix: tuple[float, bool]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Codes and scales of numbers of the format whose largest in every 16 columns has code 6.

    of_matrix: the scale of the matrix, and whether it divides.
    """
    factor = 1 / of_matrix[0] if of_matrix[1] else of_matrix[0]
    groups = w.astype(np.float64).reshape(len(w), -1, 16)
    wanted = np.abs(groups).max(2) / 6 / abs(factor)
    scales = np.abs(wanted[..., None] - E4M3).argmin(-1)
    unit = groups / np.where(wanted == 0, 1, E4M3[scales] * factor)[..., None]
    codes = np.abs(np.abs(unit)[..., None] - E2M1).argmin(-1)
    assert (E2M1[codes] == np.abs(unit)).all()
    signed = codes + 8 * (unit < 0)
    return signed.reshape(w.shape).astype(np.uint8), scales.astype(np.uint8)


def packed_nvfp4(w: Floats, of_matrix: tuple[tuple[float, bool], ...]) -> NDArray[np.uint8]:
    """The same in NVFP4: by tiles of 16 outputs, codes, their scales, and the matrix's.

    A lane's 8 bytes of a step: eight columns of an output and of the one 8 further on, the first
    code in the low half of a byte. A tile ends in 32 bytes, of which two floats say of_matrix for
    its upper 8 outputs, and two for its lower ones.
    """
    n_steps = -(-w.shape[1] // 32)
    full = np.zeros((round_up(w.shape[0], 64), n_steps * 32), np.float32)
    full[: w.shape[0], : w.shape[1]] = w
    halves = full.reshape(-1, 2, 8, full.shape[1])
    of_halves = [nvfp4(halves[:, i].reshape(-1, full.shape[1]), of_matrix[i]) for i in range(2)]
    codes, scales = (
        np.stack([of[i].reshape(len(halves), 8, -1) for of in of_halves], 1) for i in range(2)
    )
    parts = codes.reshape(-1, 2, 8, n_steps, 4, 8).transpose(0, 3, 2, 4, 1, 5)
    of_groups = scales.reshape(-1, 2, 8, n_steps, 2).transpose(0, 3, 2, 4, 1)
    n_tiles = len(full) // 16
    end = np.zeros((n_tiles, 4, 2), np.float32)
    for i in range(2):
        end[: -(-(len(w) - 8 * i) // 16), i] = of_matrix[i]
    return np.concatenate(
        [
            (parts[..., ::2] | parts[..., 1::2] << 4).reshape(n_tiles, -1),
            of_groups.reshape(n_tiles, -1),
            end.reshape(n_tiles, -1).view(np.uint8),
        ],
        1,
    )


def key_panel(keys: Floats, dtype: int) -> NDArray[np.generic]:
    """Keys (64, n) of a block and head: (n, 64), or pairs of columns together in bfloat16."""
    if dtype == F32:
        return keys.T.copy()
    return encode(keys.reshape(BLOCK, -1, 2).transpose(1, 0, 2).copy(), BF16)


def value_panel(values: Floats, dtype: int) -> NDArray[np.generic]:
    """Values (64, n): as they are, or pairs of positions together in bfloat16."""
    if dtype == F32:
        return values.copy()
    return encode(values.reshape(BLOCK // 2, 2, -1).transpose(0, 2, 1).copy(), BF16)
