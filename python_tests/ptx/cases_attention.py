"""Cases of attention over the tape (kernels/attention{,_bf16,_int8}.cu)."""

from __future__ import annotations

from ctypes import Structure
from dataclasses import dataclass
from functools import partial

import numpy as np
from ptx.arguments import (
    BF16,
    BLOCK,
    F32,
    INT8,
    Attention,
    AttentionLaunch,
    Floats,
    Segment,
    Segments,
    Shape,
    TapeView,
    key_panel,
    pad,
    rounded,
    value_panel,
)
from ptx.device import BF16_UNIT, UNIT, Device, both, check_close

VECTORS = 8  # of a tile
LAYER_OFFSET = 128
FLOOR, ALPHA = 90, 0.4
PART = 128  # positions, in bfloat16 and int8
STRANDS = 8  # that add up parts


@dataclass(frozen=True)
class Model:
    """What two streams share."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    extent: int
    window: int
    d_rel: int
    forgotten: tuple[tuple[int, int], ...] = ()  # of the first stream

    @property
    def n(self) -> int:
        """Of a head, padded."""
        return -(-self.d_head // 16) * 16


@dataclass
class Stream:
    """Keys and values of one sequence, and the rows that look at them."""

    row_begin: int
    n_rows: int
    position: int
    keys: Floats  # (kv_heads, positions, n)
    values: Floats
    forgotten: tuple[tuple[int, int], ...]

    def is_visible(self, key: int, position: int, window: int) -> bool:
        """Whether the row at a position sees a key."""
        if window == 0 and any(begin <= key < end for begin, end in self.forgotten):
            return False
        return key <= position and (window == 0 or position - key < window)

    def segment(self, device: Device, model: Model, dtype: int) -> Structure:
        """The struct; NaN lies wherever no row of it looks."""
        n_blocks = -(-self.keys.shape[1] // BLOCK)
        shape = (model.n_kv_heads, n_blocks * BLOCK, model.n)
        keys, values = np.full((2, *shape), np.nan, np.float32)
        keys[:, : self.keys.shape[1]], values[:, : self.keys.shape[1]] = self.keys, self.values
        if self.keys.shape[1] % 2:  # the partner of the newest value
            values[:, self.keys.shape[1]] = 0
        oldest = max(self.position - model.window + 1, 0) if model.window else 0
        unseen = [(0, oldest // BLOCK * BLOCK), *self.forgotten]
        for begin, end in unseen:
            keys[:, begin:end] = values[:, begin:end] = np.nan
        blocks = []
        for block in range(n_blocks):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            for head in range(model.n_kv_heads):
                blocks += [
                    key_panel(keys[head, part], dtype),
                    value_panel(values[head, part], dtype),
                ]
        panels = np.concatenate([x.reshape(-1) for x in blocks]).reshape(n_blocks, -1)
        tape = np.pad(panels, ((0, 0), (LAYER_OFFSET // panels.itemsize, 0)))
        stride = tape.shape[1] * tape.itemsize
        view = TapeView(device.put(tape), 2, 2 * stride, stride)
        holes = device.put(np.array(self.forgotten, np.int64).reshape(-1, 2))
        return Segment(
            self.row_begin, self.n_rows, self.position, view, view, TapeView(), holes,
            len(self.forgotten),
        )  # fmt: skip


def softmax_rows(
    model: Model, stream: Stream, q: Floats, r: Floats, bank: Floats
) -> tuple[np.ndarray, np.ndarray]:
    """Results (n_rows, n_heads, n) in double precision, and the sums of the magnitudes."""
    out = np.zeros((stream.n_rows, model.n_heads, model.n))
    size = np.zeros_like(out)
    for i in range(stream.n_rows):
        position = stream.position + i
        seen = [
            key for key in range(position + 1) if stream.is_visible(key, position, model.window)
        ]
        distance = position - np.array(seen)
        tau = 1.0
        if model.window == 0:
            tau += ALPHA * np.log(max((position + 1) / FLOOR, 1))
        for head in range(model.n_heads):
            kv = head // (model.n_heads // model.n_kv_heads)
            score = stream.keys[kv, seen].astype(np.float64) @ q[i, head] / model.d_head
            in_reach = distance < model.extent
            column = BLOCK + model.extent - 1 - distance[in_reach]
            score[in_reach] += tau * (r[i, head].astype(np.float64) @ bank[:, column])
            weight = np.exp(score - score.max())
            weight /= weight.sum()
            out[i, head] = weight @ stream.values[kv, seen].astype(np.float64)
            size[i, head] = weight @ np.abs(stream.values[kv, seen].astype(np.float64))
    return out, size


def attend(
    device: Device, dtype: int, model: Model, position: int, n_rows: int, group_tiles: int
) -> None:
    """Two streams in one launch; in bfloat16 in parts, which are then combined."""
    random = np.random.default_rng(15)
    streams, begin = [], 0
    for count, at, holes in ((n_rows, position, model.forgotten), (3, 2, ())):
        keys, values = (
            rounded(pad_heads(random, model, (model.n_kv_heads, at + count)), dtype)
            for _ in range(2)
        )
        streams.append(Stream(begin, count, at, keys, values, holes))
        begin += count
    q = rounded(3 * pad_heads(random, model, (begin, model.n_heads)), dtype)
    r = random.normal(size=(begin, model.n_heads, model.d_rel)).astype(np.float32)
    bank = np.zeros((model.d_rel, -(-(model.extent + 2 * BLOCK) // 16) * 16), np.float32)
    bank[:, BLOCK : BLOCK + model.extent] = random.normal(size=(model.d_rel, model.extent))
    out = launch(device, dtype, model, streams, (q, r, bank), group_tiles)
    found = device.read(out).reshape(begin, model.n_heads, model.n)
    for stream in streams:
        rows = slice(stream.row_begin, stream.row_begin + stream.n_rows)
        expected, size = softmax_rows(model, stream, q[rows], r[rows], bank)
        # Scores up to about 30, off by a unit a step; bfloat16 weights and results are rounded.
        error = 60 * (model.n + model.d_rel + 6) * UNIT + 3 * stream.keys.shape[1] * UNIT
        bound = size * (error + (BF16_UNIT if dtype == BF16 else 0))
        bound += (BF16_UNIT if dtype == BF16 else 0) * np.abs(expected) + 1e-37
        check_close(found[rows], expected, bound)


def pad_heads(random: np.random.Generator, model: Model, shape: tuple[int, int]) -> Floats:
    """Random heads, zero behind their true width."""
    x = np.zeros((*shape, model.n), np.float32)
    x[..., : model.d_head] = random.normal(size=(*shape, model.d_head))
    return x


def launch(
    device: Device,
    dtype: int,
    model: Model,
    streams: list[Stream],
    inputs: tuple[Floats, Floats, Floats],
    group_tiles: int,
) -> Structure:
    """As launch_attention() does; returns the rows of results."""
    q, r, bank = inputs
    group = model.n_heads // model.n_kv_heads
    n_rows = sum(s.n_rows for s in streams)
    group_tiles = 1 if dtype == F32 else group_tiles
    n_groups = sum(-(-s.n_rows * group // (VECTORS * group_tiles)) for s in streams)
    n_parts = 1
    if dtype != F32:
        n_parts = max((s.position + s.n_rows - 1) // PART + 1 for s in streams)
    n_all = n_groups * group_tiles * model.n_kv_heads * n_parts
    of_vector = 2 * (model.n + 20) if dtype == INT8 else model.n + 2
    sums = device.out(np.full((n_all, VECTORS * of_vector), np.nan, np.float32))
    segments = (Segment * len(streams))(*[s.segment(device, model, dtype) for s in streams])
    rows = q.reshape(n_rows, -1)
    rows_dtype = BF16 if dtype == BF16 else F32
    out = device.out_rows(n_rows, rows.shape[1], rows_dtype)
    args = Attention(
        Segments(device.put(np.frombuffer(segments, np.uint8)), len(streams), n_rows),
        Shape(model.n_heads, model.n_kv_heads, model.d_head, model.extent, model.window),
        model.n, model.d_rel, device.rows(pad(rows, rows.shape[1] + 8), rows_dtype),
        device.put_late(r), model.n_heads * model.d_rel, device.put(bank), bank.shape[1],
        model.window > 0, FLOOR, ALPHA, LAYER_OFFSET, dtype, out,
    )  # fmt: skip
    rows_of_group = (group_tiles * VECTORS - 1) // group + 2
    bank_width = (PART + rows_of_group + 6) // 4 * 4
    has_sums = n_parts > 1 or dtype == INT8
    whole = AttentionLaunch(args, 0, group_tiles, n_parts, bank_width, sums if has_sums else 0)
    numbers = 4 * len(streams)
    if dtype == F32:
        shared = (2 * BLOCK * model.n + VECTORS * (2 * model.n + BLOCK + model.d_rel + 2)) * 4
        grid = (n_groups, model.n_kv_heads)
        device.launch("attention/attention_kernel", grid, 256, shared + numbers, whole)
        return out
    parts = (n_groups, model.n_kv_heads, n_parts)
    vectors = (n_groups, model.n_kv_heads, group_tiles * VECTORS)
    biases = model.d_rel * bank_width * 4
    if dtype == INT8:
        codes = -(-model.n // 128) * 128 + 64 + PART + 64  # of a query, of weights
        shared = biases + VECTORS * (2 * (PART + 4) * 4 + codes) + numbers
        device.launch("attention_int8/attention_int8_kernel", parts, 256, shared, whole)
        shared = (model.n + 16) * 4 + numbers
        device.launch("attention_int8/combine_kernel", vectors, 256, shared, whole)
        return out
    shared = 2 * VECTORS * (PART + 4 + model.n + 4 + 1) * 4 + VECTORS * (PART + 32) * 2
    shared += biases + numbers
    device.launch("attention_bf16/attention_bf16_kernel", parts, 256, shared, whole)
    if n_parts > 1:
        shared = STRANDS * (model.n + 4) * 4
        device.launch("attention_bf16/combine_kernel", vectors, 256, shared + numbers, whole)
        args.out = device.out_rows(n_rows, rows.shape[1], rows_dtype)
        many = AttentionLaunch(args, 0, group_tiles, n_parts, bank_width, sums)
        tiles = (n_groups, model.n_kv_heads, group_tiles)
        device.launch("attention_bf16/combine_many_kernel", tiles, 256, numbers, many)
        assert (device.read(args.out) == device.read(out)).all()
    return out


OVER_AN_EDGE = Model(n_heads=6, n_kv_heads=2, d_head=12, extent=100, window=0, d_rel=3)
WINDOW = Model(n_heads=4, n_kv_heads=2, d_head=20, extent=70, window=70, d_rel=2)
FORGOTTEN = Model(
    n_heads=3, n_kv_heads=1, d_head=16, extent=33, window=0, d_rel=2, forgotten=((64, 256),)
)
TWO_CHUNKS = Model(n_heads=2, n_kv_heads=1, d_head=144, extent=70, window=0, d_rel=2)
CASES = {
    **both("attention", attend, model=OVER_AN_EDGE, position=61, n_rows=5, group_tiles=2),
    **both("attention_window", attend, model=WINDOW, position=190, n_rows=4, group_tiles=1),
    **both("attention_forgotten", attend, model=FORGOTTEN, position=318, n_rows=4, group_tiles=2),
    "attention_chunks-bfloat16": partial(
        attend, dtype=BF16, model=TWO_CHUNKS, position=127, n_rows=2, group_tiles=1
    ),
}
