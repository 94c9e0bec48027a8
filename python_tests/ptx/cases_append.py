"""Cases of the kernels that write the tapes (kernels/append.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from ptx.arguments import (
    BF16,
    BLOCK,
    F32,
    INT8,
    ConvAddNorm,
    ConvSlot,
    Floats,
    KvAppend,
    Parts,
    Segment,
    Segments,
    Shape,
    TapeView,
    decode,
    key_panel,
    pad,
    value_panel,
)
from ptx.cases_rows import EPS, norm_bound, norm_shape, rms_norm
from ptx.device import BF16_UNIT, UNIT, Device, both, check_close
from ptx.kv_int8 import SCALES, key_places, value_places

KERNEL = 4  # taps of a convolution
CONV_FLOATS = 160  # of a block of the convolution tape
FLOOR, ALPHA = 5, 0.4


def wide(x: Floats) -> np.ndarray:
    """In double precision."""
    return x.astype(np.float64)


@dataclass
class Stream:
    """Rows of one sequence in a batch, and the inputs that its convolutions had before."""

    row_begin: int
    n_rows: int
    position: int
    conv: Floats  # (positions, CONV_FLOATS)
    conv_address: int = 0

    def segment(self, device: Device, kv: TapeView) -> Segment:  # type: ignore[valid-type]
        """The struct; the tape lies in pages of three blocks, with a gap behind each."""
        paged = np.full((-(-len(self.conv) // 3), 3 * CONV_FLOATS + 32), np.nan, np.float32)
        for p, row in enumerate(self.conv):
            paged[p // 3, p % 3 * CONV_FLOATS : (p % 3 + 1) * CONV_FLOATS] = row
        self.conv_address = device.out(paged)
        conv = TapeView(self.conv_address, 3, paged.shape[1] * 4, CONV_FLOATS * 4)
        return Segment(self.row_begin, self.n_rows, self.position, kv, kv, conv, 0, 0)

    def conv_after(self, device: Device) -> Floats:
        """The convolution tape now."""
        paged = device.get(self.conv_address)[:, : 3 * CONV_FLOATS]
        return decode(paged.reshape(-1, CONV_FLOATS))[: len(self.conv)]

    def convolve(self, x: Floats, weight: Floats, begin: int) -> np.ndarray:
        """The inputs plus their convolution with what lies at `begin` of the tape before them."""
        width = x.shape[1]
        before = np.zeros((KERNEL - 1, width), np.float32)
        for back in range(1, KERNEL):
            if self.position - back >= 0:
                before[-back] = self.conv[self.position - back, begin : begin + width]
        rows = wide(np.concatenate([before, x]))
        return wide(x) + sum(rows[j : j + len(x)] * weight[j] for j in range(KERNEL))


def streams(random: np.random.Generator, positions: tuple[int, int]) -> list[Stream]:
    """Four rows of one and two of another; the tape ends where the rows do."""
    found = []
    for begin, n_rows, position in ((0, 4, positions[0]), (4, 2, positions[1])):
        conv = np.full((position + n_rows, CONV_FLOATS), np.nan, np.float32)
        conv[:position] = random.normal(size=(position, CONV_FLOATS))
        found.append(Stream(begin, n_rows, position, conv))
    return found


def conv_add_norm(device: Device, dtype: int, n_parts: int) -> None:
    """Two streams, one from its first position on."""
    random = np.random.default_rng(13)
    width, padded, offset, scale = 40, 48, 32, 0.75
    both_streams = streams(random, (0, 2))
    parts = random.normal(size=(n_parts, 6, width)).astype(np.float32)
    x = parts[0]
    for part in parts[1:]:
        x = x + part
    hidden = random.normal(size=(6, width)).astype(np.float32)
    weight = random.normal(size=(KERNEL, width)).astype(np.float32)
    norm = random.normal(size=width).astype(np.float32)
    none = TapeView(0, 1, 0, 0)
    segments = (Segment * 2)(*[s.segment(device, none) for s in both_streams])
    there = device.out(pad(hidden, padded + 16))
    out = device.out_rows(6, padded, dtype)
    args = ConvAddNorm(
        Segments(device.put(np.frombuffer(segments, np.uint8)), 2, 6),
        Parts(*[device.put_late(pad(part, padded)) for part in parts]), n_parts, padded, scale,
        ConvSlot(device.put(pad(weight, padded)), offset * 4, padded), KERNEL, there,
        padded + 16, device.put(pad(norm[None], padded)), EPS, width, out,
    )  # fmt: skip
    n_threads, shared = norm_shape(width)
    shared += (KERNEL + 2) * 8
    name = f"append/conv_add_norm_kernel<{int(n_parts > 1)}>"
    device.launch(name, (6,), n_threads, shared, args)
    scaled = x * np.float32(scale)
    sums = np.concatenate(
        [
            hidden[s.row_begin :][: s.n_rows]
            + s.convolve(scaled[s.row_begin :][: s.n_rows], weight, offset)
            for s in both_streams
        ]
    )
    # Sums of six terms of either sign, each up to about 10.
    check_close(device.get(there)[:, :width], sums, 12 * 10 * UNIT)
    normed = rms_norm(sums, norm)
    error = 12 * 10 * UNIT * np.abs(normed / sums) + norm_bound(normed, padded, dtype)
    check_close(device.read(out)[:, :width], normed, 2 * error + 1e-5 * np.abs(norm))
    for s in both_streams:
        after = s.conv_after(device)[s.position :, offset : offset + width]
        assert (after == scaled[s.row_begin :][: s.n_rows]).all()


def kv_append(device: Device, dtype: int, *, is_local: bool) -> None:
    """Keys, values and queries of two streams; one goes over the edge of a block."""
    random = np.random.default_rng(14)
    heads, kv_heads, d_head, n, layer_offset = 4, 2, 12, 16, 128
    k_offset, v_offset = 16, 80
    both_streams = streams(random, (62, 0))
    width = (heads + 2 * kv_heads) * n
    qkv = random.normal(size=(6, width)).astype(np.float32)
    qkv.reshape(6, -1, n)[:, :, d_head:] = 0
    k_conv, v_conv = np.zeros((2, KERNEL, kv_heads, n), np.float32)
    for weight in (k_conv, v_conv):
        weight[..., :d_head] = random.normal(size=(KERNEL, kv_heads, d_head))
    q_norm, k_norm = pad(random.normal(size=(2, d_head)).astype(np.float32), n)
    rows_dtype = BF16 if dtype == BF16 else F32
    panel = SCALES + n * BLOCK if dtype == INT8 else n * BLOCK * (4 if dtype == F32 else 2)
    block_bytes = layer_offset + kv_heads * 2 * panel
    element = {F32: "f4", BF16: "u2", INT8: "u1"}[dtype]
    kv = [device.out(np.full((2, block_bytes), 0xFF, np.uint8).view(element)) for _ in both_streams]
    segments = (Segment * 2)(
        *[
            s.segment(device, TapeView(at, 1, block_bytes, block_bytes))
            for s, at in zip(both_streams, kv, strict=True)
        ]
    )
    q_out = device.out_rows(6, heads * n, rows_dtype)
    args = KvAppend(
        Segments(device.put(np.frombuffer(segments, np.uint8)), 2, 6),
        Shape(heads, kv_heads, d_head, 1, 64 if is_local else 0), n,
        device.put_late(pad(qkv, width + 8)), width + 8,
        ConvSlot(device.put(k_conv), k_offset * 4, kv_heads * n),
        ConvSlot(device.put(v_conv), v_offset * 4, kv_heads * n), KERNEL, device.put(q_norm),
        device.put(k_norm), EPS, is_local, FLOOR, ALPHA, layer_offset, dtype, q_out,
    )  # fmt: skip
    n_threads, shared = norm_shape(n)
    shared += (KERNEL + 2) * 8
    device.launch("append/kv_append_kernel", (6, 2 * kv_heads + heads), n_threads, shared, args)
    q = rms_norm(qkv.reshape(6, -1, n)[:, :heads, :d_head], q_norm[:d_head])
    positions = np.concatenate([s.position + np.arange(s.n_rows) for s in both_streams])
    if not is_local:
        q *= (1 + ALPHA * np.log(np.maximum((positions + 1) / FLOOR, 1)))[:, None, None]
    found = device.read(q_out).reshape(6, heads, n)
    unit = BF16_UNIT if dtype == BF16 else 0
    check_close(found[..., :d_head], q, np.abs(q) * (24 * UNIT + unit))
    for s, at in zip(both_streams, kv, strict=True):
        rows = qkv[s.row_begin :][: s.n_rows].reshape(s.n_rows, -1, n)
        check = check_codes if dtype == INT8 else check_tape
        check(device, s, at, rows, (k_conv, v_conv, k_norm), (heads, kv_heads, d_head), dtype)


def keys_and_values(
    stream: Stream,
    rows: Floats,
    weights: tuple[Floats, Floats, Floats],
    shape: tuple[int, int, int],
    head: int,
    conv: Floats,
) -> tuple[np.ndarray, np.ndarray]:
    """What a head appends, in double precision; its inputs lie on the convolution tape."""
    heads, kv_heads, d_head = shape
    k_conv, v_conv, k_norm = weights
    n = rows.shape[2]
    inputs = rows[:, heads + head], rows[:, heads + kv_heads + head]
    assert (conv[:, 16 + head * n :][:, :n] == inputs[0]).all()
    assert (conv[:, 80 + head * n :][:, :n] == inputs[1]).all()
    keys = stream.convolve(inputs[0], k_conv[:, head], 16 + head * n)
    keys = np.pad(rms_norm(keys[:, :d_head], k_norm[:d_head]), ((0, 0), (0, n - d_head)))
    return keys, stream.convolve(inputs[1], v_conv[:, head], 80 + head * n)


def check_codes(
    device: Device,
    stream: Stream,
    address: int,
    rows: Floats,
    weights: tuple[Floats, Floats, Floats],
    shape: tuple[int, int, int],
    dtype: int,
) -> None:
    """The same of int8 codes: no further off than half a code, by scales that are large enough and
    no larger than bfloat16 asks for."""
    assert dtype == INT8
    n = rows.shape[2]
    stored = device.get(address).view(np.uint8)
    conv = stream.conv_after(device)[stream.position :]
    touched = np.zeros(stored.shape, np.bool_)
    for head in range(shape[1]):
        for half, wanted in enumerate(keys_and_values(stream, rows, weights, shape, head, conv)):
            places = value_places(n) if half else key_places(n)
            at = 128 + (2 * head + half) * (SCALES + BLOCK * n)
            for number, row in enumerate(wanted, stream.position):
                block, slot = divmod(number, BLOCK)
                scale_at = at + 2 * slot + np.arange(2)
                code_at = at + SCALES + places[slot]
                scale = float(decode(stored[block, scale_at].view(np.uint16))[0])
                codes = stored[block, code_at] ^ np.uint8(0 if half else 0x80)
                unit = 2.0**scale if half else scale
                off = np.abs(row) * 40 * UNIT + 12 * 10 * UNIT
                check_close(codes.view(np.int8) * unit, row, unit / 2 * (1 + 1e-4) + off)
                exact = np.abs(row).max() / 127
                coarse = 2.0 ** (abs(scale) / 128) if half else 1 + 1 / 128
                assert exact * (1 - 1e-5) <= unit <= exact * coarse * (1 + 1e-5)
                touched[block, scale_at] = touched[block, code_at] = True
    assert (stored[~touched] == 0xFF).all()


def check_tape(
    device: Device,
    stream: Stream,
    address: int,
    rows: Floats,
    weights: tuple[Floats, Floats, Floats],
    shape: tuple[int, int, int],
    dtype: int,
) -> None:
    """The new keys and values lie where they should, and nothing else was written."""
    n = rows.shape[2]
    stored = device.get(address)
    conv = stream.conv_after(device)[stream.position :]
    begin = 128 // stored.itemsize
    touched = np.zeros(stored.shape, np.bool_)
    for head in range(shape[1]):
        keys, values = keys_and_values(stream, rows, weights, shape, head, conv)
        for half, (expected, layout) in enumerate(((keys, key_panel), (values, value_panel))):
            at = begin + (2 * head + half) * n * BLOCK
            tape = np.zeros((2 * BLOCK, n), np.float32)
            tape[stream.position :][: stream.n_rows] = expected
            is_new = np.zeros((2 * BLOCK, n), np.float32)
            end = stream.position + stream.n_rows
            # In bfloat16 the newest value clears its partner's place.
            clears = half == 1 and dtype == BF16 and end % 2 == 1
            is_new[stream.position : end + clears] = 1
            for block in range(2):
                part = slice(block * BLOCK, (block + 1) * BLOCK)
                mask = layout(is_new[part], dtype).reshape(-1) != 0
                wanted = wide(decode(layout(tape[part], dtype).reshape(-1)))[mask]
                piece = slice(at, at + n * BLOCK)
                unit = 2 * BF16_UNIT if dtype == BF16 else 0
                bound = np.abs(wanted) * (40 * UNIT + unit) + 12 * 10 * UNIT
                check_close(decode(stored[block, piece])[mask], wanted, bound)
                touched[block, piece] |= mask
    untouched = stored[~touched]
    assert (np.isnan(untouched) if dtype == F32 else untouched == 0xFFFF).all()


CASES = {
    **both("conv_add_norm", conv_add_norm, n_parts=1),
    **both("conv_add_norm_of_parts", conv_add_norm, n_parts=3),
    **both("kv_append_global", kv_append, is_local=False),
    **both("kv_append_local", kv_append, is_local=True),
    "kv_append-int8": partial(kv_append, dtype=INT8, is_local=False),
}
