"""`config.json` of a checkpoint, read into validated, frozen models.

Owns the keys, their spellings and defaults (those of Hugging Face's `InklingConfig`), the rules by
which they imply one another, and the refusal of what the engine cannot run. Does not own names and
shapes of tensors: those follow from these values in the C++ core. What one value may be says
`config_fields.py`; read `checkpoint.py` next.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from duplex_engine.config_fields import (
    BinCount,
    ChannelCount,
    Count,
    FiniteFloat,
    LayerCount,
    LayerIndex,
    LayerIndices,
    LayerTypes,
    LevelCount,
    MlpLayerTypes,
    MtpLayerCount,
    PositiveFloat,
    Size,
    TokenId,
    TokenIds,
)
from duplex_engine.errors import CheckpointError
from duplex_engine.json_input import found, read_json_object

__all__ = [
    "AudioConfig",
    "InteractionConfig",
    "ModelConfig",
    "MtpConfig",
    "TextConfig",
    "VisionConfig",
]

FRAME_MS = 50  # duration of one dMel frame

# `quantization_config` only says who wrote the codes: the tensors say what they are, by name, type
# and shape (docs/CHECKPOINT.md). These writers' floating-point codes are understood, in groups of:
QUANT_METHODS = ("modelopt", "compressed-tensors", "fp8", "mxfp8", "mxfp4")
GROUP_SIZES = (16, 32)


class _Block(BaseModel):
    """One object of `config.json`. Unknown keys are ignored: published configs carry many. Where
    a file has two spellings of one key, the first `AliasChoices` counts, as in transformers."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)

    # Keys that published configs write and the model's arithmetic takes for granted: a block may
    # leave them out, but any other value asks for another model.
    only_values: ClassVar[dict[str, object]] = {}


class TextConfig(_Block):
    """The decoder (`text_config`). Sizes are counts of elements, windows and extents tokens.

    Layers come in two kinds of attention, global and local (sliding window, the `swa_` sizes), and
    two kinds of MLP, dense and mixture of experts: see `is_local` and `is_moe`.
    """

    only_values: ClassVar[dict[str, object]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "q_bias": False,
        "o_bias": False,
        "use_embed_norm": True,
        "use_sconv": True,
        "final_logit_softcapping": None,
        "gate_activation": "sigmoid",
        "use_gate_bias": True,
        "use_global_scale": True,
        "norm_after_topk": True,
        "shared_expert_sink": True,
        "inference_moe_w13_interleaved": True,
        "mtp_hidden_states_first": True,
    }

    vocab_size: Size = 201024
    unpadded_vocab_size: Size | None = None
    hidden_size: Size = 6144
    num_hidden_layers: LayerCount = 66
    rms_norm_eps: PositiveFloat = 1e-6
    logits_mup_width_multiplier: PositiveFloat = Field(
        24.0, validation_alias=AliasChoices("embedding_multiplier", "logits_mup_width_multiplier")
    )
    max_position_embeddings: Size = Field(
        131072, validation_alias=AliasChoices("model_max_length", "max_position_embeddings")
    )
    bos_token_id: TokenId | None = 1
    eos_token_ids: TokenIds = Field((2,), validation_alias="eos_token_id")

    # attention
    num_attention_heads: Size = 64
    num_key_value_heads: Size = 8
    head_dim: Size = 128
    swa_num_attention_heads: Size = 64
    swa_num_key_value_heads: Size = 16
    swa_head_dim: Size = 128
    sliding_window_size: Size = Field(
        512, validation_alias=AliasChoices("sliding_window", "sliding_window_size")
    )
    d_rel: Size = 16
    rel_extent: Size = 1024
    log_scaling_n_floor: Size | None = None
    log_scaling_alpha: FiniteFloat = 0.1
    conv_kernel_size: Size = Field(
        4, validation_alias=AliasChoices("sconv_kernel_size", "conv_kernel_size")
    )
    local_layer_ids: LayerIndices | None = None
    layer_types: LayerTypes | None = None

    # MLP
    intermediate_size: Size = 24576
    dense_intermediate_size: Size | None = None
    dense_mlp_idx: LayerIndex = 0
    mlp_layer_types: MlpLayerTypes | None = None
    moe_intermediate_size: Size = 3072
    n_routed_experts: Size = Field(
        256, validation_alias=AliasChoices("num_local_experts", "n_routed_experts")
    )
    num_experts_per_tok: Size = 6
    n_shared_experts: Count = 2
    route_scale: PositiveFloat = 8.0

    # multi-token prediction: what is given here counts before `mtp_config`
    num_mtp_layers: MtpLayerCount | None = None
    chain_hidden_post_norm: bool | None = None
    mtp_local_layer_ids: LayerIndices | None = None

    @model_validator(mode="after")
    def _resolve_widths(self) -> Self:
        # Published configs say `dense_intermediate_size`; `intermediate_size` then is an expert's.
        if self.dense_intermediate_size is None:
            return self
        return self.model_copy(
            update={
                "moe_intermediate_size": self.intermediate_size,
                "intermediate_size": self.dense_intermediate_size,
                "dense_intermediate_size": None,
            }
        )

    @property
    def is_local(self) -> tuple[bool, ...]:
        """For each layer: sliding-window attention (True) or global (False).

        `layer_types` says it, else `local_layer_ids`, else every sixth layer is global.
        """
        if self.layer_types is not None:
            return tuple(kind == "hybrid_sliding" for kind in self.layer_types)
        layers = range(self.num_hidden_layers)
        if self.local_layer_ids is not None:
            local = frozenset(self.local_layer_ids)
            return tuple(i in local for i in layers)
        return tuple((i + 1) % 6 != 0 for i in layers)

    @property
    def is_moe(self) -> tuple[bool, ...]:
        """For each layer: mixture of experts (True) or dense MLP (False).

        `mlp_layer_types` says it, else the first `dense_mlp_idx` layers are dense.
        """
        if self.mlp_layer_types is not None:
            return tuple(kind == "sparse" for kind in self.mlp_layer_types)
        return tuple(i >= self.dense_mlp_idx for i in range(self.num_hidden_layers))

    @property
    def n_logits(self) -> int:
        """Number of token ids the model can emit: the vocabulary without its padding."""
        return self.vocab_size if self.unpadded_vocab_size is None else self.unpadded_vocab_size

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yields (key, problem) for every contradiction between keys that are valid alone."""
        for key in ("layer_types", "mlp_layer_types"):
            kinds = getattr(self, key)
            if kinds is not None and len(kinds) != self.num_hidden_layers:
                yield (
                    key,
                    f"expected {self.num_hidden_layers} entries (num_hidden_layers), "
                    f"found {len(kinds)}",
                )
        for prefix, in_use in (("", not all(self.is_local)), ("swa_", any(self.is_local))):
            n_heads = getattr(self, prefix + "num_attention_heads")
            n_kv_heads = getattr(self, prefix + "num_key_value_heads")
            if in_use and n_heads % n_kv_heads:
                yield (
                    prefix + "num_attention_heads",
                    f"expected a multiple of {prefix}num_key_value_heads ({n_kv_heads}), "
                    f"found {n_heads}",
                )
        if self.n_logits > self.vocab_size:
            yield (
                "unpadded_vocab_size",
                f"expected at most vocab_size ({self.vocab_size}), found {self.n_logits}",
            )
        if any(self.is_moe):
            if self.n_shared_experts == 0:
                # The router normalises routed and shared experts together: with none, its last
                # `n_shared_experts` columns are not a slice of the logits.
                yield "n_shared_experts", "expected at least 1 in a mixture of experts, found 0"
            if self.num_experts_per_tok > self.n_routed_experts:
                yield (
                    "num_experts_per_tok",
                    f"expected at most n_routed_experts ({self.n_routed_experts}), "
                    f"found {self.num_experts_per_tok}",
                )


class MtpConfig(_Block):
    """Multi-token prediction (`mtp_config`): layers that guess tokens ahead, all dense."""

    num_nextn_predict_layers: MtpLayerCount = 0
    chain_hidden_post_norm: bool = False
    local_layer_ids: LayerIndices | None = None


class AudioConfig(_Block):
    """The dMel embedding (`audio_config`): a table of `n_mel_bins * mel_vocab_size` rows."""

    only_values: ClassVar[dict[str, object]] = {
        "audio_mode": "dmel",
        "use_audio_norm": True,
        "dmel_min_value": -7.0,
        "dmel_max_value": 2.0,
    }

    n_mel_bins: BinCount = Field(80, validation_alias=AliasChoices("num_codebooks", "n_mel_bins"))
    mel_vocab_size: LevelCount = Field(
        256, validation_alias=AliasChoices("codebook_size", "mel_vocab_size")
    )


class VisionConfig(_Block):
    """The hMLP patch encoder (`vision_config`): `patch_size` in pixels, depth in frames."""

    only_values: ClassVar[dict[str, object]] = {
        "vision_encoder_type": "hmlp",
        "use_vision_norm": True,
    }

    patch_size: Size = 40
    temporal_patch_size: Size = 2
    num_channels: ChannelCount = 3
    num_hidden_layers: LayerCount = Field(
        24, validation_alias=AliasChoices("n_layers", "num_hidden_layers")
    )


class InteractionConfig(_Block):
    """What makes a checkpoint an interaction checkpoint: the micro-turn and its marker tokens."""

    model_config = ConfigDict(extra="forbid")

    # The keys below that are token ids.
    token_keys: ClassVar[tuple[str, ...]] = (
        "listen",
        "delegate",
        "delegate_end",
        "result",
        "result_end",
        "user_text",
        "user_text_end",
    )

    micro_turn_ms: Size = 200
    audio_frames: Size = 4
    max_output_tokens: Size
    max_image_patches: Count
    listen: TokenId
    delegate: TokenId
    delegate_end: TokenId
    result: TokenId
    result_end: TokenId
    user_text: TokenId
    user_text_end: TokenId
    speech: dict[str, Any] | None = None

    def problems(self, model: ModelConfig) -> Iterator[tuple[str, str]]:
        """Yields (key, problem) for every contradiction with itself and with `model`."""
        if self.micro_turn_ms != FRAME_MS * self.audio_frames:
            yield (
                "micro_turn_ms",
                f"expected {FRAME_MS} * audio_frames = {FRAME_MS * self.audio_frames}, "
                f"found {self.micro_turn_ms}",
            )
        if model.audio is None:
            yield "audio_frames", "expected an audio_config beside it, found none"
        if model.vision is None and self.max_image_patches > 0:
            yield (
                "max_image_patches",
                f"expected 0 without a vision_config, found {self.max_image_patches}",
            )
        owner: dict[int, str] = {}
        for key in self.token_keys:
            token = getattr(self, key)
            if token >= model.text.n_logits:
                yield (
                    key,
                    f"expected an id inside the vocabulary of {model.text.n_logits}, found {token}",
                )
            if token in owner:
                yield key, f"expected an id of its own, found {token}, which is {owner[token]}'s"
            owner.setdefault(token, key)


class ModelConfig(_Block):
    """A whole `config.json`: the decoder, and each of the other blocks if the file has it."""

    text: TextConfig = Field(validation_alias="text_config")
    audio: AudioConfig | None = Field(None, validation_alias="audio_config")
    vision: VisionConfig | None = Field(None, validation_alias="vision_config")
    mtp: MtpConfig | None = Field(None, validation_alias="mtp_config")
    interaction: InteractionConfig | None = None
    image_token_id: TokenId = 200054
    audio_token_id: TokenId = 200053
    image_bos_token_id: TokenId = 200005
    audio_bos_token_id: TokenId = 200020
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    eos_token_ids: TokenIds = Field((), validation_alias="eos_token_id")

    @model_validator(mode="before")
    @classmethod
    def _merge_dtype(cls, values: dict[str, Any]) -> dict[str, Any]:
        # `torch_dtype` is the older spelling and counts only where `dtype` says nothing.
        if values.get("dtype") is None and "torch_dtype" in values:
            return {**values, "dtype": values["torch_dtype"]}
        return values

    @model_validator(mode="after")
    def _resolve_end_tokens(self) -> Self:
        # Published configs say it here; the decoder's own, which has a default, then do not count.
        if not self.eos_token_ids:
            return self
        text = self.text.model_copy(update={"eos_token_ids": self.eos_token_ids})
        return self.model_copy(update={"text": text, "eos_token_ids": ()})

    @property
    def mtp_is_local(self) -> tuple[bool, ...]:
        """For each multi-token-prediction layer: sliding-window attention (True) or global."""
        block = self.mtp or MtpConfig()
        n_layers, local = self.text.num_mtp_layers, self.text.mtp_local_layer_ids
        n_layers = block.num_nextn_predict_layers if n_layers is None else n_layers
        local = (block.local_layer_ids or ()) if local is None else local
        return tuple(i in local for i in range(n_layers))

    @property
    def has_mtp_chain_norm(self) -> bool:
        """Whether one more norm stands behind each multi-token-prediction layer."""
        if self.text.chain_hidden_post_norm is not None:
            return self.text.chain_hidden_post_norm
        return self.mtp is not None and self.mtp.chain_hidden_post_norm

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads and validates the file `path`; raises CheckpointError as `from_dict` does."""
        return cls.from_dict(read_json_object(path), source=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json") -> Self:
        """Validates the content of a `config.json`; `source` names it in errors.

        `model_type` selects the layout: "inkling_mm_model" (blocks `text_config`, `audio_config`,
        `vision_config`) or "inkling_text" (the keys of `text_config` at the top, no towers).

        Raises:
            CheckpointError: one line per problem, all problems of the file at once; contradictions
                between keys are looked for when every key is valid alone.
        """
        match values.get("model_type"):
            case "inkling_mm_model":
                nested, text_prefix = values, "text_config."
            case "inkling_text":
                towers = {"audio_config": None, "vision_config": None}
                nested, text_prefix = {**values, **towers, "text_config": values}, ""
            case other:
                raise CheckpointError(
                    f"{source}: model_type: expected 'inkling_mm_model' or 'inkling_text', "
                    f"found {found(other)}"
                )
        problems = [*_forbidden_values(nested), *_quantization_problems(nested)]
        try:
            config = cls.model_validate(nested)
        except ValidationError as error:
            problems += (_describe(details) for details in error.errors(include_url=False))
        else:
            problems += ((f"text_config.{key}", text) for key, text in config.text.problems())
            if config.interaction is not None:
                problems += (
                    (f"interaction.{key}", text)
                    for key, text in config.interaction.problems(config)
                )
        if problems:
            lines = (
                f"{source}: {name.replace('text_config.', text_prefix, 1)}: {text}"
                for name, text in problems
            )
            raise CheckpointError("\n".join(dict.fromkeys(lines)))
        return config


def _forbidden_values(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (name, problem) for each key whose only value that the engine can run is not given."""
    blocks: dict[str, type[_Block]] = {
        "": ModelConfig,
        "text_config": TextConfig,
        "audio_config": AudioConfig,
        "vision_config": VisionConfig,
        "mtp_config": MtpConfig,
    }
    for name, block in blocks.items():
        content = values.get(name) if name else values
        if not isinstance(content, dict):
            continue  # a wrong type is reported by the validation of the fields
        for key, only in block.only_values.items():
            if content.get(key, only) != only:
                full_name = f"{name}.{key}" if name else key
                yield full_name, f"expected {found(only)}, found {found(content[key])}"


def _quantization_problems(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (name, problem) where the weights are quantised in a way that is not understood."""
    text = values.get("text_config")
    blocks = {"quantization_config": values.get("quantization_config")}
    if isinstance(text, dict):
        blocks["text_config.quantization_config"] = text.get("quantization_config")
    for name, block in blocks.items():
        if block is None:
            continue
        if not isinstance(block, dict):
            yield name, f"expected an object, found {found(block)}"
            continue
        nested = block.get("quantization")  # as in hf_quant_config.json
        for part in (block, nested if isinstance(nested, dict) else {}):
            for key, kind in (("config_groups", dict), ("weight_block_size", list)):
                value = part.get(key)
                if value is not None and not isinstance(value, kind):
                    what = "an object" if kind is dict else "a list"
                    yield f"{name}.{key}", f"expected {what}, found {found(value)}"
            method, group = part.get("quant_method"), part.get("group_size")
            # vLLM also writes the algorithm into the method: "modelopt_fp4"
            if method is not None and str(method).split("_")[0] not in QUANT_METHODS:
                yield (
                    f"{name}.quant_method",
                    f"expected one of {', '.join(QUANT_METHODS)}, found {found(method)}; "
                    "take the checkpoint in bfloat16, or in NVFP4 or MXFP8",
                )
            if group is not None and group not in GROUP_SIZES:
                yield (
                    f"{name}.group_size",
                    f"expected 16 (NVFP4) or 32 (MXFP8), found {found(group)}",
                )


def _describe(details: ErrorDetails) -> tuple[str, str]:
    """Returns (name, problem) for one error of pydantic's, in the words of this package."""
    parts = (str(part) for part in details["loc"])
    name = ".".join(
        part if part.isalnum() or part.isidentifier() else found(part) for part in parts
    )
    value = found(details["input"])
    match details["type"]:
        case "missing":
            return name, "expected a value, found nothing"
        case "extra_forbidden":
            return name, f"unknown key; expected one of {', '.join(InteractionConfig.model_fields)}"
        case "model_type" | "dict_type":
            return name, f"expected an object, found {value}"
        case "tuple_type":
            return name, f"expected a list, found {value}"
        case "literal_error":
            return name, f"expected {details['ctx']['expected']}, found {value}"
        case _:
            return name, f"{details['msg']}, found {value}"
