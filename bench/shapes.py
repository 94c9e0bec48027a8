"""The model shapes that are measured, and what one pass over each consists of.

S and M have the matrices of Qwen3 models (M: of Qwen3-0.6B), so that other engines can run models
of equal size; MOE is an Inkling in small. Weights are random: time does not depend on their values.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from bench.native import Bits, FloorOp
from duplex_engine.models.random import Preset, write_random_checkpoint

DEFAULT_CACHE = Path("out/bench")
ShapeName: TypeAlias = Literal["S", "M", "MOE"]  # the keys of SHAPES
BYTES_PER_WEIGHT: dict[Bits, float] = {"bf16": 2, "int8": 1, "int4": 0.5}  # without scales
KV_BYTES = 2  # of one key or value: bfloat16
KV_SCALE_BYTES = 2  # int8: beside the d_head bytes of a key or value


@dataclass(frozen=True, slots=True)
class Shape:
    """One model to measure; `preset` is an Inkling's config, the properties are what it reads."""

    name: str
    preset: Preset

    @property
    def layers(self) -> list[str]:
        """A word per layer, as in `Preset.layers`."""
        return self.preset.layers.split()

    @property
    def is_moe(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return bool(self.preset.moe)

    @property
    def attention_matrices(self) -> list[tuple[int, int]]:
        """(n_out, n_in) of q, k, v and r together, then of o. All kinds of layer have one shape."""
        p = self.preset
        (heads, kv_heads), d_attention = p.heads, p.heads[0] * p.d_head
        n_out = (heads + 2 * kv_heads) * p.d_head + heads * p.d_rel
        return [(n_out, p.d_model), (p.d_model, d_attention)]

    def mlp_matrices(self, word: str) -> list[tuple[int, int]]:
        """(n_out, n_in) of one layer's gate and up together and down; of experts: the router, then
        every expert's two, the shared ones last."""
        d, moe = self.preset.d_model, self.preset.moe
        if word[1] == "d":
            return [(2 * self.preset.d_ff, d), (d, self.preset.d_ff)]
        n_experts = moe["n_routed_experts"] + moe["n_shared_experts"]
        d_ff = moe["moe_intermediate_size"]
        return [(n_experts, d), *([(2 * d_ff, d), (d, d_ff)] * n_experts)]

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Every weight matrix, layer by layer, the head last."""
        found = []
        for word in self.layers:
            found += self.attention_matrices + self.mlp_matrices(word)
        return [*found, (self.preset.vocab_size, self.preset.d_model)]

    def cache_bytes(self, word: str, context: int, kv: str = "bf16") -> int:
        """Keys and values that one layer reads; `kv` is their format, bf16 or int8."""
        seen = context if word[0] == "g" else min(context, self.preset.window)
        d_head = self.preset.d_head
        of_head = d_head + KV_SCALE_BYTES if kv == "int8" else d_head * KV_BYTES
        return 2 * self.preset.heads[1] * of_head * seen

    def all_cache_bytes(self, context: int, kv: str = "bf16") -> int:
        """Keys and values that a pass reads."""
        return sum(self.cache_bytes(word, context, kv) for word in self.layers)

    def tape_bytes(self, max_positions: int) -> int:
        """What a session of that length needs at most: tapes of all layers, convolutions."""
        d_kv = self.preset.heads[1] * self.preset.d_head
        conv = 4 * (2 * d_kv + 2 * self.preset.d_model) * len(self.layers) * 1024
        return 2 * d_kv * KV_BYTES * len(self.layers) * max_positions + conv

    def ops(
        self, rows: int, context: int, rng: np.random.Generator, kv: str = "bf16"
    ) -> list[FloorOp]:
        """One pass of `rows` rows behind `context` others; the head for the last row alone."""
        ops: list[FloorOp] = []
        first, phase = 0, 0

        def add(*work: tuple[int, int]) -> None:
            nonlocal phase
            ops.extend(FloorOp(matrix, n, phase) for matrix, n in work)
            phase += 1

        for word in self.layers:
            add((first, rows))
            add((-1, self.cache_bytes(word, context, kv)))
            add((first + 1, rows))
            mlp = first + 2
            if word[1] == "d":
                add((mlp, rows))
                add((mlp + 1, rows))
            else:
                add((mlp, rows))
                busy = self._routed(rows, rng)
                add(*((mlp + 1 + 2 * expert, n) for expert, n in busy))
                add(*((mlp + 2 + 2 * expert, n) for expert, n in busy))
            first = mlp + len(self.mlp_matrices(word))
        add((first, 1))
        return ops

    def _routed(self, rows: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """(expert, its rows), with every choice equally likely, as random routers choose."""
        moe = self.preset.moe
        n, top_k = moe["n_routed_experts"], moe["num_experts_per_tok"]
        chosen = np.concatenate([rng.choice(n, top_k, replace=False) for _ in range(rows)])
        busy = [
            (int(expert), int(count))
            for expert, count in zip(*np.unique(chosen, return_counts=True), strict=True)
        ]
        return busy + [(n + shared, rows) for shared in range(moe["n_shared_experts"])]

    def bytes_read(self, ops: list[FloorOp], bits: Bits) -> float:
        """By one pass: weights once, and the cache."""
        matrices = self.matrices
        weights = sum(
            matrices[op.matrix][0] * matrices[op.matrix][1] for op in ops if op.matrix >= 0
        )
        return weights * BYTES_PER_WEIGHT[bits] + sum(op.rows for op in ops if op.matrix < 0)

    def checkpoint(self, cache: Path = DEFAULT_CACHE) -> Path:
        """The folder of its checkpoint, written on first use; the preset is kept beside it, so a
        changed shape is written again."""
        folder, note = cache / self.name, cache / self.name / "preset.json"
        described = json.dumps(asdict(self.preset))
        if not note.exists() or note.read_text() != described:
            write_random_checkpoint(folder, self.preset, dtype="bfloat16", interaction=False)
            note.write_text(described)
        return folder


def _preset(
    vocab_size: int,
    d_model: int,
    d_ff: int,
    layers: str,
    heads: tuple[int, int],
    d_head: int,
    **moe: int,
) -> Preset:
    return Preset(
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=d_ff,
        layers=layers,
        heads=heads,
        local_heads=heads,
        d_head=d_head,
        d_rel=16,
        rel_extent=1024,
        window=512,
        patch_size=40,
        vision_layers=4,
        moe=moe,
    )


# 26 M weights in a pass: they fit the last-level cache of a server, in int8 that of a laptop.
S = Shape("S", _preset(4096, 512, 1408, " ".join(["gd"] * 8), (8, 4), 64))
# 596 M weights: Qwen3-0.6B.
M = Shape("M", _preset(151_936, 1024, 3072, " ".join(["gd"] * 28), (16, 8), 128))
# 1.1 G weights, of which a row uses 0.2 G: an Inkling, every sixth layer global.
MOE = Shape(
    "MOE",
    _preset(
        32_768,
        1024,
        4096,
        "ld ld lm lm lm gm lm lm lm lm lm gm",
        (16, 4),
        128,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        moe_intermediate_size=512,
    ),
)
SHAPES = {shape.name: shape for shape in (S, M, MOE)}
