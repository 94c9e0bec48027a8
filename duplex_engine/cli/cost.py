"""What one micro-turn costs: bytes to read and operations to do, from the sizes alone.

Owns the arithmetic of `duplex-engine inspect`. A pass reads every weight that it uses once and
every visible key and value once, however many rows it has; that is the floor, not a forecast.
"""

from __future__ import annotations

from dataclasses import dataclass

from duplex_engine.config import ModelConfig, TextConfig

__all__ = ["Cost", "Machine", "pass_cost", "turn_passes"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured here: bytes read and float32 operations per second, all threads."""

    read_bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a pass, or of several: bytes read, and operations (a multiply and an add are two)."""

    n_bytes: int
    operations: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.n_bytes + other.n_bytes, self.operations + other.operations)

    def floor_ms(self, machine: Machine) -> float:
        """Milliseconds below which one pass cannot get: its reading and its computing overlap."""
        return 1000 * max(
            self.n_bytes / machine.read_bytes_per_s, self.operations / machine.operations_per_s
        )


def turn_passes(config: ModelConfig, n_tokens: int) -> list[int]:
    """Rows of each pass of a micro-turn that puts out `n_tokens` and takes in nothing but sound.

    The last token of the turn before comes with the sound; each token but the last needs a pass.
    """
    n_frames = 4 if config.interaction is None else config.interaction.audio_frames
    return [n_frames + 1] + [1] * (n_tokens - 1)


def pass_cost(
    config: ModelConfig, n_rows: int, context: int, cache_bytes: float, weight_bytes: float
) -> Cost:
    """Cost of one pass of `n_rows` that sees `context` positions, logits of the last row included.

    cache_bytes, weight_bytes: of one element of the cache and of one weight.
    """
    text = config.text
    n_weights = text.n_logits * text.hidden_size  # first the head, for one row
    n_multiplies = n_weights
    n_cached = 0
    for is_local, is_moe in zip(text.is_local, text.is_moe, strict=True):
        weights, cached, multiplies = _attention(text, is_local, n_rows, context)
        n_weights, n_multiplies = n_weights + weights, n_multiplies + multiplies
        n_cached += cached
        weights, multiplies = _mlp(text, is_moe, n_rows)
        n_weights, n_multiplies = n_weights + weights, n_multiplies + multiplies
    return Cost(round(n_weights * weight_bytes + n_cached * cache_bytes), 2 * n_multiplies)


def _attention(text: TextConfig, is_local: bool, n_rows: int, context: int) -> tuple[int, int, int]:
    """Weights read, cached elements read, multiplications."""
    n_heads = text.swa_num_attention_heads if is_local else text.num_attention_heads
    n_kv_heads = text.swa_num_key_value_heads if is_local else text.num_key_value_heads
    d_head = text.swa_head_dim if is_local else text.head_dim
    extent = text.sliding_window_size if is_local else text.rel_extent
    n_keys = min(context, text.sliding_window_size) if is_local else context
    outputs = 2 * n_heads * d_head + 2 * n_kv_heads * d_head + n_heads * text.d_rel
    weights = outputs * text.hidden_size
    keys_and_values = 2 * n_keys * n_kv_heads * d_head
    profiles = text.d_rel * extent
    per_row = 2 * n_keys * n_heads * d_head + n_heads * text.d_rel * min(n_keys, extent)
    return weights + profiles, keys_and_values, n_rows * (weights + per_row)


def _mlp(text: TextConfig, is_moe: bool, n_rows: int) -> tuple[int, int]:
    if not is_moe:
        weights = 3 * text.hidden_size * text.intermediate_size
        return weights, n_rows * weights
    expert = 3 * text.hidden_size * text.moe_intermediate_size
    router = (text.n_routed_experts + text.n_shared_experts) * text.hidden_size
    # Rows that choose independently touch this many different experts on average.
    missed = (1 - text.num_experts_per_tok / text.n_routed_experts) ** n_rows
    touched = text.n_routed_experts * (1 - missed) + text.n_shared_experts
    per_row = router + (text.num_experts_per_tok + text.n_shared_experts) * expert
    return router + round(touched * expert), n_rows * per_row
