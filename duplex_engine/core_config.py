"""A checkpoint's sizes in the words of the C++ core.

Owns the translation. Does not own the checking of config.json (`config.py`), nor what the core
makes of the sizes (`csrc/core/config.h`).
"""

from __future__ import annotations

from typing import Any

from duplex_engine.config import ModelConfig
from duplex_engine.errors import CheckpointError
from duplex_engine.reference import hmlp

__all__ = ["core_config", "vision_stages"]


def core_config(config: ModelConfig, mtp_layers: int = 0) -> dict[str, Any]:
    """The model's sizes in the core's words (`csrc/core/config.h`).

    Raises:
        CheckpointError: the vision tower's sizes cannot be planned.
    """
    text = config.text
    values: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "unpadded_vocab_size": text.n_logits,
        "d_model": text.hidden_size,
        "d_rel": text.d_rel,
        "d_ff": text.intermediate_size,
        "conv_kernel": text.conv_kernel_size,
        "norm_eps": text.rms_norm_eps,
        "logit_divisor": text.logits_mup_width_multiplier,
        "log_scaling_floor": text.log_scaling_n_floor or 0,
        "log_scaling_alpha": text.log_scaling_alpha,
        "global": {
            "n_heads": text.num_attention_heads,
            "n_kv_heads": text.num_key_value_heads,
            "d_head": text.head_dim,
            "rel_extent": text.rel_extent,
            "window": 0,
        },
        "local": {
            "n_heads": text.swa_num_attention_heads,
            "n_kv_heads": text.swa_num_key_value_heads,
            "d_head": text.swa_head_dim,
            "rel_extent": text.sliding_window_size,
            "window": text.sliding_window_size,
        },
        "moe": None,
        "layers": list(zip(text.is_local, text.is_moe, strict=True)),
        "mtp": {
            "is_local": list(config.mtp_is_local[:mtp_layers]),
            "has_chain_norm": mtp_layers > 0 and config.has_mtp_chain_norm,
        },
        "eos_ids": list(text.eos_token_ids),
        "audio": None,
        "vision": None,
        "interaction": None,
    }
    if any(text.is_moe):
        values["moe"] = {
            "n_experts": text.n_routed_experts,
            "n_shared": text.n_shared_experts,
            "top_k": text.num_experts_per_tok,
            "d_expert": text.moe_intermediate_size,
            "route_scale": text.route_scale,
        }
    if config.audio is not None:
        values["audio"] = {
            "n_mels": config.audio.n_mel_bins,
            "n_levels": config.audio.mel_vocab_size,
        }
    if (vision := config.vision) is not None:
        values["vision"] = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "n_channels": vision.num_channels,
            "stages": vision_stages(config),
        }
    if (layout := config.interaction) is not None:
        keys = ("audio_frames", "max_output_tokens", "max_image_patches", *layout.token_keys)
        values["interaction"] = {key: getattr(layout, key) for key in keys}
    return values


def vision_stages(config: ModelConfig) -> list[tuple[int, int, int, int]]:
    """The stages of the vision tower: (frames folded, side folded, values in, values out).

    Raises:
        CheckpointError: a patch of one pixel cannot be folded.
    """
    vision = config.vision
    if vision is None:
        return []
    try:
        stages = hmlp.plan(
            vision.patch_size,
            vision.temporal_patch_size,
            vision.num_hidden_layers,
            vision.num_channels,
        )
    except ValueError as error:
        raise CheckpointError(f"vision_config: {error}") from error
    return [(s.t_fold, s.hw_fold, s.d_in, s.d_out or config.text.hidden_size) for s in stages]
