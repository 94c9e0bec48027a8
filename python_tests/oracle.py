"""The oracle: tiny random Inkling models run by Hugging Face transformers.

`CONFIGS` draws settings from every switch of the architecture, `build` makes and saves the model
of one setting, `logits` and `greedy` say what it computes. A prompt is a list of parts, each
("text", ids (n,)), ("audio", bins (n, 80)) or ("image", patches (n, p, p, 3)).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from packaging.version import Version
from transformers import (
    InklingConfig,
    InklingFeatureExtractor,
    InklingForCausalLM,
    InklingForConditionalGeneration,
    InklingProcessor,
    InklingTextConfig,
)

# Before, names of weights and the norm of embedded tokens were others: most tests would fail.
assert Version(transformers.__version__) >= Version("5.23"), (
    f"transformers: expected 5.23 or newer, found {transformers.__version__}; "
    "`pip install 'duplex_engine[test]'` has it"
)
Part = tuple[str, Any]

_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 16,
    "d_rel": 4,
    "rel_extent": 24,
    "conv_kernel_size": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "route_scale": 1.0,
    "logits_mup_width_multiplier": 2.0,
    "max_position_embeddings": 4096,
}
_VISION = {"patch_size": 8, "temporal_patch_size": 2, "n_layers": 2}
_ODD = {
    "vocab_size": 97,
    "hidden_size": 40,
    "head_dim": 12,
    "swa_head_dim": 20,
    "d_rel": 3,
    "intermediate_size": 52,
    "moe_intermediate_size": 28,
}

# The name of the cache in calls and outputs: transformers 5.24 renamed it.
_CALL = inspect.signature(InklingForConditionalGeneration.forward)
CACHE = "cache" if "cache" in _CALL.parameters else "past_key_values"


def _config(
    layers: str, vision: dict[str, Any] | None = None, **text: Any
) -> dict[str, dict[str, Any]]:
    """One setting. layers: a word per layer, [l]ocal or [g]lobal then [d]ense or [m]oe."""
    words = layers.split()
    return {
        "text_config": _TEXT
        | {
            "num_hidden_layers": len(words),
            "layer_types": [{"l": "hybrid_sliding", "g": "hybrid"}[word[0]] for word in words],
            "mlp_layer_types": [{"d": "dense", "m": "sparse"}[word[1]] for word in words],
        }
        | text,
        "audio_config": {"mel_vocab_size": 16},
        "vision_config": _VISION | (vision or {}),
    }


CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "dense_global": _config("gd gd"),
    "dense_local": _config("ld ld ld"),
    "dense_mixed": _config("ld gd ld gd", {"n_layers": 3}),
    "moe_global": _config("gm gm", n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2),
    "moe_local": _config("lm lm", {"n_layers": 1}, n_routed_experts=5, num_experts_per_tok=1),
    "moe_mixed": _config(
        "ld lm gm",
        {"patch_size": 16, "n_layers": 3},
        n_routed_experts=16,
        num_experts_per_tok=6,
        n_shared_experts=3,
        route_scale=2.5,
    ),
    "moe_all_experts": _config("gm lm", n_routed_experts=3, num_experts_per_tok=3, route_scale=8.0),
    "uneven_heads": _config(
        "ld gd lm gm",
        swa_num_attention_heads=6,
        swa_num_key_value_heads=6,
        swa_head_dim=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=24,
    ),
    "odd_sizes": _config("ld gm ld", **_ODD, swa_num_attention_heads=3, swa_num_key_value_heads=3)
    | {"audio_config": {"mel_vocab_size": 24}},
    "odd_sizes_moe": _config(
        "gm lm",
        {"n_layers": 4},
        **(_ODD | {"head_dim": 20, "swa_head_dim": 12, "d_rel": 5}),
        n_routed_experts=7,
        n_shared_experts=2,
        unpadded_vocab_size=89,
    ),
    "log_scaling": _config("gd lm gd", log_scaling_n_floor=6, log_scaling_alpha=0.7),
    "padded_vocab": _config("gd ld", unpadded_vocab_size=101, logits_mup_width_multiplier=0.5),
    "short_extent": _config("gd lm", rel_extent=3, sliding_window_size=32),
    "long_extent": _config("gd lm", rel_extent=512, sliding_window_size=6),
    "tiny_window": _config("ld gm lm", sliding_window_size=5, conv_kernel_size=3, rel_extent=5),
    "wide_window": _config("lm ld gd", sliding_window_size=64, conv_kernel_size=2, rel_extent=40),
    "one_kv_head": _config(
        "gd ld gm", num_key_value_heads=1, swa_num_key_value_heads=1, rms_norm_eps=1e-5
    ),
    "wide_mlp": _config("gd ld", {"n_layers": 4}, intermediate_size=1024),
    "stock_patches": _config("ld gm", {"patch_size": 40, "n_layers": 3}, hidden_size=32),
    "four_frame_patches": _config("ld gd", {"temporal_patch_size": 4, "n_layers": 3}),
    "bigger": _config(
        "ld lm lm lm lm gm",
        {"patch_size": 16, "n_layers": 3},
        vocab_size=512,
        unpadded_vocab_size=500,
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        swa_num_attention_heads=8,
        swa_num_key_value_heads=4,
        swa_head_dim=32,
        d_rel=16,
        sliding_window_size=32,
        rel_extent=64,
        intermediate_size=512,
        moe_intermediate_size=96,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=2,
        log_scaling_n_floor=16,
    ),
}


def _scatter_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw every tensor so that no factor is trivially 0 or 1 and no output is flat."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("global_scale"):
            tensor.data = 1.0 + 0.3 * noise
        elif name.endswith("e_score_correction_bias"):
            tensor.data = 0.2 * noise
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor.data = 2.0 + 0.3 * noise  # larger: attention is far from uniform
        elif "norm" in name:
            tensor.data = 1.0 + 0.2 * noise
        elif "sconv" in name:
            tensor.data = 0.3 * noise
        elif "embed" in name:
            tensor.data = noise
        elif name.endswith("lm_head.weight"):
            tensor.data = 4.0 * noise / tensor.shape[-1] ** 0.5
        elif name.endswith("rel_logits_proj.proj"):
            tensor.data = 0.7 * noise
        else:
            tensor.data = noise / tensor.shape[-1] ** 0.5


def build(
    name: str, directory: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32
) -> InklingForConditionalGeneration:
    """Make the random model `CONFIGS[name]`, save it in `directory` in `dtype`, read it back.

    The returned model computes in float32 with the weights as saved (rounded to `dtype`), so it
    is the reference for every reader of that file.
    """
    model = InklingForConditionalGeneration(InklingConfig(**CONFIGS[name]))
    _scatter_weights(model, seed)
    model.to(dtype).save_pretrained(directory)
    return load(directory)


def build_text_model(name: str, directory: str | Path, **options: Any) -> InklingForCausalLM:
    """Make the decoder of `CONFIGS[name]` alone and save it; `options` are `save_pretrained`'s."""
    model = InklingForCausalLM(InklingTextConfig(**CONFIGS[name]["text_config"]))
    _scatter_weights(model, seed=0)
    model.save_pretrained(directory, **options)
    return model.eval().requires_grad_(False)


def load(
    directory: str | Path, dtype: torch.dtype = torch.float32
) -> InklingForConditionalGeneration:
    """Read a saved model to compute in `dtype`: shows what transformers loses at a precision."""
    model = InklingForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def embed(model: InklingForConditionalGeneration, parts: Sequence[Part]) -> torch.Tensor:
    """The rows of a prompt: (n, d_model), in the order of its parts."""
    rows = []
    for kind, values in parts:
        tensor = torch.from_numpy(np.array(values))
        if kind == "text":
            rows.append(model.model.language_model.embed_tokens(tensor.long()))
        elif kind == "audio":
            rows.append(model.model.audio_tower(tensor.long()).last_hidden_state)
        elif kind == "image":
            n_frames = model.config.vision_config.temporal_patch_size
            clip = tensor.to(model.dtype)[:, None].repeat(1, n_frames, 1, 1, 1)
            rows.append(model.model.vision_tower(clip).last_hidden_state[:, 0])
        else:
            raise ValueError(f"expected a text, audio or image part, found {kind!r}")
    return torch.cat(rows)


def masks(model: InklingForConditionalGeneration, visible: NDArray[np.bool_]) -> dict[str, Any]:
    """Additive masks (1, 1, n, n) per kind of layer for a sequence with forgotten ranges."""
    n = len(visible)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    seen = (distance >= 0) & torch.from_numpy(visible)
    near = seen & (distance < model.config.text_config.sliding_window_size)

    def additive(mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape).masked_fill(~mask, float("-inf")).to(model.dtype)[None, None]

    return {
        "full_attention": additive(seen),
        "sliding_attention": additive(near),
        "linear_attention": None,
    }


@torch.no_grad()
def logits(
    model: InklingForConditionalGeneration,
    parts: Sequence[Part],
    visible: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Logits of a whole prompt at once: (n, unpadded vocabulary).

    visible: (n, n), False at [i, j] where row i may no longer see row j; None: nothing forgotten.
    """
    mask = None if visible is None else masks(model, visible)
    output = model(inputs_embeds=embed(model, parts)[None], attention_mask=mask, use_cache=False)
    result: NDArray[np.float32] = output.logits[0].float().numpy()
    return result


@torch.no_grad()
def greedy(
    model: InklingForConditionalGeneration, parts: Sequence[Part], n_tokens: int
) -> list[int]:
    """The `n_tokens` most likely tokens after a prompt, one by one; end tokens do not stop it."""
    output = model(inputs_embeds=embed(model, parts)[None], use_cache=True)
    tokens = [int(output.logits[0, -1].argmax())]
    while len(tokens) < n_tokens:
        output = model(
            input_ids=torch.tensor([[tokens[-1]]]),
            **{CACHE: getattr(output, CACHE)},
            use_cache=True,
        )
        tokens.append(int(output.logits[0, -1].argmax()))
    return tokens


def random_parts(
    model: InklingForConditionalGeneration,
    seed: int,
    n_text: int = 64,
    n_audio: int = 8,
    n_image: int = 3,
) -> list[Part]:
    """A prompt of all three kinds: text, image, audio, text."""
    rng = np.random.default_rng(seed)
    text, vision = model.config.text_config, model.config.vision_config
    ids = rng.integers(0, text.unpadded_vocab_size or text.vocab_size, n_text)
    bins = rng.integers(0, 16, (n_audio, model.config.audio_config.n_mel_bins))
    side = vision.patch_size
    patches = rng.standard_normal((n_image, side, side, 3)).astype(np.float32)
    head = n_text // 2
    return [("text", ids[:head]), ("image", patches), ("audio", bins), ("text", ids[head:])]


def log_mel(samples: NDArray[Any]) -> NDArray[np.float32]:
    """What transformers hears, before it is rounded to bins: (n,) -> (frames, 80)."""
    inputs = InklingFeatureExtractor()(samples.astype(np.float32), sampling_rate=16_000)
    result: NDArray[np.float32] = inputs["input_features"][0].numpy()
    return result


def dmel_bins(log_mels: NDArray[np.float32]) -> NDArray[np.int32]:
    """The bins that transformers rounds `log_mel` to; same shape."""
    processor = InklingProcessor.__new__(InklingProcessor)  # its constructor needs a tokenizer
    processor.dmel_min_value, processor.dmel_max_value = -7.0, 2.0
    processor.bin_centers = torch.linspace(-7.0, 2.0, 16, dtype=torch.float64).float()
    result: NDArray[np.int32] = processor._extract_dmel_bins(torch.from_numpy(log_mels)).numpy()
    return result
