"""Hugging Face transformers, eager, bfloat16: its Qwen3 for S and M, its Inkling for MOE.

The cache is the library's default, which grows by copying. MOE runs the very checkpoint that our
engine runs: the only comparison here in which both engines compute the same function.
"""

from __future__ import annotations

import copy
import inspect
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from bench.peers.worker import Job, Peer, token_ids

PREFILL_ROWS = 512


def qwen3(job: Job, **options: Any) -> Any:
    """A Qwen3 of random weights; `options` are more keys of its config."""
    config = transformers.Qwen3Config(
        vocab_size=job.vocab_size,
        hidden_size=job.d_model,
        intermediate_size=job.d_ff,
        num_hidden_layers=job.n_layers,
        num_attention_heads=job.n_heads,
        num_key_value_heads=job.n_kv_heads,
        head_dim=job.d_head,
        tie_word_embeddings=True,
        **{"max_position_embeddings": 1 << 20} | options,
    )
    return transformers.Qwen3ForCausalLM(config)


def inkling(job: Job) -> Any:
    """The Inkling of our own checkpoint."""
    return transformers.InklingForConditionalGeneration.from_pretrained(
        job.checkpoint, dtype=torch.bfloat16
    )


class Transformers(Peer):
    """A model and its cache."""

    def __init__(self, job: Job, option: str) -> None:
        super().__init__(job, option)
        torch.manual_seed(0)
        torch.set_num_threads(job.threads)
        torch.set_default_dtype(torch.bfloat16)
        torch.set_grad_enabled(False)
        self.model = (inkling(job) if job.shape == "MOE" else qwen3(job)).eval()
        self.can_crop = job.shape != "MOE"
        self.cache: Any = None
        self.saved: dict[int, Any] = {}  # context -> the cache at it
        self.length = 0
        self.logits = torch.zeros(job.vocab_size)
        self.description = (
            f"transformers {transformers.__version__}, {type(self.model).__name__}, bfloat16, eager"
        )

    def reset(self, context: int) -> None:
        """note: convolution states and sliding windows cannot be cropped: they are copied."""
        if self.length > context and self.can_crop:
            self.cache.crop(context - self.length)  # negative: how many to drop
            self.length = context
        elif self.length > context and context in self.saved:
            self.cache, self.length = copy.deepcopy(self.saved[context]), context
        elif self.length > context:
            self.cache, self.length = None, 0
        while self.length < context:
            self.append(min(PREFILL_ROWS, context - self.length))
        if not self.can_crop and context not in self.saved:
            self.saved = {context: copy.deepcopy(self.cache)}

    def append(self, n: int) -> None:
        self._forward(token_ids(n, seed=self.length))

    def decode(self, n: int) -> None:
        for _ in range(n):
            self._forward([int(self.logits.argmax())])

    def _forward(self, ids: list[int]) -> None:
        options: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = 1
        output = self.model(input_ids=torch.tensor([ids]), **options)
        self.cache, self.logits = output.past_key_values, output.logits[0, -1]
        self.length += len(ids)


def load(job: Job, option: str) -> Transformers:
    """The library's model of the job's sizes."""
    return Transformers(job, option)
