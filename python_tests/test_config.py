"""`config.json`: the same derivations as transformers, and refusals that name the key."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duplex_engine.config import ModelConfig
from duplex_engine.errors import CheckpointError

# The text block as Inkling-Small publishes it, with the keys the engine checks but does not keep.
INKLING_SMALL: dict[str, Any] = {
    "model_type": "inkling_mm_model",
    "text_config": {
        "model_max_length": 1048576,
        "hidden_size": 4096,
        "num_hidden_layers": 42,
        "vocab_size": 201024,
        "unpadded_vocab_size": 200058,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "swa_num_attention_heads": 32,
        "swa_num_key_value_heads": 8,
        "swa_head_dim": 128,
        "sliding_window_size": 512,
        "local_layer_ids": [i for i in range(42) if i % 6 != 5],
        "d_rel": 16,
        "rel_extent": 1024,
        "q_bias": False,
        "o_bias": False,
        "log_scaling_n_floor": 128000,
        "log_scaling_alpha": 0.1,
        "rms_norm_eps": 1e-06,
        "use_embed_norm": True,
        "logits_mup_width_multiplier": 16.0,
        "final_logit_softcapping": None,
        "use_sconv": True,
        "sconv_kernel_size": 4,
        "dense_mlp_idx": 2,
        "dense_intermediate_size": 16384,
        "intermediate_size": 2048,
        "n_routed_experts": 256,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "shared_expert_sink": True,
        "route_scale": 8.0,
        "use_gate_bias": True,
        "use_global_scale": True,
        "gate_activation": "sigmoid",
        "norm_after_topk": True,
    },
    "audio_config": {"n_mel_bins": 80, "mel_vocab_size": 16, "audio_mode": "dmel"},
    "vision_config": {"patch_size": 40, "n_layers": 4, "vision_encoder_type": "hmlp"},
}

INTERACTION: dict[str, Any] = {
    "max_output_tokens": 8,
    "max_image_patches": 64,
    "listen": 100,
    "delegate": 101,
    "delegate_end": 102,
    "result": 103,
    "result_end": 104,
    "user_text": 105,
    "user_text_end": 106,
}


def changed(base: dict[str, Any], **updates: Any) -> dict[str, Any]:
    """A copy of `base`; `block__key=value` sets base["block"]["key"]."""
    result = copy.deepcopy(base)
    for name, value in updates.items():
        *blocks, key = name.split("__")
        target = result
        for block in blocks:
            target = target.setdefault(block, {})
        target[key] = copy.deepcopy(value)
    return result


def problems(values: dict[str, Any]) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(values)
    return [line.removeprefix("config.json: ") for line in str(caught.value).split("\n")]


def test_inkling_small() -> None:
    config = ModelConfig.from_dict(INKLING_SMALL)
    text = config.text
    assert [i for i, local in enumerate(text.is_local) if not local] == [5, 11, 17, 23, 29, 35, 41]
    assert [i for i, moe in enumerate(text.is_moe) if not moe] == [0, 1]
    assert (text.intermediate_size, text.moe_intermediate_size) == (16384, 2048)
    assert (text.vocab_size, text.n_logits) == (201024, 200058)
    assert (text.conv_kernel_size, text.max_position_embeddings) == (4, 1048576)
    assert config.audio is not None
    assert config.audio.mel_vocab_size == 16
    assert config.vision is not None
    assert config.vision.num_hidden_layers == 4
    assert config.interaction is None


# --- the same derivations as transformers -------------------------------------------------------

SAME_TEXT_KEYS = (
    "vocab_size",
    "unpadded_vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "rms_norm_eps",
    "head_dim",
    "d_rel",
    "logits_mup_width_multiplier",
    "max_position_embeddings",
    "bos_token_id",
    "num_attention_heads",
    "num_key_value_heads",
    "swa_num_attention_heads",
    "swa_num_key_value_heads",
    "swa_head_dim",
    "sliding_window_size",
    "rel_extent",
    "log_scaling_n_floor",
    "log_scaling_alpha",
    "conv_kernel_size",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "route_scale",
)


@st.composite
def text_configs(draw: st.DrawFn) -> dict[str, Any]:
    n_layers = draw(st.integers(1, 14))

    def one_per_layer(*kinds: str) -> st.SearchStrategy[list[str]]:
        return st.lists(st.sampled_from(kinds), min_size=n_layers, max_size=n_layers)

    size = st.integers(1, 4096)
    optional = {
        "vocab_size": st.integers(300, 4096),
        "unpadded_vocab_size": st.none() | st.integers(1, 300),
        "hidden_size": size,
        "head_dim": size,
        "swa_head_dim": size,
        "num_key_value_heads": st.sampled_from([1, 2, 8, 64]),
        "swa_num_key_value_heads": st.sampled_from([1, 2, 8, 64]),
        "sliding_window_size": size,
        "sliding_window": size,
        "d_rel": size,
        "rel_extent": size,
        "log_scaling_n_floor": st.none() | size,
        "log_scaling_alpha": st.floats(-1, 1),
        "local_layer_ids": st.none() | st.lists(st.integers(-1, n_layers)),
        "layer_types": st.none() | one_per_layer("hybrid", "hybrid_sliding"),
        "mlp_layer_types": st.none() | one_per_layer("dense", "sparse"),
        "dense_mlp_idx": st.integers(-1, 16),
        "conv_kernel_size": st.integers(1, 5),
        "sconv_kernel_size": st.integers(1, 5),
        "intermediate_size": size,
        "dense_intermediate_size": st.none() | size,
        "moe_intermediate_size": size,
        "n_routed_experts": st.integers(6, 300),
        "num_local_experts": st.integers(6, 300),
        "num_experts_per_tok": st.integers(1, 6),
        "n_shared_experts": st.integers(1, 4),
        "route_scale": st.floats(0.5, 8),
        "embedding_multiplier": st.floats(0.5, 30),
        "logits_mup_width_multiplier": st.floats(0.5, 30),
        "model_max_length": size,
        "max_position_embeddings": size,
        "bos_token_id": st.none() | st.integers(0, 299),
        "eos_token_id": st.none() | st.integers(0, 299),
    }
    block = draw(st.fixed_dictionaries({"num_hidden_layers": st.just(n_layers)}, optional=optional))
    return {str(key): value for key, value in block.items()}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=text_configs(),
    audio=st.fixed_dictionaries(
        {},
        optional={
            "n_mel_bins": st.integers(1, 99),
            "num_codebooks": st.integers(1, 99),
            "mel_vocab_size": st.integers(16, 99),
            "codebook_size": st.integers(16, 99),
        },
    ),
    vision=st.fixed_dictionaries(
        {},
        optional={
            "patch_size": st.integers(1, 99),
            "n_layers": st.integers(1, 9),
            "num_hidden_layers": st.integers(1, 9),
        },
    ),
    image_token_id=st.integers(0, 300),
)
def test_derives_what_transformers_derives(
    text: dict[str, Any], audio: dict[str, Any], vision: dict[str, Any], image_token_id: int
) -> None:
    from transformers import InklingConfig

    values = {
        "text_config": text,
        "audio_config": audio,
        "vision_config": vision,
        "image_token_id": image_token_id,
    }
    theirs = InklingConfig(**copy.deepcopy(values))
    for layout in (values, json.loads(theirs.to_json_string(use_diff=False))):
        ours = ModelConfig.from_dict({"model_type": "inkling_mm_model"} | layout)
        for key in SAME_TEXT_KEYS:
            assert getattr(ours.text, key) == getattr(theirs.text_config, key), key
        layer_types, mlp_types = theirs.text_config.layer_types, theirs.text_config.mlp_layer_types
        assert ours.text.is_local == tuple(kind == "hybrid_sliding" for kind in layer_types)
        assert ours.text.is_moe == tuple(kind == "sparse" for kind in mlp_types)
        eos = theirs.text_config.eos_token_id
        assert ours.text.eos_token_ids == (() if eos is None else (eos,))
        assert ours.audio is not None
        assert ours.audio.n_mel_bins == theirs.audio_config.n_mel_bins
        assert ours.audio.mel_vocab_size == theirs.audio_config.mel_vocab_size
        assert ours.vision is not None
        for key in ("patch_size", "temporal_patch_size", "num_channels", "num_hidden_layers"):
            assert getattr(ours.vision, key) == getattr(theirs.vision_config, key), key
        assert ours.image_token_id == theirs.image_token_id
        assert ours.audio_bos_token_id == theirs.audio_bos_token_id


@pytest.mark.parametrize(
    ("block", "text", "is_local", "has_norm"),
    [
        (None, {}, (), False),
        ({"num_nextn_predict_layers": 2}, {}, (False, False), False),
        (
            {"num_nextn_predict_layers": 3, "local_layer_ids": [0, 2, 7]},
            {},
            (True, False, True),
            False,
        ),
        ({"num_nextn_predict_layers": 1, "chain_hidden_post_norm": True}, {}, (False,), True),
        (None, {"num_mtp_layers": 2, "mtp_local_layer_ids": [1]}, (False, True), False),
        # What text_config says counts, unless it says nothing.
        ({"num_nextn_predict_layers": 3}, {"num_mtp_layers": 1}, (False,), False),
        ({"num_nextn_predict_layers": 1}, {"num_mtp_layers": None}, (False,), False),
        ({"chain_hidden_post_norm": True}, {"chain_hidden_post_norm": False}, (), False),
    ],
)
def test_multi_token_prediction(
    block: dict[str, Any] | None, text: dict[str, Any], is_local: tuple[bool, ...], has_norm: bool
) -> None:
    values = changed(INKLING_SMALL)
    values["text_config"] |= text
    if block is not None:
        values["mtp_config"] = block
    config = ModelConfig.from_dict(values)
    assert config.mtp_is_local == is_local
    assert config.has_mtp_chain_norm == has_norm


def test_text_only_layout() -> None:
    text = INKLING_SMALL["text_config"] | {"model_type": "inkling_text", "dtype": "bfloat16"}
    config = ModelConfig.from_dict(text)
    assert config.text == ModelConfig.from_dict(INKLING_SMALL).text
    assert config.audio is None
    assert config.vision is None
    assert config.dtype == "bfloat16"
    assert problems(text | {"hidden_size": 0}) == [
        "hidden_size: expected a positive integer, found 0"
    ]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
    ],
)
def test_dtype_spellings(keys: dict[str, Any], expected: str | None) -> None:
    assert ModelConfig.from_dict(INKLING_SMALL | keys).dtype == expected


@pytest.mark.parametrize("inner", [{}, {"eos_token_id": 5}, {"eos_token_id": None}])
@pytest.mark.parametrize("outer", [{}, {"eos_token_id": 6}, {"eos_token_id": [6, 7]}])
def test_output_ends_where_generate_ends_it(outer: dict[str, Any], inner: dict[str, Any]) -> None:
    """Published configs have the token beside `text_config`."""
    from transformers import GenerationConfig, InklingConfig

    theirs = InklingConfig(**outer, text_config={"num_hidden_layers": 1, **inner})
    values = changed(INKLING_SMALL) | outer
    values["text_config"] |= inner
    ends = GenerationConfig.from_model_config(theirs).eos_token_id
    expected = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    assert ModelConfig.from_dict(values).text.eos_token_ids == expected


def test_several_end_tokens_of_the_decoder() -> None:
    config = ModelConfig.from_dict(changed(INKLING_SMALL, text_config__eos_token_id=[2, 7]))
    assert config.text.eos_token_ids == (2, 7)


# --- refusals -----------------------------------------------------------------------------------


def test_lists_every_problem_at_once() -> None:
    values = changed(
        INKLING_SMALL | {"quantization_config": {"quant_method": "nvfp4"}},
        text_config__num_attention_heads="eight",
        text_config__head_dim=-4,
        text_config__rms_norm_eps=float("nan"),
        text_config__n_shared_experts=True,
        text_config__layer_types=["hybrid", "chunked_attention"],
        text_config__hidden_act="gelu",
        audio_config__mel_vocab_size=8,
        vision_config__patch_size=40.0,
        interaction__listen=5,
        interaction__lisen=5,
        dtype="int8",
    )
    lines = problems(values)
    assert [
        line
        for line in lines
        if line.startswith(("quantization", "text", "audio", "vision", "dtype", "interaction.l"))
    ] == [
        "text_config.hidden_act: expected 'silu', found 'gelu'",
        "quantization_config.quant_method: expected one of modelopt, compressed-tensors, fp8, "
        "mxfp8, mxfp4, found 'nvfp4'; take the checkpoint in bfloat16, or in NVFP4 or MXFP8",
        "text_config.rms_norm_eps: expected a positive number, found nan",
        "text_config.num_attention_heads: expected a positive integer, found 'eight'",
        "text_config.head_dim: expected a positive integer, found -4",
        "text_config.layer_types.1: expected 'hybrid' or 'hybrid_sliding', "
        "found 'chunked_attention'",
        "text_config.n_shared_experts: expected a non-negative integer, found true",
        "audio_config.mel_vocab_size: expected an integer of at least 16, the levels of dMel, "
        "found 8",
        "vision_config.patch_size: expected a positive integer, found 40.0",
        "interaction.lisen: unknown key; expected one of micro_turn_ms, audio_frames, "
        "max_output_tokens, max_image_patches, listen, delegate, delegate_end, result, "
        "result_end, user_text, user_text_end, speech",
        "dtype: expected 'float32', 'bfloat16' or 'float16', found \"int8\"".replace('"', "'"),
    ]
    assert "interaction.delegate: expected a value, found nothing" in lines


@pytest.mark.parametrize(
    ("updates", "problem"),
    [
        ({"layer_types": ["hybrid"]}, "layer_types: expected 42 entries (num_hidden_layers)"),
        ({"mlp_layer_types": []}, "mlp_layer_types: expected 42 entries (num_hidden_layers)"),
        ({"num_key_value_heads": 5}, "num_attention_heads: expected a multiple of num_key_value"),
        ({"swa_num_key_value_heads": 5}, "swa_num_attention_heads: expected a multiple of swa_num"),
        ({"unpadded_vocab_size": 201025}, "unpadded_vocab_size: expected at most vocab_size"),
        ({"n_shared_experts": 0}, "n_shared_experts: expected at least 1"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok: expected at most n_routed_experts"),
        ({"shared_expert_sink": False}, "shared_expert_sink: expected true, found false"),
        ({"gate_activation": "softmax"}, "gate_activation: expected 'sigmoid', found 'softmax'"),
        ({"attention_bias": True}, "attention_bias: expected false, found true"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected an integer from 1 to 4096"),
        ({"layer_types": "hybrid"}, "layer_types: expected a list, found 'hybrid'"),
        ({"eos_token_id": [2, -1]}, "eos_token_id.1: expected a token id, found -1"),
        ({"hidden_size": None}, "hidden_size: expected a positive integer, found null"),
        ({"num_mtp_layers": 4097}, "num_mtp_layers: expected an integer from 0 to 4096"),
        ({"mtp_hidden_states_first": False}, "mtp_hidden_states_first: expected true, found"),
    ],
)
def test_refuses_what_the_engine_cannot_run(updates: dict[str, Any], problem: str) -> None:
    values = changed(INKLING_SMALL)
    values["text_config"] |= updates
    (line,) = problems(values)
    assert line.startswith(f"text_config.{problem}")


def test_experts_matter_only_to_mixture_layers() -> None:
    values = changed(INKLING_SMALL, text_config__n_shared_experts=0, text_config__dense_mlp_idx=42)
    assert not any(ModelConfig.from_dict(values).text.is_moe)


def test_transformers_cannot_route_without_shared_experts() -> None:
    """Why 0 shared experts are refused: the oracle has no meaning for them either."""
    import torch
    from transformers.models.inkling.configuration_inkling import InklingTextConfig
    from transformers.models.inkling.modeling_inkling import InklingTopkRouter

    router = InklingTopkRouter(InklingTextConfig(hidden_size=4, n_shared_experts=0))
    torch.nn.init.zeros_(router.weight)
    with pytest.raises(RuntimeError, match="must match the size"):
        router(torch.zeros(1, 4))


@pytest.mark.parametrize("model_type", [None, "inkling2", 3])
def test_refuses_other_models(model_type: object) -> None:
    (line,) = problems({"model_type": model_type, "text_config": {}})
    assert line.startswith("model_type: expected 'inkling_mm_model' or 'inkling_text', found ")


@pytest.mark.parametrize("block", ["text_config", "audio_config", "interaction"])
def test_a_block_is_an_object(block: str) -> None:
    assert problems(INKLING_SMALL | {block: [1]}) == [f"{block}: expected an object, found [1]"]


def test_the_outer_end_token_is_named_as_it_stands() -> None:
    assert problems(INKLING_SMALL | {"eos_token_id": "x"}) == [
        "eos_token_id.0: expected a token id, found 'x'"
    ]


def test_nested_layout_needs_a_text_block() -> None:
    assert problems({"model_type": "inkling_mm_model"}) == [
        "text_config: expected a value, found nothing"
    ]


# --- interaction --------------------------------------------------------------------------------


def test_interaction_block() -> None:
    interaction = ModelConfig.from_dict(INKLING_SMALL | {"interaction": INTERACTION}).interaction
    assert interaction is not None
    assert (interaction.micro_turn_ms, interaction.audio_frames) == (200, 4)
    assert interaction.listen == 100
    assert interaction.speech is None


@pytest.mark.parametrize(
    ("updates", "problem"),
    [
        ({"micro_turn_ms": 100}, "micro_turn_ms: expected 50 * audio_frames = 200, found 100"),
        ({"result": 200058}, "result: expected an id inside the vocabulary of 200058, found"),
        ({"user_text": 100}, "user_text: expected an id of its own, found 100, which is listen's"),
        ({"max_output_tokens": 0}, "max_output_tokens: expected a positive integer, found 0"),
        ({"speech": [1]}, "speech: expected an object, found [1]"),
    ],
)
def test_interaction_refusals(updates: dict[str, Any], problem: str) -> None:
    (line,) = problems(INKLING_SMALL | {"interaction": INTERACTION | updates})
    assert line.startswith(f"interaction.{problem}")


def test_interaction_needs_the_towers_it_feeds() -> None:
    bare = {key: INKLING_SMALL[key] for key in ("model_type", "text_config")}
    assert problems(bare | {"interaction": INTERACTION}) == [
        "interaction.audio_frames: expected an audio_config beside it, found none",
        "interaction.max_image_patches: expected 0 without a vision_config, found 64",
    ]


# --- the file -----------------------------------------------------------------------------------


def test_read_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(INKLING_SMALL))
    assert ModelConfig.read(path) == ModelConfig.from_dict(INKLING_SMALL)
    path.write_text(json.dumps(changed(INKLING_SMALL, text_config__d_rel=0)))
    with pytest.raises(CheckpointError, match=r"config\.json: text_config\.d_rel: expected a pos"):
        ModelConfig.read(path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        ModelConfig.read(tmp_path / "other.json")


# Any text that JSON can spell, lone surrogates included.
json_text = st.text(st.characters(exclude_categories=()), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | json_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(json_text, inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.fuzz
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_anywhere_is_accepted_or_refused_by_name(data: st.DataObject) -> None:
    values = changed(INKLING_SMALL, interaction=INTERACTION)
    block = data.draw(st.sampled_from(["text_config", "audio_config", "interaction", ""]))
    target = values[block] if block else values
    for key in data.draw(st.lists(st.sampled_from(sorted(target)) | json_text, min_size=1)):
        target[key] = data.draw(json_values)
    try:
        ModelConfig.from_dict(values)
        message = "config.json: "
    except CheckpointError as error:
        message = str(error)
    assert message.startswith("config.json: ")
    assert message.encode("utf-8")  # printable: no lone surrogate comes back
