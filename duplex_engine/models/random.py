"""An interaction checkpoint with random weights, in the layout of the published ones.

Owns the presets, the tensors' names, shapes and scales, and a tokenizer of syllables, so that
what such a model says can at least be read aloud. Nothing here was trained: the output means
nothing, and only speed, memory and the path of the data are real. `config.py` says what the keys of
config.json mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from duplex_engine.arguments import found
from duplex_engine.checkpoint import MTP_FILE, SINGLE_FILE
from duplex_engine.config import ModelConfig, TextConfig
from duplex_engine.core_config import vision_stages
from duplex_engine.errors import InvalidArgument

__all__ = ["PRESETS", "Preset", "preset_config", "write_random_checkpoint"]

Dtype: TypeAlias = Literal["float32", "bfloat16"]
Stored: TypeAlias = Literal["float32", "bfloat16", "nvfp4"]
Codes: TypeAlias = Literal["mxfp8", "nvfp4"]
Array: TypeAlias = NDArray[Any]
Tensors: TypeAlias = Iterator[tuple[str, Array]]

CONTROL_TOKENS = (
    "<|eos|>",
    "<|listen|>",
    "<|delegate|>",
    "<|delegate_end|>",
    "<|result|>",
    "<|result_end|>",
    "<|user_text|>",
    "<|user_text_end|>",
)
N_BYTES = 256
LISTEN_SCALE = 9.0  # of the head's row, so that a good part of the tokens is `listen`
# Names of the matrices that are quantised end so: those of the layers, and the head.
MATRICES = (
    "w13_weight",
    "w2_weight",
    "w13_dn.weight",
    "w2_md.weight",
    "wq_du.weight",
    "wk_dv.weight",
    "wv_dv.weight",
    "wr_du.weight",
    "wo_ud.weight",
    "unembed.weight",
)


@dataclass(frozen=True, slots=True)
class Preset:
    """Sizes of a random model. `layers` has a word per layer: [l]ocal or [g]lobal, then [d]ense
    or [m]ixture of experts. Heads are (query, key/value) of global, then of local layers."""

    vocab_size: int
    d_model: int
    d_ff: int
    layers: str
    heads: tuple[int, int]
    local_heads: tuple[int, int]
    d_head: int
    d_rel: int
    rel_extent: int
    window: int
    patch_size: int
    vision_layers: int
    max_image_patches: int = 16
    max_output_tokens: int = 8
    moe: dict[str, int] = field(default_factory=dict)


_LOCAL_THEN_GLOBAL = "ld ld ld gd"
PRESETS: dict[str, Preset] = {
    "smallest": Preset(
        vocab_size=384,
        d_model=32,
        d_ff=64,
        layers="ld gd",
        heads=(2, 1),
        local_heads=(2, 1),
        d_head=16,
        d_rel=4,
        rel_extent=64,
        window=64,
        patch_size=16,
        vision_layers=2,
        max_output_tokens=6,
    ),
    "tiny": Preset(
        vocab_size=640,
        d_model=128,
        d_ff=384,
        layers=_LOCAL_THEN_GLOBAL,
        heads=(4, 2),
        local_heads=(4, 2),
        d_head=32,
        d_rel=8,
        rel_extent=256,
        window=64,
        patch_size=16,
        vision_layers=2,
    ),
    "small": Preset(
        vocab_size=4096,
        d_model=512,
        d_ff=1408,
        layers=f"{_LOCAL_THEN_GLOBAL} {_LOCAL_THEN_GLOBAL}",
        heads=(8, 4),
        local_heads=(8, 4),
        d_head=64,
        d_rel=16,
        rel_extent=1024,
        window=512,
        patch_size=16,
        vision_layers=2,
    ),
    "moe": Preset(
        vocab_size=640,
        d_model=128,
        d_ff=384,
        layers="ld lm lm gm",
        heads=(4, 2),
        local_heads=(4, 4),
        d_head=32,
        d_rel=8,
        rel_extent=256,
        window=64,
        patch_size=16,
        vision_layers=2,
        moe={"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    ),
}


def write_random_checkpoint(
    directory: str | Path,
    preset: str | Preset = "tiny",
    *,
    seed: int = 0,
    dtype: Stored = "float32",
    exact_in: Codes | None = None,
    interaction: bool = True,
    mtp_layers: int = 0,
) -> Path:
    """Writes config.json, model.safetensors and tokenizer.json into `directory`, made if absent.

    The same arguments give the same bytes. Returns the folder.

    Args:
        directory: where to write; files of these names are replaced.
        preset: "smallest" (where the model does not matter), "tiny" (about 1 M parameters), "small"
            (about 29 M), "moe" (about 2 M), or sizes of your own.
        seed: of the weights.
        dtype: of the weights in the file; "nvfp4" writes the matrices of the layers and the head as
            NVFP4 codes and scales, and the rest in bfloat16.
        exact_in: give these matrices values that this format has, so that engines which quantise
            to it and engines which do not have the same weights. "nvfp4" with the `dtype`
            "bfloat16" gives those that "nvfp4" gives in codes, rounded to bfloat16.
        interaction: with the block that makes it an interaction checkpoint, or without.
        mtp_layers: multi-token-prediction layers, local and global in turn, in `mtp.safetensors`.

    Raises:
        InvalidArgument: no such preset or dtype.
    """
    if isinstance(preset, str) and preset not in PRESETS:
        raise InvalidArgument(
            f"preset: expected one of {', '.join(PRESETS)}, found {found(preset)}"
        )
    sizes = preset if isinstance(preset, Preset) else PRESETS[preset]
    if dtype not in ("float32", "bfloat16", "nvfp4"):
        raise InvalidArgument(f"dtype: expected float32, bfloat16 or nvfp4, found {found(dtype)}")
    if exact_in not in (None, "mxfp8", "nvfp4"):
        raise InvalidArgument(f"exact_in: expected None, mxfp8 or nvfp4, found {found(exact_in)}")
    plain: Dtype = "float32" if dtype == "float32" else "bfloat16"
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    values = preset_config(sizes, plain, interaction)
    if mtp_layers > 0:
        values["mtp_config"] = {
            "num_nextn_predict_layers": mtp_layers,
            "chain_hidden_post_norm": False,
            "local_layer_ids": list(range(0, mtp_layers, 2)),
        }
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _tokenizer(sizes.vocab_size).save(str(folder / "tokenizer.json"))
    config, draw = ModelConfig.from_dict(values), _Draw(np.random.default_rng(seed))
    _write_safetensors(
        folder / SINGLE_FILE, _stored(_tensors(config, draw), plain, dtype, exact_in)
    )
    (folder / MTP_FILE).unlink(missing_ok=True)
    if mtp_layers > 0:
        _write_safetensors(
            folder / MTP_FILE, _stored(_mtp_tensors(config, draw), plain, dtype, exact_in)
        )
    return folder


def preset_config(
    preset: Preset, dtype: Dtype = "bfloat16", interaction: bool = True
) -> dict[str, Any]:
    """The content of config.json of a model of these sizes."""
    words = preset.layers.split()
    ids = {token: id_ for id_, token in enumerate(CONTROL_TOKENS)}
    text = {
        "model_type": "inkling_text",
        "vocab_size": preset.vocab_size,
        "hidden_size": preset.d_model,
        "num_hidden_layers": len(words),
        "intermediate_size": preset.d_ff,
        "num_attention_heads": preset.heads[0],
        "num_key_value_heads": preset.heads[1],
        "head_dim": preset.d_head,
        "swa_num_attention_heads": preset.local_heads[0],
        "swa_num_key_value_heads": preset.local_heads[1],
        "swa_head_dim": preset.d_head,
        "sliding_window_size": preset.window,
        "d_rel": preset.d_rel,
        "rel_extent": preset.rel_extent,
        "layer_types": [{"l": "hybrid_sliding", "g": "hybrid"}[word[0]] for word in words],
        "mlp_layer_types": [{"d": "dense", "m": "sparse"}[word[1]] for word in words],
        "n_shared_experts": 1,
        "route_scale": 1.0,
        "logits_mup_width_multiplier": 1.0,
        "bos_token_id": None,
        "eos_token_id": ids["<|eos|>"],
    }
    values: dict[str, Any] = {
        "architectures": ["InklingForConditionalGeneration"],
        "model_type": "inkling_mm_model",
        "dtype": dtype,
        "text_config": text | preset.moe,
        "audio_config": {"mel_vocab_size": 16},
        "vision_config": {
            "patch_size": preset.patch_size,
            "temporal_patch_size": 2,
            "n_layers": preset.vision_layers,
        },
    }
    if interaction:
        values["interaction"] = {
            "micro_turn_ms": 200,
            "audio_frames": 4,
            "max_output_tokens": preset.max_output_tokens,
            "max_image_patches": preset.max_image_patches,
        } | {token.strip("<|>"): id_ for token, id_ in ids.items() if token != "<|eos|>"}
    return values


class _Draw:
    """Random weights, scaled so that every layer changes what it is given."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def normal(self, scale: float, *shape: int) -> Array:
        return scale * self._rng.standard_normal(shape, dtype=np.float32)

    def linear(self, *shape: int) -> Array:
        return self.normal(1 / math.sqrt(shape[-1]), *shape)

    def near_one(self, *shape: int) -> Array:
        return 1 + self.normal(0.1, *shape)


def _layer(
    layer: str, text: TextConfig, is_local: bool, is_moe: bool, draw: _Draw
) -> Iterator[tuple[str, Array]]:
    """Yields (name, float32 values) of the layer whose names begin with `layer`."""
    d = text.hidden_size
    n_heads = text.swa_num_attention_heads if is_local else text.num_attention_heads
    n_kv_heads = text.swa_num_key_value_heads if is_local else text.num_key_value_heads
    d_head = text.swa_head_dim if is_local else text.head_dim
    extent = text.sliding_window_size if is_local else text.rel_extent
    d_kv = n_kv_heads * d_head
    yield f"{layer}.attn_norm.weight", draw.near_one(d)
    yield f"{layer}.attn.wq_du.weight", draw.linear(n_heads * d_head, d)
    yield f"{layer}.attn.wk_dv.weight", draw.linear(d_kv, d)
    yield f"{layer}.attn.wv_dv.weight", draw.linear(d_kv, d)
    yield f"{layer}.attn.wr_du.weight", draw.linear(n_heads * text.d_rel, d)
    yield f"{layer}.attn.wo_ud.weight", draw.linear(d, n_heads * d_head)
    yield f"{layer}.attn.q_norm.weight", 2 * draw.near_one(d_head)
    yield f"{layer}.attn.k_norm.weight", 2 * draw.near_one(d_head)
    yield f"{layer}.attn.k_sconv.weight", draw.normal(0.3, d_kv, 1, text.conv_kernel_size)
    yield f"{layer}.attn.v_sconv.weight", draw.normal(0.3, d_kv, 1, text.conv_kernel_size)
    yield f"{layer}.attn.rel_logits_proj.proj", draw.normal(0.5, text.d_rel, extent)
    yield f"{layer}.attn_sconv.weight", draw.normal(0.3, d, 1, text.conv_kernel_size)
    yield f"{layer}.mlp_norm.weight", draw.near_one(d)
    if is_moe:
        d_ff, n_routed = text.moe_intermediate_size, text.n_routed_experts
        n_shared = text.n_shared_experts
        experts, sinks = f"{layer}.mlp.experts", f"{layer}.mlp.shared_experts.shared"
        yield f"{layer}.mlp.gate.weight", draw.linear(n_routed + n_shared, d)
        yield f"{layer}.mlp.gate.bias", draw.normal(0.1, n_routed)
        yield f"{layer}.mlp.gate.global_scale", draw.near_one(1)
        yield f"{experts}.w13_weight", draw.linear(n_routed, 2 * d_ff, d)
        yield f"{experts}.w2_weight", draw.linear(n_routed, d, d_ff)
        yield f"{sinks}_w13_weight", draw.linear(n_shared, 2 * d_ff, d)
        yield f"{sinks}_w2_weight", draw.linear(n_shared, d, d_ff)
    else:
        yield f"{layer}.mlp.w13_dn.weight", draw.linear(2 * text.intermediate_size, d)
        yield f"{layer}.mlp.w2_md.weight", draw.linear(d, text.intermediate_size)
        yield f"{layer}.mlp.global_scale", draw.near_one(1)
    yield f"{layer}.mlp_sconv.weight", draw.normal(0.3, d, 1, text.conv_kernel_size)


def _tensors(config: ModelConfig, draw: _Draw) -> Tensors:
    """Yields (name, float32 values) of the model without its multi-token prediction."""
    text = config.text

    d = text.hidden_size
    yield "model.llm.embed.weight", draw.normal(1.0, text.vocab_size, d)
    yield "model.llm.embed_norm.weight", draw.near_one(d)
    for i, (is_local, is_moe) in enumerate(zip(text.is_local, text.is_moe, strict=True)):
        yield from _layer(f"model.llm.layers.{i}", text, is_local, is_moe, draw)
    yield "model.llm.norm.weight", draw.near_one(d)
    head = draw.linear(text.vocab_size, d)
    # A logit of 0 never wins among hundreds of random ones: no control token but `listen`, and
    # syllables rather than single bytes.
    head[: len(CONTROL_TOKENS) + N_BYTES] = 0
    if config.interaction is not None:
        head[config.interaction.listen] = LISTEN_SCALE * draw.linear(d, d)[0]
    yield "model.llm.unembed.weight", head

    if config.audio is not None:
        yield (
            "model.audio.encoder.weight",
            draw.normal(1.0, config.audio.n_mel_bins * config.audio.mel_vocab_size, d),
        )
        yield "model.audio.final_norm.weight", draw.near_one(d)
    stages = vision_stages(config)
    for i, (_, _, d_in, d_out) in enumerate(stages):
        yield f"model.visual.layers.linear_{i}.weight", draw.linear(d_out, d_in)
        if i + 1 < len(stages):
            yield f"model.visual.layers.norm_{i}.weight", draw.near_one(d_out)
    yield "model.visual.final_norm.weight", draw.near_one(d)


def _mtp_tensors(config: ModelConfig, draw: _Draw) -> Tensors:
    """Yields (name, float32 values) of the multi-token-prediction layers."""
    d = config.text.hidden_size
    for i, is_local in enumerate(config.mtp_is_local):
        prefix = f"model.mtp.layers.{i}"
        yield f"{prefix}.hidden_norm.weight", draw.near_one(d)
        yield f"{prefix}.embed_norm.weight", draw.near_one(d)
        yield f"{prefix}.input_proj.weight", draw.linear(d, 2 * d)
        yield from _layer(f"{prefix}.transformer_block", config.text, is_local, False, draw)


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Every byte, then syllables such as "ba", " ba" and "bame" until the vocabulary is full."""
    vocab = {token: id_ for id_, token in enumerate(CONTROL_TOKENS)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        if len(vocab) < vocab_size:
            vocab[left + right] = len(vocab)
            merges.append((left, right))

    syllables = list(product("bdfgklmnprstvz", "aeiou"))
    for consonant, vowel in syllables:
        merge(consonant, vowel)
    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # how byte-level tokenizers write a space
    for consonant, vowel in syllables:
        merge(space, consonant + vowel)
    for first, second in product(syllables, syllables):
        merge("".join(first), "".join(second))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    return tokenizer


def _stored(
    tensors: Tensors, plain: Dtype, dtype: Stored, exact_in: Codes | None
) -> Iterator[tuple[str, str, Array]]:
    """Yields (name, type of the elements, elements as they lie in the file)."""
    for name, values in tensors:
        is_matrix = name.endswith(MATRICES)
        if is_matrix and dtype == "nvfp4":
            codes, scales, second = _nvfp4_codes(values)
            yield name, "U8", codes[..., ::2] | codes[..., 1::2] << 4
            yield f"{name}.scale", "F8_E4M3", scales
            yield f"{name}.scale2", "F32", second
            continue
        if is_matrix and exact_in is not None:
            values = _nvfp4_values(values) if exact_in == "nvfp4" else _mxfp8_values(values)
        if plain == "float32":
            yield name, "F32", values.astype("<f4", copy=False)
        else:
            yield name, "BF16", _to_bfloat16(values.astype("<f4", copy=False))


def _write_safetensors(path: Path, tensors: Iterator[tuple[str, str, Array]]) -> None:
    """Writes the file: eight bytes of header length, the header in JSON, the data."""
    header: dict[str, Any] = {}
    chunks: list[bytes] = []
    end = 0
    for name, dtype, elements in tensors:
        raw = elements.tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(elements.shape),
            "data_offsets": [end, end + len(raw)],
        }
        chunks.append(raw)
        end += len(raw)
    described = json.dumps(header, separators=(",", ":")).encode()
    described += b" " * (-len(described) % 8)  # the data begins aligned
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        file.writelines(chunks)


# Of E2M1, by code: sizes, and the code nearest to each quarter's middle from 0 to 6.
E2M1_SIZES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1_OF_QUARTERS = np.repeat(np.arange(8, dtype=np.uint8), [1, 2, 2, 2, 3, 4, 6, 5])


def _nvfp4_codes(values: Array) -> tuple[Array, Array, Array]:
    """E2M1 codes of (..., columns), E4M3 scales of 16 columns, a second scale for each matrix."""
    blocks = values.reshape(*values.shape[:-1], -1, 16)
    largest = np.abs(blocks).max(axis=-1)
    second = largest.max(axis=(-1, -2)) / np.float32(6 * 448)
    scales = _e4m3_codes(largest / (6 * second[..., None, None]))
    unit = blocks / np.maximum(_e4m3(scales) * second[..., None, None], 1e-30)[..., None]
    quarters = np.minimum(np.abs(unit) * 4, len(E2M1_OF_QUARTERS) - 1).astype(np.uint8)
    codes = E2M1_OF_QUARTERS[quarters] | (unit < 0).astype(np.uint8) << 3
    return codes.reshape(values.shape), scales, second


def _nvfp4_values(values: Array) -> Array:
    codes, scales, second = _nvfp4_codes(values)
    units = E2M1_SIZES[codes & 7] * np.where(codes & 8, np.float32(-1), np.float32(1))
    blocks = units.reshape(*scales.shape, 16) * _e4m3(scales)[..., None]
    exact: Array = blocks * second[..., None, None, None]
    return exact.reshape(values.shape)


def _e4m3(codes: Array) -> Array:
    """The values of positive E4M3 codes without NaN."""
    exponent, mantissa = (codes >> 3).astype(np.int32), (codes & 7).astype(np.float32)
    return np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10)
    ).astype(np.float32)


def _e4m3_codes(sizes: Array) -> NDArray[np.uint8]:
    """The nearest codes of sizes from 0 to 448."""
    table = _e4m3(np.arange(127, dtype=np.uint8))
    return np.searchsorted((table[1:] + table[:-1]) / 2, sizes).astype(np.uint8)


def _mxfp8_values(values: Array) -> Array:
    """Four significant bits, and none below 2^-8 of the largest: E4M3 has them in any block."""
    least = np.frexp(np.abs(values).max())[1] - 8
    last_bit = np.maximum(np.frexp(values)[1], least) - 4
    exact: Array = np.ldexp(np.rint(np.ldexp(values, -last_bit)), last_bit)
    return exact


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of float32 bits, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)
