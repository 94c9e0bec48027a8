"""PyTorch: a Qwen3 written by hand for this comparison, eager or compiled.

Written by hand because the cache of the usual library is copied whole with every step. Keys and
values lie in buffers of fixed size; attention is `scaled_dot_product_attention` over the rows that
are there. With the option "compile" the whole pass is compiled, with frozen (prepacked) weights,
once for every number of rows.
"""

from __future__ import annotations

import torch
import torch._dynamo.config
import torch._inductor.config
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peers.worker import Job, Peer, token_ids

SPARE_ROWS = 128
PREFILL_ROWS = 512
COMPILED_ROWS = 64  # compiled code reads the cache up to a multiple of so many rows


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (heads, rows, d_head)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class Layer(nn.Module):
    """One block of Qwen3, with the keys and values that it has seen."""

    def __init__(self, job: Job, max_rows: int) -> None:
        super().__init__()
        d, d_q, d_kv = job.d_model, job.n_heads * job.d_head, job.n_kv_heads * job.d_head
        self.sizes = (job.n_heads, job.n_kv_heads, job.d_head)
        self.widths = (d_q, d_kv, d_kv)
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q_norm, self.k_norm = nn.RMSNorm(job.d_head), nn.RMSNorm(job.d_head)
        self.qkv = nn.Linear(d, d_q + 2 * d_kv, bias=False)
        self.o = nn.Linear(d_q, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * job.d_ff, bias=False)
        self.down = nn.Linear(job.d_ff, d, bias=False)
        self.keys: Tensor
        self.values: Tensor
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(job.n_kv_heads, max_rows, job.d_head))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each (heads, rows, d_head)."""
        n_heads, n_kv_heads, d_head = self.sizes
        q, k, v = self.qkv(self.norm1(x)).split(self.widths, dim=-1)
        q = self.q_norm(q.view(-1, n_heads, d_head)).transpose(0, 1)
        k = self.k_norm(k.view(-1, n_kv_heads, d_head)).transpose(0, 1)
        v = v.view(-1, n_kv_heads, d_head).transpose(0, 1)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention."""
        x = x + self.o(attended.transpose(0, 1).flatten(1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out

    def attend(self, q: Tensor, mask: Tensor | None, limit: int) -> Tensor:
        """Over the first `limit` rows. The query heads of one key head become rows, so that keys
        and values are not repeated."""
        n_heads, n_kv_heads, d_head = self.sizes
        group, n = n_heads // n_kv_heads, q.shape[1]
        found = F.scaled_dot_product_attention(
            q.reshape(1, n_kv_heads, group * n, d_head),
            self.keys[None, :, :limit],
            self.values[None, :, :limit],
            attn_mask=None if mask is None else mask.repeat(group, 1),
        )
        return found.reshape(n_heads, n, d_head)


class Model(nn.Module):
    """All layers; the head is tied to the embedding."""

    def __init__(self, job: Job, max_rows: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(job.vocab_size, job.d_model)
        self.blocks = [Layer(job, max_rows) for _ in range(job.n_layers)]
        self.layers = nn.ModuleList(self.blocks)
        self.norm = nn.RMSNorm(job.d_model)
        angles = torch.outer(
            torch.arange(max_rows), 1e6 ** (-torch.arange(0, job.d_head, 2) / job.d_head)
        )
        angles = torch.cat((angles, angles), dim=-1)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: Tensor, positions: Tensor, limit: int, is_masked: bool) -> Tensor:
        """Logits of the last row. Rows at and beyond `limit` are not looked at."""
        mask = torch.arange(limit)[None, :] <= positions[:, None] if is_masked else None
        cos, sin = self.cos[positions], self.sin[positions]
        x = self.embedding(ids)
        for layer in self.blocks:
            q, k, v = layer.project(x, cos, sin)
            layer.keys.index_copy_(1, positions, k)
            layer.values.index_copy_(1, positions, v)
            x = layer.finish(x, layer.attend(q, mask, limit))
        logits: Tensor = F.linear(self.norm(x[-1:]), self.embedding.weight)[0]
        return logits


class TorchPeer(Peer):
    """The model in bfloat16."""

    def __init__(self, job: Job, option: str) -> None:
        super().__init__(job, option)
        torch.manual_seed(0)
        torch.set_num_threads(job.threads)
        torch.set_default_dtype(torch.bfloat16)
        torch.set_grad_enabled(False)
        self.model = Model(job, job.max_context + SPARE_ROWS).eval()
        if option == "compile":
            torch._inductor.config.freezing = True
            torch._dynamo.config.recompile_limit = 64
            self.compiled = torch.compile(self.model, dynamic=False, fullgraph=True)
        self.length = 0
        self.logits = torch.zeros(job.vocab_size)
        how = "eager" if option == "eager" else "torch.compile with freezing"
        self.description = f"PyTorch {torch.__version__}, hand-written Qwen3, bfloat16, {how}"

    def reset(self, context: int) -> None:
        self.length = min(self.length, context)
        while self.length < context:
            self.append(min(PREFILL_ROWS, context - self.length))

    def append(self, n: int) -> None:
        self._forward(token_ids(n, seed=self.length))

    def decode(self, n: int) -> None:
        for _ in range(n):
            self._forward([int(self.logits.argmax())])

    def _forward(self, ids: list[int]) -> None:
        end = self.length + len(ids)
        positions = torch.arange(self.length, end)
        if self.option == "compile" and len(ids) < PREFILL_ROWS:
            limit = -(-end // COMPILED_ROWS) * COMPILED_ROWS
            self.logits = self.compiled(torch.tensor(ids), positions, limit, True)
        else:
            self.logits = self.model(torch.tensor(ids), positions, end, len(ids) > 1)
        self.length = end


def load(job: Job, option: str) -> TorchPeer:
    """The hand-written model of the job's sizes."""
    return TorchPeer(job, option)
