"""Cases of attention over int8 keys and values (kernels/attention_int8.cu).

The reference is the softmax in double precision over what the codes stand for. What is further off
than its roundings is the code of a weight: half of 1/255 of the largest of a block.
"""

from __future__ import annotations

from ctypes import Structure
from dataclasses import dataclass
from functools import partial

import numpy as np
from ptx.arguments import BLOCK, INT8, Segment, TapeView, decode
from ptx.cases_attention import (
    FORGOTTEN,
    LAYER_OFFSET,
    OVER_AN_EDGE,
    TWO_CHUNKS,
    WINDOW,
    Model,
    Stream,
    launch,
    pad_heads,
    softmax_rows,
)
from ptx.device import Case, Device, check_close
from ptx.kv_int8 import Coded, coded_keys, coded_values, codes_of, panel, scale_of


@dataclass
class CodedStream(Stream):
    """Its keys and values are what the codes stand for."""

    coded: tuple[Coded, Coded]

    def segment(self, device: Device, model: Model, dtype: int) -> Structure:
        """The struct; 0xFF lies wherever no row of it looks."""
        assert dtype == INT8
        oldest = max(self.position - model.window + 1, 0) if model.window else 0
        unseen = [(0, oldest // BLOCK * BLOCK), *self.forgotten]
        blocks = []
        for begin in range(0, self.keys.shape[1], BLOCK):
            is_held = not any(first <= begin < end for first, end in unseen)
            part = slice(begin, begin + (BLOCK if is_held else 0))
            for head in range(model.n_kv_heads):
                for half, coded in enumerate(self.coded):
                    of_block = Coded(
                        coded.codes[head, part], coded.scales[head, part], coded.numbers[head, part]
                    )
                    blocks.append(panel(of_block, is_value=bool(half)))
        tape = np.concatenate(blocks).reshape(-(-self.keys.shape[1] // BLOCK), -1)
        tape = np.pad(tape, ((0, 0), (LAYER_OFFSET, 0)))
        view = TapeView(device.put(tape), 2, 2 * tape.shape[1], tape.shape[1])
        holes = device.put(np.array(self.forgotten, np.int64).reshape(-1, 2))
        return Segment(
            self.row_begin, self.n_rows, self.position, view, view, TapeView(), holes,
            len(self.forgotten),
        )  # fmt: skip


def coded_stream(
    random: np.random.Generator, model: Model, row_begin: int, n_rows: int, position: int
) -> CodedStream:
    """Random keys and values up to its last row."""
    shape = (model.n_kv_heads, position + n_rows)
    keys = coded_keys(pad_heads(random, model, shape))
    values = coded_values(pad_heads(random, model, shape))
    holes = model.forgotten if row_begin == 0 else ()
    return CodedStream(
        row_begin, n_rows, position, keys.numbers, values.numbers, holes, (keys, values)
    )


def largest_weights(model: Model, stream: CodedStream, q: np.ndarray, r: np.ndarray,
                    bank: np.ndarray) -> np.ndarray:  # fmt: skip
    """(n_rows, n_heads, n): what half a code of a weight is worth, over all positions.

    By the softmax of a stream whose values are, for one block at a time, the units of its values.
    """
    units = np.exp2(decode(stream.coded[1].scales).astype(np.float64))
    total = np.zeros((stream.n_rows, model.n_heads, model.n))
    group = model.n_heads // model.n_kv_heads
    for begin in range(0, stream.keys.shape[1], BLOCK):
        part = slice(begin, begin + BLOCK)
        codes = np.abs(stream.coded[1].codes[:, part].astype(np.float64)).sum(1)
        largest = np.zeros((stream.n_rows, model.n_heads))
        for key in range(begin, min(begin + BLOCK, stream.keys.shape[1])):
            only = np.zeros_like(stream.values)
            only[:, key] = units[:, key, None]
            shares, _ = softmax_rows(
                model,
                Stream(stream.row_begin, stream.n_rows, stream.position, stream.keys, only,
                       stream.forgotten),
                q, r, bank,
            )  # fmt: skip
            largest = np.maximum(largest, shares[..., 0])
        total += largest[..., None] * np.repeat(codes, group, 0)[None]
    return total * 0.5 / 255


def attend(device: Device, model: Model, position: int, n_rows: int, group_tiles: int) -> None:
    """Two streams in one launch, in parts."""
    random = np.random.default_rng(16)
    streams = [
        coded_stream(random, model, 0, n_rows, position),
        coded_stream(random, model, n_rows, 3, 2),
    ]
    n_all = n_rows + 3
    q = 3 * pad_heads(random, model, (n_all, model.n_heads))
    r = random.normal(size=(n_all, model.n_heads, model.d_rel)).astype(np.float32)
    bank = np.zeros((model.d_rel, -(-(model.extent + 2 * BLOCK) // 16) * 16), np.float32)
    bank[:, BLOCK : BLOCK + model.extent] = random.normal(size=(model.d_rel, model.extent))
    out = launch(device, INT8, model, list(streams), (q, r, bank), group_tiles)
    found = device.read(out).reshape(n_all, model.n_heads, model.n)
    scale = scale_of(q)
    exact = codes_of(q, scale) * scale[..., None]
    for stream in streams:
        rows = slice(stream.row_begin, stream.row_begin + stream.n_rows)
        expected, size = softmax_rows(model, stream, exact[rows], r[rows], bank)
        codes = largest_weights(model, stream, exact[rows], r[rows], bank)
        # Powers of two to 2e-5, of a weight, of its block and of the sum; scores to a few units.
        check_close(found[rows], expected, codes * 1.001 + size * 2e-4 + 1e-37)


CASES: dict[str, Case] = {
    "attention_int8": partial(attend, model=OVER_AN_EDGE, position=61, n_rows=5, group_tiles=2),
    "attention_int8_window": partial(attend, model=WINDOW, position=190, n_rows=4, group_tiles=1),
    "attention_int8_forgotten": partial(
        attend, model=FORGOTTEN, position=318, n_rows=4, group_tiles=2
    ),
    "attention_int8_chunks": partial(
        attend, model=TWO_CHUNKS, position=127, n_rows=2, group_tiles=1
    ),
}
