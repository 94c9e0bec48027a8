"""The network that is trained: Inkling as `transformers` has it, with a small config.

Owns the sizes, the batching of rows, the losses, and two things that training alone has: a second
head that names the word just heard, and a faster way to spread the relative bias. What comes out
is a genuine Inkling checkpoint; see ``export.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import InklingConfig, InklingForConditionalGeneration

from duplex_engine.reference import hmlp
from duplex_engine.training.rows import AUDIO, IMAGE, NO_TARGET, TEXT, Rows
from duplex_engine.training.vocabulary import PAD, TOKENS, VOCAB_SIZE

__all__ = ["SIZES", "Batch", "Size", "Trainee", "collate", "inkling_config"]

PATCH_SIZE = 40
HEARING_LAYER = 4  # of six: the word head reads the rows after so many layers


@dataclass(frozen=True)
class Size:
    """Sizes of a model: width, layers (the last one global), width of the MLP, heads."""

    d_model: int
    n_layers: int
    d_ff: int
    n_heads: int = 4
    n_kv_heads: int = 2
    window: int = 128  # rows: about five seconds


SIZES = {
    "toy": Size(32, 2, 48, window=32),
    "tiny": Size(128, 4, 352),
    "small": Size(192, 6, 512),
    "base": Size(256, 6, 768),
}


def inkling_config(size: Size) -> InklingConfig:
    """The config of a dense Inkling of this size, without an `interaction` block."""
    d_head = size.d_model // size.n_heads
    text = {
        "vocab_size": VOCAB_SIZE,
        "unpadded_vocab_size": len(TOKENS),
        "hidden_size": size.d_model,
        "num_hidden_layers": size.n_layers,
        "num_attention_heads": size.n_heads,
        "num_key_value_heads": size.n_kv_heads,
        "head_dim": d_head,
        "swa_num_attention_heads": size.n_heads,
        "swa_num_key_value_heads": size.n_kv_heads,
        "swa_head_dim": d_head,
        "sliding_window_size": size.window,
        "d_rel": 8,
        "rel_extent": 2 * size.window,
        "conv_kernel_size": 4,
        "intermediate_size": size.d_ff,
        "layer_types": ["hybrid_sliding"] * (size.n_layers - 1) + ["hybrid"],
        "mlp_layer_types": ["dense"] * size.n_layers,
        "logits_mup_width_multiplier": 1.0,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": PAD,
    }
    return InklingConfig(
        text_config=text,
        audio_config={"mel_vocab_size": 16},
        vision_config={"patch_size": PATCH_SIZE, "temporal_patch_size": 2, "n_layers": 2},
    )


@dataclass(slots=True)
class Batch:
    """Sequences of rows, padded to one length: (batch, rows) unless said otherwise.

    Attributes:
        kinds, targets, labels: as in `rows.Rows`; padding is PADDING and NO_TARGET.
        text: (n_text,) token ids of all text rows, in order.
        bins: (n_audio, 80) bins of all audio rows.
        patches: (n_images, 40, 40, 3) of all pictures, normalised.
    """

    kinds: Tensor
    targets: Tensor
    labels: Tensor
    text: Tensor
    bins: Tensor
    patches: Tensor

    def to(self, device: str | torch.device) -> Batch:
        """The same on another device."""
        return Batch(
            *(
                getattr(self, name).to(device, non_blocking=True)
                for name in self.__dataclass_fields__
            )
        )


def collate(sequences: Sequence[Rows], n_rows: int | None = None) -> Batch:
    """Stacks sequences; `n_rows` pads or cuts them to a fixed length, None takes the longest."""
    length = max(len(rows.kinds) for rows in sequences) if n_rows is None else n_rows

    def stacked(name: str, fill: int) -> Tensor:
        padded = np.full((len(sequences), length), fill, np.int64)
        for row, rows in zip(padded, sequences, strict=True):
            values = getattr(rows, name)[:length]
            row[: len(values)] = values
        return torch.from_numpy(padded)

    def chosen(rows: Rows, kind: int) -> NDArray[np.int32]:
        values: NDArray[np.int32] = rows.values[:length][rows.kinds[:length] == kind]
        return values

    pictures = [hmlp.patchify(rows.images[i])[0] for rows in sequences for i in chosen(rows, IMAGE)]
    empty = np.zeros((0, PATCH_SIZE, PATCH_SIZE, 3), np.float32)
    return Batch(
        kinds=stacked("kinds", 0),
        targets=stacked("targets", NO_TARGET),
        labels=stacked("labels", NO_TARGET),
        text=torch.from_numpy(np.concatenate([chosen(rows, TEXT) for rows in sequences])).long(),
        bins=torch.from_numpy(
            np.concatenate([rows.bins[chosen(rows, AUDIO)] for rows in sequences])
        ),
        patches=torch.from_numpy(np.stack(pictures) if pictures else empty),
    )


class _SkewedBias(nn.Module):
    """Inkling's relative bias for a whole sequence at once, without gathering.

    The bias of query i and key j is entry i - j of row i. Padding every reversed row by the
    sequence's length and reading the memory in rows one shorter puts that entry at column j. The
    gradient is then a copy, where a gather's would add into shared cells.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.proj = cast(nn.Parameter, original.proj)  # (d_rel, extent)

    def forward(self, relative_states: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """(batch, rows, heads, d_rel) to (batch, heads, rows, rows)."""
        assert len(queries) == len(keys), "training has no cache: every row is query and key"
        n, extent = len(queries), self.proj.shape[1]
        profiles = (relative_states @ self.proj.flip(-1)).transpose(1, 2)  # (b, h, n, extent)
        n_more = max(extent - n, 0)  # rows needed to fill the last line
        padded = F.pad(profiles, (0, n, 0, n_more))
        skewed = padded.flatten(2)[..., extent - 1 :][..., : n * (n + extent - 1)]
        lines: Tensor = skewed.reshape(*skewed.shape[:-1], n, n + extent - 1)
        return lines[..., :n]


class Trainee(nn.Module):
    """The Inkling model, and the head that names the word just heard."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        config = inkling_config(size)
        config._attn_implementation = "eager"
        self.inkling = InklingForConditionalGeneration(config)
        self.word_head = nn.Linear(size.d_model, VOCAB_SIZE, bias=False)
        self._hearing_layer = min(HEARING_LAYER, size.n_layers)
        self._window = size.window
        self._initialise()
        for layer in self.inkling.model.language_model.layers:
            layer.self_attn.rel_logits_proj = _SkewedBias(layer.self_attn.rel_logits_proj)

    def _initialise(self) -> None:
        """Draws matrices by their fan-in: transformers' 0.02 is meant for wide models."""
        for name, parameter in self.named_parameters():
            if "norm" in name or "global_scale" in name:
                continue
            if "sconv" in name:
                nn.init.normal_(parameter, std=0.1)
            elif "rel_logits_proj" in name or "lm_head" in name or "word_head" in name:
                nn.init.normal_(parameter, std=0.02)
            elif "embed" in name:
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
                if "o_proj" in name or "down_proj" in name:
                    parameter.data *= 0.3

    def embed(self, batch: Batch) -> Tensor:
        """The rows of a batch, each by the tower of its kind: (batch, rows, d_model)."""
        model = self.inkling.model
        text = model.language_model.embed_tokens(batch.text)
        audio = model.audio_tower(batch.bins.long()).last_hidden_state
        rows = torch.zeros(*batch.kinds.shape, text.shape[-1], dtype=text.dtype, device=text.device)
        rows[batch.kinds == TEXT] = text
        rows[batch.kinds == AUDIO] = audio.to(text.dtype)
        if len(batch.patches):
            frames = model.config.vision_config.temporal_patch_size
            clips = batch.patches[:, None].expand(-1, frames, -1, -1, -1)
            pictures = model.vision_tower(clips).last_hidden_state[:, 0]
            rows[batch.kinds == IMAGE] = pictures.to(text.dtype)
        return rows

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of all rows: of the next output, and of the word just heard."""
        n_rows = batch.kinds.shape[1]
        output = self.inkling.model(
            inputs_embeds=self.embed(batch),
            attention_mask=self._masks(n_rows, batch.kinds.device),
            use_cache=False,
            output_hidden_states=True,
        )
        words = self.word_head(output.hidden_states[self._hearing_layer])
        return self.inkling.lm_head(output.last_hidden_state), words

    def _masks(self, n_rows: int, device: torch.device) -> dict[str, Any]:
        """Additive masks; padding is behind every row that counts, so it needs none."""
        position = torch.arange(n_rows, device=device)
        distance = position[:, None] - position
        hidden = {
            "full_attention": distance < 0,
            "sliding_attention": (distance < 0) | (distance >= self._window),
        }
        return {
            name: torch.zeros(n_rows, n_rows, device=device).masked_fill(mask, float("-inf"))[
                None, None
            ]
            for name, mask in hidden.items()
        } | {"linear_attention": None}


def losses(trainee: Trainee, batch: Batch) -> dict[str, Tensor]:
    """Mean cross-entropies "token" and "word", and teacher-forced shares of right tokens."""
    logits, words = trainee(batch)
    has_target = batch.targets != NO_TARGET
    has_label = batch.labels != NO_TARGET
    targets, labels = batch.targets[has_target], batch.labels[has_label]
    logits, words = logits[has_target].float(), words[has_label].float()
    speaks, heard = targets != 0, labels != 0
    right = logits.detach().argmax(-1) == targets
    return {
        "token": F.cross_entropy(logits, targets),
        "word": F.cross_entropy(words, labels),
        "spoken": right[speaks].float().mean(),
        "silent": right[~speaks].float().mean(),
        "heard": (words.detach().argmax(-1) == labels)[heard].float().mean(),
    }
