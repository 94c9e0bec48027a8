"""What a pass consists of: each operation's bytes, arithmetic and launches, from the sizes alone.

Mirrors the engine: the operations and their order are those of `csrc/model/inkling.cpp`, the
weights those of `csrc/model/weights.cpp`, the launches those of `csrc/backend/cuda/`. Owns no
times: what an operation takes on some machine says `prediction.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from duplex_engine.config import ModelConfig, TextConfig
from duplex_engine.core_config import vision_stages

__all__ = [
    "FORMATS",
    "HEAD_ROWS",
    "INKLING",
    "INKLING_SMALL",
    "RECIPES",
    "TURNS",
    "Format",
    "Op",
    "Pass",
    "Recipe",
    "Turn",
    "arena_bytes",
    "pass_work",
    "session_bytes",
    "touched_experts",
    "weight_bytes",
]

Kind: TypeAlias = Literal["weights", "attention", "rows", "all-reduce", "encoders", "head"]

PANEL = 64  # outputs of a packed matrix are padded to it, kPanelOutputs
COLUMNS = 16  # inputs, head widths and vectors are padded to it, kColumnAlign
BLOCK = 64  # positions of a block of the tape, kBlockPositions
# Of our CUDA kernels: positions and tiles of query vectors that a thread block of the attention has
# at most, what is multiplied together, and the most rows of a product that takes no squares.
PART = 128
GROUP_TILES = 4
TILE = 8  # query vectors, or rows of a product
FEW_ROWS = 64
EXPERT_ROWS = 256  # of one launch of the experts
HEAD_ROWS = 16  # that the head multiplies at once
ALIGN_BYTES = 64  # parts of the arena begin at multiples of it
REDUCED_BYTES = 2  # of a value on its way through an all-reduce: bfloat16


@dataclass(frozen=True, slots=True)
class Format:
    """How a weight is stored: bytes of its code, and how many share a scale of how many bytes."""

    name: str
    code_bytes: float
    group: int = 1
    scale_bytes: int = 0

    def bytes(self, n_out: float, n_in: int) -> float:
        """Of a matrix, scales included."""
        return n_out * (n_in * self.code_bytes + math.ceil(n_in / self.group) * self.scale_bytes)


FORMATS = {
    format.name: format
    for format in (
        Format("float32", 4),
        Format("bfloat16", 2),
        Format("fp8", 1),
        Format("mxfp8", 1, 32, 1),
        Format("nvfp4", 0.5, 16, 1),
        Format("int8", 1, 64, 2),
        Format("int4", 0.5, 32, 2),
    )
}


class Recipe(NamedTuple):
    """The format of each kind of matrix. The router is float32 in all of them."""

    attention: Format
    dense: Format
    experts: Format  # those that a router chooses
    shared: Format  # those that every row takes
    head: Format


def _recipe(others: str, experts: str | None = None) -> Recipe:
    one = FORMATS[others]
    return Recipe(one, one, FORMATS[experts or others], one, one)


RECIPES = {
    "float32": _recipe("float32"),
    "bfloat16": _recipe("bfloat16"),
    "fp8": _recipe("fp8"),
    "mxfp8": _recipe("mxfp8"),
    # Routed experts alone, as the published checkpoints have it.
    "nvfp4": _recipe("bfloat16", "nvfp4"),
    "nvfp4+fp8": _recipe("fp8", "nvfp4"),
    "int8": _recipe("int8"),
    "int4": _recipe("int4"),
}


def _published(text: dict[str, Any]) -> ModelConfig:
    towers = {"audio_config": {"mel_vocab_size": 16}, "vision_config": {"n_layers": 4}}
    return ModelConfig.from_dict({"model_type": "inkling_mm_model", "text_config": text} | towers)


# Sizes of the published models. Inkling has the defaults of TextConfig.
INKLING = _published({"unpadded_vocab_size": 200_058})
INKLING_SMALL = _published(
    {
        "unpadded_vocab_size": 200_058,
        "hidden_size": 4096,
        "num_hidden_layers": 42,
        "num_attention_heads": 32,
        "swa_num_attention_heads": 32,
        "swa_num_key_value_heads": 8,
        "intermediate_size": 16_384,
        "dense_mlp_idx": 2,
        "moe_intermediate_size": 2048,
        "log_scaling_n_floor": 131_072,
    }
)


@dataclass(frozen=True, slots=True)
class Pass:
    """The rows that each of `n_sessions` has in one pass, and how many positions they see."""

    n_sessions: int = 1
    audio: int = 0
    text: int = 1
    patches: int = 0
    context: int = 1024

    @property
    def n_rows(self) -> int:
        """Of one session."""
        return self.audio + self.text + self.patches


@dataclass(frozen=True, slots=True)
class Turn:
    """What comes in at once, and how many tokens go out: each but the last needs a pass."""

    name: str
    audio: int
    text: int  # the token of the turn before included
    n_tokens: int
    patches: int = 0

    def passes(self, n_sessions: int, context: int) -> list[tuple[Pass, int]]:
        """Passes, and how often each is run."""
        first = Pass(n_sessions, self.audio, self.text, self.patches, context)
        return [(first, 1), (Pass(n_sessions, context=context), self.n_tokens - 1)]


TURNS = {
    turn.name: turn
    for turn in (
        Turn("silent", audio=4, text=1, n_tokens=1),
        Turn("5 tokens", audio=4, text=1, n_tokens=5),
        Turn("20+5", audio=4, text=17, n_tokens=5),
    )
}


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of one rank, `n` times in a pass.

    `launches`: of our CUDA kernels. `nodes`: of the graph that the design fuses them to; what has
    none is part of its neighbour. `blocks`, `tiles`: of our attention, how many thread blocks
    there are, and the tiles of query vectors of each. `row_steps`: of our products of few rows,
    tiles of rows beyond the first by thousands of inputs. `is_large`: it has our kernel for many.
    """

    name: str
    kind: Kind
    format: str
    weight_bytes: float = 0
    cache_bytes: float = 0
    row_bytes: float = 0  # activations and vectors
    operations: float = 0  # a multiply and an add are two
    launches: int = 1
    nodes: int = 1
    blocks: int = 0
    tiles: int = 0
    row_steps: float = 0
    is_large: bool = False
    n: int = 1

    @property
    def n_bytes(self) -> float:
        """Read and written, once."""
        return self.weight_bytes + self.cache_bytes + self.row_bytes


class _Heads(NamedTuple):
    """Attention of one kind of layer, on one rank. Few key and value heads are held twice."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    extent: int
    window: int  # 0: sees everything

    @property
    def n_projected(self) -> int:
        return (self.n_heads + 2 * self.n_kv_heads) * self.d_head


def _heads(text: TextConfig, is_local: bool, tp: int = 1) -> _Heads:
    if is_local:
        n_heads, n_kv, d_head = (
            text.swa_num_attention_heads,
            text.swa_num_key_value_heads,
            text.swa_head_dim,
        )
        extent = window = text.sliding_window_size
    else:
        n_heads, n_kv, d_head = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        extent, window = text.rel_extent, 0
    return _Heads(n_heads // tp, max(n_kv // tp, 1), d_head, extent, window)


def _linear(
    name: str, kind: Kind, format: Format, shape: tuple[int, int], n_rows: float, nodes: int = 1
) -> Op:
    n_out, n_in = shape
    is_large = format.name == "bfloat16" and n_rows > FEW_ROWS
    return Op(
        name,
        kind,
        format.name,
        weight_bytes=format.bytes(n_out, n_in),
        row_bytes=n_rows * (2 * n_in + 4 * n_out),
        operations=2 * n_rows * n_out * n_in,
        nodes=nodes,
        launches=1 + (format.name in ("int8", "int4")),  # rows are quantised first
        row_steps=0 if is_large else (math.ceil(n_rows / TILE) - 1) * n_in / 1024,
        is_large=is_large,
    )


def _attention_half(
    text: TextConfig, recipe: Recipe, is_local: bool, p: Pass, tp: int, cache_bytes: float
) -> Iterator[Op]:
    h = _heads(text, is_local, tp)
    n_rows, d = p.n_sessions * p.n_rows, text.hidden_size
    n_keys = min(p.context, h.window) if is_local else p.context
    n_out = h.n_projected + h.n_heads * text.d_rel
    yield _linear("qkvr", "weights", recipe.attention, (n_out, d), n_rows)
    yield Op("kv_append", "rows", "float32", row_bytes=n_rows * h.n_projected * (4 + cache_bytes))
    per_row = 2 * n_keys * h.d_head + text.d_rel * min(n_keys, h.extent)
    n_parts = max(1, math.ceil(n_keys / PART))
    n_tiles = math.ceil(p.n_rows * h.n_heads / h.n_kv_heads / TILE)
    n_groups = math.ceil(n_tiles / GROUP_TILES)
    yield Op(
        "attention",
        "attention",
        "bfloat16",
        weight_bytes=4 * text.d_rel * h.extent,
        cache_bytes=p.n_sessions * 2 * n_keys * h.n_kv_heads * h.d_head * cache_bytes,
        operations=2 * n_rows * h.n_heads * per_row,
        launches=1 + (n_parts > 1),
        blocks=p.n_sessions * n_groups * h.n_kv_heads * n_parts,
        tiles=math.ceil(n_tiles / n_groups),
    )
    yield _linear("out", "weights", recipe.attention, (d, h.n_heads * h.d_head), n_rows)
    yield from _add_and_norm(text, n_rows, tp)


def _add_and_norm(text: TextConfig, n_rows: int, tp: int) -> Iterator[Op]:
    d = text.hidden_size
    if tp > 1:
        n_bytes = n_rows * d * REDUCED_BYTES
        yield Op("all_reduce", "all-reduce", "bfloat16", row_bytes=n_bytes, launches=1)
    # The design does it in the all-reduce, where there is one.
    n_bytes = n_rows * d * 4 * (4 + text.conv_kernel_size) + 4 * d * (text.conv_kernel_size + 1)
    nodes = int(tp == 1)
    yield Op("conv_add_norm", "rows", "float32", row_bytes=n_bytes, nodes=nodes)


def _activated(gate_up: Op, n: int) -> Op:
    """A product that leaves n activated gates in place of its sums; in float32 a kernel does."""
    if gate_up.format == "float32":
        return replace(gate_up, row_bytes=gate_up.row_bytes + 10 * n, launches=gate_up.launches + 1)
    return replace(gate_up, row_bytes=gate_up.row_bytes - (8 - 2) * n)


def _dense(text: TextConfig, recipe: Recipe, n_rows: int, tp: int) -> Iterator[Op]:
    d, d_ff = text.hidden_size, text.intermediate_size // tp
    gate_up = _linear("gate_up", "weights", recipe.dense, (2 * d_ff, d), n_rows)
    yield _activated(gate_up, n_rows * d_ff)
    yield _linear("down", "weights", recipe.dense, (d, d_ff), n_rows)
    yield from _add_and_norm(text, n_rows, tp)


def touched_experts(text: TextConfig, n_rows: int) -> float:
    """Routed experts that any of the rows chooses, on average, if they choose independently."""
    missed = (1 - text.num_experts_per_tok / text.n_routed_experts) ** n_rows
    return text.n_routed_experts * (1 - missed)


class _Experts(NamedTuple):
    """Experts of one format: how many a pass reads, for how many pairs of a row and an expert."""

    name: str
    format: Format
    n_read: float
    n_pairs: int


def _experts(text: TextConfig, recipe: Recipe, n_rows: int) -> list[_Experts]:
    """One launch for all experts, or one for each format."""
    n_routed, n_shared = text.num_experts_per_tok, text.n_shared_experts
    routed = _Experts("experts", recipe.experts, touched_experts(text, n_rows), n_rows * n_routed)
    shared = _Experts("shared", recipe.shared, n_shared, n_rows * n_shared)
    if routed.format != shared.format:
        return [routed, shared]
    n_read, n_pairs = routed.n_read + shared.n_read, routed.n_pairs + shared.n_pairs
    return [routed._replace(n_read=n_read, n_pairs=n_pairs)]


def _moe(text: TextConfig, recipe: Recipe, n_rows: int, tp: int) -> Iterator[Op]:
    d, d_ff = text.hidden_size, text.moe_intermediate_size // tp
    experts = _experts(text, recipe, n_rows)
    n_pairs = sum(some.n_pairs for some in experts)
    n_all = text.n_routed_experts + text.n_shared_experts
    router = _linear("router", "weights", FORMATS["float32"], (n_all, d), n_rows)
    yield replace(router, launches=2)  # product, choice
    for name, shape in (("up", (2 * d_ff, d)), ("down", (d, d_ff))):
        for some in experts:
            one = _linear(f"{some.name}_{name}", "weights", some.format, shape, some.n_pairs)
            tiles = math.ceil(some.n_pairs / some.n_read / TILE)  # of an expert; any number of rows
            one = replace(
                one,
                weight_bytes=some.n_read * one.weight_bytes,
                launches=one.launches - 1 + math.ceil(n_rows / EXPERT_ROWS),
                row_steps=(tiles - 1) * shape[1] / 1024,
                is_large=False,
            )
            yield _activated(one, some.n_pairs * d_ff) if name == "up" else one
    yield Op("combine", "rows", "float32", row_bytes=(n_pairs + n_rows) * d * 4, nodes=0)
    yield from _add_and_norm(text, n_rows, tp)


def _encoders(config: ModelConfig, p: Pass) -> Iterator[Op]:
    d, n = config.text.hidden_size, p.n_sessions
    if p.text:
        yield Op("embed_text", "encoders", "float32", row_bytes=n * p.text * d * 6, launches=n)
    if p.audio and config.audio is not None:
        n_bytes = n * p.audio * d * (2 * config.audio.n_mel_bins + 4)
        yield Op("embed_audio", "encoders", "float32", row_bytes=n_bytes, launches=n)
    side = 0 if config.vision is None else config.vision.patch_size
    for t_fold, fold, n_in, n_out in vision_stages(config) if p.patches else ():
        side //= fold
        frames = 1 if t_fold > 1 else 2
        n_rows = n * p.patches * frames * side * side
        one = _linear("vision", "encoders", FORMATS["bfloat16"], (n_out, n_in), n_rows)
        yield replace(one, launches=3)  # fold, product, norm


def pass_work(
    config: ModelConfig, recipe: Recipe, p: Pass, *, tp: int = 1, cache_bytes: float = 2
) -> list[Op]:
    """Every operation of a pass on one of `tp` ranks, equal layers together.

    Args:
        config: sizes.
        recipe: formats of the weights.
        p: rows and what they see.
        tp: ranks that share heads, the width of MLPs and experts, and the vocabulary.
        cache_bytes: of one element of keys and values.
    """
    text, n_rows = config.text, p.n_sessions * p.n_rows
    n_bytes = n_rows * text.hidden_size * 6
    ops = [*_encoders(config, p), Op("norm", "rows", "float32", row_bytes=n_bytes)]
    layers = Counter(zip(text.is_local, text.is_moe, strict=True))
    for (is_local, is_moe), n in layers.items():
        half = _attention_half(text, recipe, is_local, p, tp, cache_bytes)
        ops += (replace(op, n=n) for op in half)
        mlp = _moe if is_moe else _dense
        ops += (replace(op, n=n) for op in mlp(text, recipe, n_rows, tp))
    head = (math.ceil(text.n_logits / tp), text.hidden_size)
    one = _linear("head", "head", recipe.head, head, p.n_sessions, nodes=2)  # and the choice
    of_ours = _linear("head", "head", recipe.head, head, min(p.n_sessions, HEAD_ROWS))
    ops.append(
        replace(one, launches=of_ours.launches + 1, row_steps=of_ours.row_steps, is_large=False)
    )
    return ops


# ---- what lies in memory


@dataclass(frozen=True, slots=True)
class _Part:
    n_bytes: float
    is_split: bool = False  # over the ranks


def _packed(format: Format, n_out: int, n_in: int, is_split: bool = True) -> _Part:
    return _Part(format.bytes(_round_up(n_out, PANEL), _round_up(n_in, COLUMNS)), is_split)


def _round_up(n: float, unit: int) -> int:
    return math.ceil(n / unit) * unit


def _vector(n: int) -> _Part:
    return _Part(4 * _round_up(n, COLUMNS))


def _layer_parts(text: TextConfig, recipe: Recipe, is_local: bool, is_moe: bool) -> Iterator[_Part]:
    d, kernel = text.hidden_size, text.conv_kernel_size
    h = _heads(text, is_local)
    h = h._replace(d_head=_round_up(h.d_head, COLUMNS))
    yield from (_vector(n) for n in (d, d, h.d_head, h.d_head))
    for channels in (h.n_kv_heads * h.d_head, h.n_kv_heads * h.d_head, d, d):
        yield _Part(kernel * _vector(channels).n_bytes)
    yield _Part(text.d_rel * _vector(h.extent + 2 * BLOCK).n_bytes)
    yield _packed(recipe.attention, h.n_projected + h.n_heads * text.d_rel, d)
    yield _packed(recipe.attention, d, h.n_heads * h.d_head)
    yield _vector(1)  # the global scale
    if not is_moe:
        d_ff = _round_up(text.intermediate_size, COLUMNS)
        yield from (_packed(recipe.dense, *shape) for shape in ((2 * d_ff, d), (d, d_ff)))
        return
    n_all, d_ff = text.n_routed_experts + text.n_shared_experts, text.moe_intermediate_size
    d_ff = _round_up(d_ff, COLUMNS)
    yield _packed(FORMATS["float32"], n_all, d, is_split=False)
    yield _vector(text.n_routed_experts)
    for shape in ((2 * d_ff, d), (d, d_ff)):
        yield from [_packed(recipe.experts, *shape)] * text.n_routed_experts
        yield from [_packed(recipe.shared, *shape)] * text.n_shared_experts


def _parts(config: ModelConfig, recipe: Recipe, row_bytes: int) -> Iterator[_Part]:
    text = config.text
    d = text.hidden_size
    d_bytes = _round_up(d, COLUMNS) * row_bytes
    yield _Part(text.vocab_size * d_bytes, is_split=True)
    yield from (_vector(d), _vector(d))  # of the embedding, and the last
    yield _packed(recipe.head, text.n_logits, d)
    for is_local, is_moe in zip(text.is_local, text.is_moe, strict=True):
        yield from _layer_parts(text, recipe, is_local, is_moe)
    if config.audio is not None:
        yield _Part(config.audio.n_mel_bins * config.audio.mel_vocab_size * d_bytes)
        yield _vector(d)
    for _, _, n_in, n_out in vision_stages(config):
        yield _packed(FORMATS["bfloat16" if row_bytes == 2 else "float32"], n_out, n_in, False)
        yield _vector(n_out)


def arena_bytes(config: ModelConfig, recipe: Recipe, row_bytes: int = 2) -> int:
    """Of all weights as the CPU backend packs them, multi-token prediction apart.

    row_bytes: of an element of tables and of the vision tower.
    """
    parts = _parts(config, recipe, row_bytes)
    return sum(_round_up(part.n_bytes, ALIGN_BYTES) for part in parts)


def weight_bytes(config: ModelConfig, recipe: Recipe, tp: int = 1) -> float:
    """Of the weights that one of `tp` ranks holds."""
    parts = _parts(config, recipe, 2)
    return sum(part.n_bytes / (tp if part.is_split else 1) for part in parts)


def session_bytes(
    config: ModelConfig, context: int, tp: int = 1, *, cache_bytes: float = 2
) -> float:
    """Of the keys, values and convolution inputs of one session on one rank, no page half used."""
    text = config.text
    total = 0.0
    for is_local in text.is_local:
        h = _heads(text, is_local, tp)
        d_kv = h.n_kv_heads * h.d_head
        total += 2 * d_kv * cache_bytes * (min(context, h.window) if is_local else context)
        total += 4 * (text.conv_kernel_size - 1) * 2 * (d_kv + text.hidden_size)
    return total
