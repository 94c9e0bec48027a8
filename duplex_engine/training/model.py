"""The network that is trained: Inkling as `transformers` has it, with a small config.

Owns the sizes, the batching of rows, the losses, and two things that training alone has: a second
head that names the word just heard, and a faster pass over the layers (``decoder.py``). What comes
out is a genuine Inkling checkpoint; see ``export.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import InklingConfig, InklingForConditionalGeneration

from duplex_engine.errors import InvalidArgument
from duplex_engine.reference import hmlp
from duplex_engine.training.decoder import decode
from duplex_engine.training.rows import AUDIO, IMAGE, NO_TARGET, PADDING, TEXT, Rows
from duplex_engine.training.vocabulary import (
    LISTEN,
    PAD,
    TOKENS,
    VOCAB_SIZE,
    is_tokenizer,
    other_tokens,
)

__all__ = ["SIZES", "Batch", "Size", "Trainee", "collate", "inkling_config"]

PATCH_SIZE = 40
N_LEVELS = 16  # of a dMel bin
NO_WORD = 0  # label of a frame before which no word ended
UNCOUNTED = -100  # target of an output that a loss leaves out
BLUR_BANDS, BLUR_LEVELS, BLUR_PEAK = 1.0, 1.0, 0.3
REACH = (2.0, 5.0, 15.0, 50.0)  # rows, of the heads of a layer
NEARNESS = 4.0  # bias of the nearest row
COMMON = 0.4  # of an embedded row
USUAL_LEVELS = slice(7, 11)  # of speech at a usual loudness
SOUND_TABLE = "model.audio_tower.embed_audio_tokens.embed_audio_tokens"
# Layers after which the words just heard, and those that should come next, are read.
HEARING_LAYER, EXPECTING_LAYER = 4, 5


@dataclass(frozen=True)
class Size:
    """Sizes of a model: width, layers, width of the MLP, heads, and the window of every layer."""

    d_model: int
    n_layers: int
    d_ff: int
    n_heads: int = 4
    n_kv_heads: int = 2
    window: int = 192  # rows: about seven seconds


SIZES = {
    "toy": Size(32, 2, 48, window=64),
    "tiny": Size(128, 4, 352),
    "small": Size(192, 7, 512),
    "base": Size(256, 8, 768),
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
        "rel_extent": size.window,
        "conv_kernel_size": 4,
        "intermediate_size": size.d_ff,
        "layer_types": ["hybrid_sliding"] * size.n_layers,
        "mlp_layer_types": ["dense"] * size.n_layers,
        "logits_mup_width_multiplier": 1.0,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": PAD,
    }
    return InklingConfig(
        text_config=text,
        audio_config={"mel_vocab_size": N_LEVELS},
        vision_config={"patch_size": PATCH_SIZE, "temporal_patch_size": 2, "n_layers": 2},
    )


@dataclass(slots=True)
class Batch:
    """Sequences of rows, padded to one length, and where things are: a GPU is asked for no place.

    Attributes:
        sources: (batch, rows) numbers of what is embedded: 0 for padding, then all tokens of
            `text`, all frames of `bins`, all `patches`.
        text: (n_text,) token ids of all text rows, in order.
        bins: (n_audio, 80) bins of all audio rows.
        patches: (n_images, 40, 40, 3) of all pictures, normalised.
        target_rows, targets: (n_targets,) rows, counted through all sequences, and their targets.
        label_rows, labels, expected: (n_labels,) likewise, see `rows.Rows`.
    """

    sources: Tensor
    text: Tensor
    bins: Tensor
    patches: Tensor
    target_rows: Tensor
    targets: Tensor
    label_rows: Tensor
    labels: Tensor
    expected: Tensor

    def to(self, device: str | torch.device) -> Batch:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same where a GPU can fetch it by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(change(getattr(self, name)) for name in self.__dataclass_fields__))


def collate(sequences: Sequence[Rows], n_rows: int | None = None) -> Batch:
    """Stacks sequences; `n_rows` pads or cuts them to a fixed length, None takes the longest."""
    length = max(len(rows.kinds) for rows in sequences) if n_rows is None else n_rows

    def stacked(name: str, fill: int) -> NDArray[np.int64]:
        padded = np.full((len(sequences), length), fill, np.int64)
        for row, rows in zip(padded, sequences, strict=True):
            values = getattr(rows, name)[:length]
            row[: len(values)] = values
        return padded

    def chosen(rows: Rows, kind: int) -> NDArray[np.int32]:
        values: NDArray[np.int32] = rows.values[:length][rows.kinds[:length] == kind]
        return values

    kinds = stacked("kinds", PADDING)
    targets, labels, expected = (
        stacked(name, NO_TARGET).reshape(-1) for name in ("targets", "labels", "expected")
    )
    sources, n_sources = np.zeros_like(kinds), 1
    for kind in (TEXT, AUDIO, IMAGE):
        is_kind = kinds == kind
        n = int(is_kind.sum())
        sources[is_kind] = np.arange(n_sources, n_sources + n)
        n_sources += n
    target_rows, label_rows = ((t != NO_TARGET).nonzero()[0] for t in (targets, labels))
    pictures = [hmlp.patchify(rows.images[i])[0] for rows in sequences for i in chosen(rows, IMAGE)]
    empty = np.zeros((0, PATCH_SIZE, PATCH_SIZE, 3), np.float32)
    return Batch(
        sources=torch.from_numpy(sources),
        text=torch.from_numpy(np.concatenate([chosen(rows, TEXT) for rows in sequences])).long(),
        bins=torch.from_numpy(
            np.concatenate([rows.bins[chosen(rows, AUDIO)] for rows in sequences])
        ),
        patches=torch.from_numpy(np.stack(pictures) if pictures else empty),
        target_rows=torch.from_numpy(target_rows),
        targets=torch.from_numpy(targets[target_rows]),
        label_rows=torch.from_numpy(label_rows),
        labels=torch.from_numpy(labels[label_rows]),
        expected=torch.from_numpy(expected[label_rows]),
    )


class _Smooth(nn.Module):
    """What is learnt of the sound table: neighbouring levels and bands share what they learn.

    The table is a blur of the parameter, over levels and over bands. It starts as a smooth function
    of the spectrum, where independent rows would start as a code without likeness.
    """

    def __init__(self, n_bands: int, n_levels: int) -> None:
        super().__init__()
        self.n_levels = n_levels
        self.register_buffer("over_bands", _blur(n_bands, BLUR_BANDS), persistent=False)
        self.register_buffer("over_levels", _blur(n_levels, BLUR_LEVELS), persistent=False)

    def forward(self, free: Tensor) -> Tensor:
        """(bands * levels, d_model) to the same."""
        with torch.autocast(free.device.type, enabled=False):
            rows = free.view(-1, self.n_levels, free.shape[-1])
            blurred = torch.einsum("lm,bmd->bld", self.over_levels, rows)
            return torch.einsum("bc,cld->bld", self.over_bands, blurred).flatten(0, 1)

    def right_inverse(self, table: Tensor) -> Tensor:
        """The parameter that is blurred to this table."""
        rows = table.view(-1, self.n_levels, table.shape[-1])
        sharp = torch.linalg.solve(self.over_levels, rows)
        free: Tensor = torch.linalg.solve(self.over_bands, sharp.flatten(1))
        return free.reshape(table.shape)


def _blur(n: int, width: float) -> Tensor:
    """(n, n): each row a bell curve of this standard deviation and a peak, of length 1."""
    distance = torch.arange(n)[:, None] - torch.arange(n)
    rows = torch.exp(-0.5 * (distance / width) ** 2) + BLUR_PEAK * torch.eye(n)
    return F.normalize(rows, dim=1)


class Trainee(nn.Module):
    """The Inkling model, and two heads that help it to learn.

    One names the word just heard, the other the word that should come next in a list or sentence.

    compiled: compile parts of the pass for the shape of the batches, which then must be the same.

    Raises ImportError for a `transformers` before 5.23: its embedding leaves rows as they are, and
    what learnt from such rows is another model.
    """

    def __init__(self, size: Size, *, compiled: bool = False) -> None:
        super().__init__()
        self.inkling = InklingForConditionalGeneration(inkling_config(size))
        if not hasattr(self.inkling.get_input_embeddings(), "embed_norm"):
            raise ImportError(
                "transformers: expected 5.23 or newer, which normalises embedded tokens, found "
                f"{transformers.__version__}; `pip install 'duplex_engine[train]'` has it"
            )
        self.word_head = nn.Linear(size.d_model, VOCAB_SIZE, bias=False)
        self.expected_head = nn.Linear(size.d_model, VOCAB_SIZE, bias=False)
        self._read_after = [min(n, size.n_layers) for n in (HEARING_LAYER, EXPECTING_LAYER)]
        self._compiled = compiled
        table = self._sound_table()
        smooth = _Smooth(table.num_embeddings // N_LEVELS, N_LEVELS)
        parametrize.register_parametrization(table, "weight", smooth)
        self._initialise()

    def _sound_table(self) -> nn.Embedding:
        table = self.inkling.get_submodule(SOUND_TABLE)
        assert isinstance(table, nn.Embedding)
        return table

    @torch.no_grad()
    def adopt(self, folder: Path) -> None:
        """Takes the weights of an exported checkpoint; the heads of training stay as they are.

        Raises:
            FileNotFoundError: no checkpoint there.
            InvalidArgument: one of another size, or with other tokens.
        """
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: expected a checkpoint, found no config.json")
        exported = InklingForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        theirs, own = exported.config.text_config, self.inkling.config.text_config
        sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
        found, expected = ([getattr(text, name) for name in sizes] for text in (theirs, own))
        if found != expected:
            raise InvalidArgument(
                f"{folder}: expected a model of {sizes} {expected}, found {found}"
            )
        if not is_tokenizer(folder / "tokenizer.json"):
            raise other_tokens(folder)
        weights = exported.state_dict()
        self._sound_table().weight = weights.pop(f"{SOUND_TABLE}.weight")  # un-blurred
        _, unknown = self.inkling.load_state_dict(weights, strict=False)
        assert not unknown, unknown

    def settle(self) -> None:
        """Makes every weight what `transformers` knows; there is no training after that."""
        parametrize.remove_parametrizations(self._sound_table(), "weight")

    def _initialise(self) -> None:
        """Draws matrices by their fan-in: transformers' 0.02 is meant for wide models."""
        for name, parameter in self.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                # Inkling divides by the width of a head, not its root: so that attention is not
                # flat at first, queries and keys make up for it.
                nn.init.constant_(parameter, len(parameter) ** 0.25)
            elif "norm" in name or "global_scale" in name:
                continue
            elif "sconv" in name:
                nn.init.normal_(parameter, std=0.2)
            elif "_head" in name:
                nn.init.normal_(parameter, std=0.02)
            elif "embed" in name:
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
                if "o_proj" in name or "down_proj" in name:
                    parameter.data *= 0.3
        self._look_nearby()

    @torch.no_grad()
    def _look_nearby(self) -> None:
        """Lets every head begin with a bias for what is near, each with its own reach.

        Nothing else in Inkling tells near from far, and the bias is linear in the row, without a
        constant. So all embedded text and sound gets a common part, from which the bias is read.
        """
        model = self.inkling.model
        d_model = model.language_model.norm.weight.shape[0]
        common = F.normalize(torch.randn(d_model), dim=0)
        text, sound = model.language_model.embed_tokens.weight, self._sound_table()
        text += COMMON * text.norm(dim=1).mean() * common
        # Only what differs from an even spectrum counts, or all sounds would begin alike.
        levels = sound.weight.view(-1, N_LEVELS, d_model)
        levels = levels - levels[:, USUAL_LEVELS].mean(1, keepdim=True)
        tilted = torch.linspace(USUAL_LEVELS.stop, USUAL_LEVELS.start, len(levels)).long()
        example = levels[torch.arange(len(levels)), tilted].sum(0)
        levels += COMMON * example.norm() / len(levels) * common
        sound.weight = levels.flatten(0, 1)
        for layer in model.language_model.layers:
            attention = layer.self_attn
            profile, heads = attention.rel_logits_proj.proj, attention.num_heads
            distance = torch.arange(profile.shape[1])
            profile.normal_(std=0.3).mul_(torch.exp(-distance / REACH[-1]))
            read = attention.r_proj.weight.view(heads, -1, d_model).mul_(0.5)
            for head in range(heads):
                reach = REACH[head % len(REACH)]
                profile[head] = NEARNESS * torch.exp(-distance / reach)
                read[head, head] += common / (COMMON * d_model**0.5)

    def embed(self, batch: Batch) -> Tensor:
        """The rows of a batch, each by the tower of its kind: (batch, rows, d_model)."""
        model = self.inkling.model
        text = model.language_model.embed_tokens(batch.text)
        # The sum of a row for each band, as a product: its gradient is one too.
        table = self._sound_table().weight  # (bands * levels, d_model)
        chosen = batch.bins[..., None] == torch.arange(N_LEVELS, device=table.device)
        audio = model.audio_tower.norm(chosen.flatten(1).to(table.dtype) @ table)
        embedded = [torch.zeros_like(text[:1]), text, audio.to(text.dtype)]
        if len(batch.patches):
            frames = model.config.vision_config.temporal_patch_size
            clips = batch.patches[:, None].expand(-1, frames, -1, -1, -1)
            pictures = model.vision_tower(clips).last_hidden_state[:, 0]
            embedded.append(pictures.to(text.dtype))
        return F.embedding(batch.sources, torch.cat(embedded))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, rows, d_model): for the next output, the word just heard, the word expected."""
        decoder = self.inkling.model.language_model
        after = decode(decoder.layers, self.embed(batch), compiled=self._compiled)
        heard, expecting = (F.rms_norm(after[n], after[n].shape[-1:]) for n in self._read_after)
        return decoder.norm(after[-1]), heard, expecting


def losses(trainee: Trainee, batch: Batch) -> dict[str, Tensor]:
    """Mean cross-entropies, and teacher-forced shares of right tokens.

    "token" is that of the next output, "word" that of the word just heard, "expected" that of the
    word that should come next. "content" is that of the outputs other than `listen`, given that
    there is one: weighing it changes what is said, and not whether something is.
    """
    rows, heard_rows, expecting_rows = (rows.flatten(0, 1) for rows in trainee(batch))
    targets, labels = batch.targets, batch.labels
    logits = trainee.inkling.lm_head(rows[batch.target_rows]).float()
    words = trainee.word_head(heard_rows[batch.label_rows]).float()
    expected = trainee.expected_head(expecting_rows[batch.label_rows]).float()
    speaks, heard = targets != LISTEN, labels != NO_WORD
    right, named = logits.detach().argmax(-1) == targets, words.detach().argmax(-1) == labels
    is_listen = torch.arange(logits.shape[-1], device=logits.device) == LISTEN
    content = F.cross_entropy(
        logits.masked_fill(is_listen, float("-inf")),
        targets.masked_fill(~speaks, UNCOUNTED),
        ignore_index=UNCOUNTED,
        reduction="sum",
    )
    return {
        "token": F.cross_entropy(logits, targets),
        "content": content / speaks.sum().clamp(min=1),
        "word": F.cross_entropy(words, labels),
        "expected": F.cross_entropy(expected, batch.expected),
        "spoken": _share(right, speaks),
        "silent": _share(right, ~speaks),
        "heard": _share(named, heard),
    }


def _share(which: Tensor, among: Tensor) -> Tensor:
    """NaN among none."""
    return (which & among).sum() / among.sum()
