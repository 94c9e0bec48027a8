"""The decoder of a training step: `transformers`' layers, computed for whole sequences at once.

Owns nothing but speed, about four times that of `transformers`' own forward and backward pass on a
CPU. Every parameter belongs to `transformers`' modules, and every layer has a sliding window. A
block of queries meets the keys of its window only; the relative bias is spread over them by a copy,
not a gather; what is bound by memory is compiled into one pass. Tests compare it with
`transformers`' forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["decode"]

BLOCK = 64  # queries that are computed together
NORM_EPS = 1e-6
HIDDEN = float("-inf")


def decode(layers: nn.ModuleList, rows: Tensor, *, compiled: bool) -> list[Tensor]:
    """The (batch, n, d_model) rows before the first layer, after it, and so on; not normalised.

    compiled: compile for this shape, which takes seconds once.
    """
    n = rows.shape[1]
    ops = _compiled() if compiled else _Ops(_norm, _convolve, _gated)
    after = [F.pad(rows, (0, 0, 0, -n % BLOCK))]
    for layer in layers:
        after.append(_layer(layer, after[-1], ops))
    return [x[:, :n] for x in after]


# --- what is bound by memory -------------------------------------------------------------------
class _Ops(NamedTuple):
    norm: Callable[[Tensor, Tensor], Tensor]
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gated: Callable[[Tensor, Tensor], Tensor]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS))


def _convolve(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """x: (batch, n, d), weight: (d, 1, kernel). Depthwise, causal, plus input and residual."""
    n, kernel = x.shape[1], weight.shape[-1]
    x = x.float()
    padded = F.pad(x, (0, 0, kernel - 1, 0))
    out = x if residual is None else x + residual
    for tap in range(kernel):
        out = out + padded[:, tap : tap + n] * weight[:, 0, tap]
    return out


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@cache
def _compiled() -> _Ops:
    return _Ops(*(torch.compile(op, dynamic=False) for op in (_norm, _convolve, _gated)))


# --- a layer -----------------------------------------------------------------------------------
def _layer(layer: Any, x: Tensor, ops: _Ops) -> Tensor:
    mlp = layer.mlp
    h = _attention(layer.self_attn, ops.norm(x, layer.input_layernorm.weight), ops)
    x = ops.convolve(h, layer.attn_sconv.conv1d.weight, x)
    w_gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    gate, up = (ops.norm(x, layer.post_attention_layernorm.weight) @ w_gate_up.T).chunk(2, -1)
    h = ops.gated(gate, up) @ (mlp.down_proj.weight.T * mlp.global_scale)
    return ops.convolve(h, layer.mlp_sconv.conv1d.weight, x)


def _attention(attention: Any, x: Tensor, ops: _Ops) -> Tensor:
    """(batch, n, d_model) to the same; n is a multiple of BLOCK.

    Shapes below: b batch, m blocks, h key-value heads, g query heads each, i queries of a block,
    j keys that a block may see, d width of a head.
    """
    b, n, _ = x.shape
    d, n_kv, group = (
        attention.head_dim,
        attention.num_key_value_heads,
        attention.num_key_value_groups,
    )
    n_heads = n_kv * group
    profile = attention.rel_logits_proj.proj  # (d_rel, window): the bias by distance
    d_rel, window = profile.shape
    n_blocks, n_keys = n // BLOCK, window + BLOCK

    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.r_proj)
    together = x @ torch.cat([projection.weight for projection in projections]).T
    widths = [n_heads * d, n_kv * d, n_kv * d, n_heads * d_rel]
    q, k, v, r = torch.split(together, widths, -1)
    q = ops.norm(q.reshape(b, n, n_heads, d), attention.q_norm.weight) * attention.scaling
    k = ops.convolve(k, attention.k_sconv.conv1d.weight, None).view(b, n, n_kv, d)
    k = ops.norm(k, attention.k_norm.weight)
    v = ops.convolve(v, attention.v_sconv.conv1d.weight, None).view(b, n, n_kv, d)

    def by_block(t: Tensor) -> Tensor:  # (b, n, heads, width) to (b, m, h, g, i, width)
        return t.reshape(b, n_blocks, BLOCK, n_kv, group, -1).permute(0, 1, 3, 4, 2, 5)

    keys, values = (_windows(t, window, n_blocks) for t in (k, v))  # (b, m, h, j, d)
    scores = by_block(q).flatten(3, 4) @ keys.transpose(-1, -2)
    scores = scores.view(b, n_blocks, n_kv, group, BLOCK, n_keys)

    # Query i sees key j at the distance i + window - j, so its reversed profile begins in column
    # i + 1. Lines of n_keys + 1 read as lines of n_keys move one column further from line to line.
    bias = F.pad(by_block(r) @ profile.flip(-1), (0, BLOCK + 1), value=HIDDEN).flatten(-2)
    scores = scores + F.pad(bias, (1, -BLOCK - 1), value=HIDDEN).view_as(scores)
    first = window - BLOCK * torch.arange(n_blocks, device=x.device)  # key of the stream, by block
    exists = torch.arange(n_keys, device=x.device) >= first[:, None]
    scores = scores.masked_fill(~exists[:, None, None, None], HIDDEN)

    out = (scores.softmax(-1).flatten(3, 4) @ values).view(b, n_blocks, n_kv, group, BLOCK, d)
    joined = out.permute(0, 1, 4, 2, 3, 5).reshape(b, n, n_heads * d)
    return torch.matmul(joined, attention.o_proj.weight.T)


def _windows(x: Tensor, window: int, n_blocks: int) -> Tensor:
    """(batch, n, heads, d) to (batch, blocks, heads, window + BLOCK, d): what a block sees."""
    b, n, heads, d = x.shape
    assert window % BLOCK == 0, "a window is made of whole blocks"
    padded = F.pad(x, (0, 0, 0, 0, window, 0))
    pieces = [
        padded[:, start : start + n].view(b, n_blocks, BLOCK, heads, d)
        for start in range(0, window + BLOCK, BLOCK)
    ]
    return torch.cat(pieces, 2).transpose(2, 3)
