"""The Inkling decoder on one whole sequence: rows in, logits out. Mirrors inkling.cpp.

Weights are a dict from Thinking Machines' tensor names to arrays, `config` is the `text_config`
block of config.json. Sizes in comments: n rows, h query heads, g key/value heads, d head size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from safetensors import deserialize

Array = NDArray[Any]  # float32 or float64: the arithmetic keeps the dtype of the weights
Weights = Mapping[str, Array]
Config = Mapping[str, Any]

AUDIO_NORM_EPS = 1e-6
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def load(directory: str | Path, dtype: DTypeLike = np.float32) -> tuple[dict[str, Array], Config]:
    """Read a checkpoint. Returns (weights by Thinking Machines' names, the whole config.json)."""
    folder = Path(directory)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"expected *.safetensors in {folder}, found none")
    weights: dict[str, Array] = {}
    for file in files:
        for name, tensor in deserialize(file.read_bytes()):  # type: ignore[no-untyped-call]
            stored = tensor["dtype"]
            if stored not in _DTYPES:
                raise ValueError(f"{name}: expected one of {sorted(_DTYPES)}, found {stored}")
            values = np.frombuffer(tensor["data"], _DTYPES[stored])
            if stored == "BF16":  # the upper half of a float32
                values = (values.astype(np.uint32) << 16).view(np.float32)
            weights[name] = values.reshape(tensor["shape"]).astype(dtype)
    return weights, json.loads((folder / "config.json").read_text(encoding="utf-8"))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Scale the last axis to a root mean square of one, then by `weight` (d,). Same shape."""
    root_mean_square = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return np.asarray(weight * (x / root_mean_square))


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), written so that no large exponential is formed."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def embed_text(ids: ArrayLike, weights: Weights, config: Config) -> Array:
    """(n,) token ids -> (n, d_model) rows."""
    rows = weights["model.llm.embed.weight"][np.asarray(ids, dtype=np.int64)]
    return rms_norm(rows, weights["model.llm.embed_norm.weight"], config["rms_norm_eps"])


def embed_audio(bins: ArrayLike, weights: Weights) -> Array:
    """(n_frames, n_mels) dMel bins -> (n_frames, d_model) rows: sum one table row per mel band."""
    table = weights["model.audio.encoder.weight"]  # (n_mels * n_levels, d_model)
    levels = np.asarray(bins, dtype=np.int64)
    n_mels = levels.shape[1]
    rows = table[levels + np.arange(n_mels) * (len(table) // n_mels)].sum(axis=1)
    return rms_norm(rows, weights["model.audio.final_norm.weight"], AUDIO_NORM_EPS)


def short_conv(x: Array, weight: Array) -> Array:
    """Depthwise causal convolution plus its input. x (n, d), weight (d, 1, kernel) -> (n, d)."""
    kernel = weight.shape[-1]
    padded = np.concatenate([np.zeros((kernel - 1, x.shape[1]), x.dtype), x])
    # Tap `kernel - 1` meets the newest row.
    return x + sum(padded[t : t + len(x)] * weight[:, 0, t] for t in range(kernel))


def is_sliding(config: Config, layer: int) -> bool:
    """Whether a layer sees only the newest `sliding_window_size` rows."""
    if config.get("layer_types") is not None:
        return bool(config["layer_types"][layer] == "hybrid_sliding")
    if config.get("local_layer_ids") is not None:
        return layer in config["local_layer_ids"]
    return (layer + 1) % 6 != 0


def attention(
    x: Array, weights: Weights, config: Config, layer: int, visible: NDArray[np.bool_] | None = None
) -> Array:
    """Grouped-query attention with a learned relative bias. x (n, d_model) -> (n, d_model).

    visible: (n, n), visible[i, j] False where row i may no longer see row j because j was
    forgotten before i was appended; None when nothing was forgotten. Positions keep counting.
    """
    prefix = f"model.llm.layers.{layer}.attn"
    sliding = is_sliding(config, layer)
    n, d = len(x), config["swa_head_dim" if sliding else "head_dim"]
    eps = config["rms_norm_eps"]

    def heads(name: str) -> Array:
        return (x @ weights[f"{prefix}.{name}.weight"].T).reshape(n, -1)

    k = short_conv(heads("wk_dv"), weights[f"{prefix}.k_sconv.weight"]).reshape(n, -1, d)
    v = short_conv(heads("wv_dv"), weights[f"{prefix}.v_sconv.weight"]).reshape(n, -1, d)
    q = rms_norm(heads("wq_du").reshape(n, -1, d), weights[f"{prefix}.q_norm.weight"], eps)
    k = rms_norm(k, weights[f"{prefix}.k_norm.weight"], eps)
    n_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # (n, h, d)

    # The bias of row i towards row j: r_i picks a mixture of profiles over the distance i - j.
    profiles = weights[f"{prefix}.rel_logits_proj.proj"]  # (d_rel, extent)
    extent = profiles.shape[1]
    by_distance = heads("wr_du").reshape(n, n_heads, -1) @ profiles  # (n, h, extent)
    distance = np.arange(n)[:, None] - np.arange(n)  # (n, n)
    bias = by_distance[np.arange(n)[:, None], :, np.clip(distance, 0, extent - 1)]  # (n, n, h)
    bias = np.where((distance >= 0) & (distance < extent), bias.transpose(2, 0, 1), 0.0)

    scores = np.einsum("ihd,jhd->hij", q, k) / d + bias.astype(x.dtype)  # q, k are normed: 1 / d
    if not sliding and config.get("log_scaling_n_floor") is not None:
        beyond = np.maximum((np.arange(n) + 1) / config["log_scaling_n_floor"], 1.0)
        tau = 1.0 + config["log_scaling_alpha"] * np.log(beyond)
        scores = scores * tau[:, None].astype(x.dtype)  # scales q and the bias alike

    seen = distance >= 0
    if sliding:
        seen &= distance < config["sliding_window_size"]
    if visible is not None:
        seen &= visible
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = np.einsum("hij,jhd->ihd", shares, v).reshape(n, -1)
    return np.asarray(mixed @ weights[f"{prefix}.wo_ud.weight"].T)


def gated(x: Array, w13: Array) -> Array:
    """silu(gate) * up with interleaved rows: gate = even, up = odd. (n, d) -> (n, d_ff)."""
    return np.asarray(silu(x @ w13[0::2].T) * (x @ w13[1::2].T))


def mlp(x: Array, weights: Weights, prefix: str) -> Array:
    """Dense feed-forward layer. x (n, d_model) -> (n, d_model)."""
    hidden = gated(x, weights[f"{prefix}.w13_dn.weight"])
    return hidden @ weights[f"{prefix}.w2_md.weight"].T * weights[f"{prefix}.global_scale"]


def moe(x: Array, weights: Weights, config: Config, prefix: str) -> Array:
    """Routed and shared experts, weighted together. x (n, d_model) -> (n, d_model)."""
    n_routed, top_k = config["n_routed_experts"], config["num_experts_per_tok"]
    scores = sigmoid(x @ weights[f"{prefix}.gate.weight"].T)  # (n, n_routed + n_shared)
    # The selection bias decides who is chosen, never with what weight.
    preference = scores[:, :n_routed] + weights[f"{prefix}.gate.bias"]
    routed = np.argsort(-preference, axis=1, kind="stable")[:, :top_k]
    shared = np.broadcast_to(
        np.arange(n_routed, scores.shape[1]), (len(x), scores.shape[1] - n_routed)
    )
    chosen = np.concatenate([routed, shared], axis=1)  # (n, top_k + n_shared)
    share = np.take_along_axis(scores, chosen, axis=1)
    share /= share.sum(axis=1, keepdims=True)
    share *= config["route_scale"] * weights[f"{prefix}.gate.global_scale"]

    experts, sinks = f"{prefix}.experts", f"{prefix}.shared_experts.shared"
    out = np.zeros_like(x)
    for e in range(scores.shape[1]):
        row, slot = np.nonzero(chosen == e)
        if e < n_routed:
            w13, w2 = weights[f"{experts}.w13_weight"][e], weights[f"{experts}.w2_weight"][e]
        else:
            w13 = weights[f"{sinks}_w13_weight"][e - n_routed]
            w2 = weights[f"{sinks}_w2_weight"][e - n_routed]
        out[row] += gated(x[row], w13) @ w2.T * share[row, slot, None]
    return out


def forward(
    rows: Array, weights: Weights, config: Config, visible: NDArray[np.bool_] | None = None
) -> Array:
    """Rows of a whole sequence to logits: (n, d_model) -> (n, unpadded vocabulary).

    visible: see `attention`.
    """
    x, eps = rows, config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.llm.layers.{layer}"
        normed = rms_norm(x, weights[f"{prefix}.attn_norm.weight"], eps)
        mixed = attention(normed, weights, config, layer, visible)
        x = x + short_conv(mixed, weights[f"{prefix}.attn_sconv.weight"])
        normed = rms_norm(x, weights[f"{prefix}.mlp_norm.weight"], eps)
        if f"{prefix}.mlp.gate.weight" in weights:
            mixed = moe(normed, weights, config, f"{prefix}.mlp")
        else:
            mixed = mlp(normed, weights, f"{prefix}.mlp")
        x = x + short_conv(mixed, weights[f"{prefix}.mlp_sconv.weight"])
    final = rms_norm(x, weights["model.llm.norm.weight"], eps)
    head = weights["model.llm.unembed.weight"][: config.get("unpadded_vocab_size")]
    return np.asarray((final / config["logits_mup_width_multiplier"]) @ head.T)
