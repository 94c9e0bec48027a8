"""Hierarchical-MLP vision: picture to patches to one row per patch. Mirrors hmlp.cpp.

A stage folds a block of neighbouring cells into the channels of one cell and maps them linearly;
after the last stage a patch is a single cell. There is no attention between patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from duplex_engine.reference.inkling import Array, rms_norm

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_VALUE = -1.0  # in raw pixel units, so below black after scaling
NORM_EPS = 1e-6

_erf = np.vectorize(math.erf, otypes=[np.float64])


class Stage(NamedTuple):
    """One stage: fold `t_fold` frames by `hw_fold` x `hw_fold` cells, then d_in -> d_out."""

    t_fold: int
    hw_fold: int
    d_in: int
    d_out: int | None  # None: the last stage, as wide as the decoder's rows


class _Scale(NamedTuple):
    frames: int
    side: int
    channels: int

    @property
    def n_cells(self) -> int:
        return self.frames * self.side * self.side


def _cumulative_factors(number: int) -> list[int]:
    """Products of the prime factors, largest factor first: 40 -> [5, 10, 20, 40]."""
    factors: list[int] = []
    divisor = 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return [math.prod(sorted(factors, reverse=True)[: i + 1]) for i in range(len(factors))]


def _candidate_scales(patch_size: int, temporal_patch_size: int, n_channels: int) -> list[_Scale]:
    """From one pixel to the whole patch: first in space, then in time."""
    scales = [_Scale(1, 1, n_channels)]
    for side in _cumulative_factors(patch_size):
        scales.append(_Scale(1, side, 64 * math.ceil(side * side * n_channels / 64)))
    for frames in _cumulative_factors(temporal_patch_size):
        # note: published plans multiply by 64 here without dividing first.
        channels = 64 * patch_size * patch_size * n_channels * frames
        scales.append(_Scale(frames, patch_size, channels))
    return scales


def plan(
    patch_size: int, temporal_patch_size: int, n_layers: int, n_channels: int = 3
) -> list[Stage]:
    """Choose `n_layers` folds so that cells shrink by about the same factor in each.

    Boundary k of the n_layers + 1 would ideally hold (values in a patch)^(k / n_layers) cells.
    With enough layers each boundary takes its nearest candidate scale (first of equals); with
    fewer, boundaries take different scales that minimise the summed distance of logarithms. The
    two ends are then fixed to one pixel and the whole patch.
    """
    if min(patch_size - 1, temporal_patch_size, n_layers, n_channels) < 1:
        raise ValueError(
            "hmlp plan: expected patch_size >= 2 and the other sizes >= 1, found "
            f"{patch_size=}, {temporal_patch_size=}, {n_layers=}, {n_channels=}"
        )
    scales = _candidate_scales(patch_size, temporal_patch_size, n_channels)
    log_cells = np.log([scale.n_cells for scale in scales])
    log_values = math.log(patch_size**2 * temporal_patch_size * n_channels)
    ideal = np.linspace(0.0, log_values, n_layers + 1)
    cost = np.abs(ideal[:, None] - log_cells)  # (n_layers + 1, n_scales)

    if n_layers >= len(scales):
        chosen = [int(i) for i in np.argmin(cost, axis=1)]
    else:
        # Both sides are sorted, so some best assignment never crosses: try every subset in order.
        subsets = combinations(range(len(scales)), n_layers + 1)
        chosen = list(min(subsets, key=lambda s: sum(cost[k, i] for k, i in enumerate(s))))
    chosen[0], chosen[-1] = 0, len(scales) - 1

    stages = []
    for k in range(n_layers):
        start, end = scales[chosen[k]], scales[chosen[k + 1]]
        d_in = start.channels * end.n_cells // start.n_cells
        d_out = end.channels if k + 1 < n_layers else None
        stages.append(Stage(end.frames // start.frames, end.side // start.side, d_in, d_out))
    return stages


def patchify(image: NDArray[np.uint8], patch_size: int = 40) -> NDArray[np.float32]:
    """Cut a picture into normalised patches, row by row.

    image: (height, width, 3) RGB, 0..255. Returns (n_patches, patch_size, patch_size, 3) with
    ceil(height / patch_size) rows of floor(width / patch_size) + 1 columns: a width that is a
    multiple of the patch ends in a column of padding alone, as the model was trained.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"patchify: expected (height, width, 3) uint8, found {image.shape} {image.dtype}"
        )
    height, width, _ = image.shape
    n_rows, n_columns = -(-height // patch_size), width // patch_size + 1
    padded = np.full((n_rows * patch_size, n_columns * patch_size, 3), PAD_VALUE)
    padded[:height, :width] = image
    normalised = (padded / 255.0 - CLIP_MEAN) / CLIP_STD
    grid = normalised.reshape(n_rows, patch_size, n_columns, patch_size, 3).swapaxes(1, 2)
    return grid.reshape(-1, patch_size, patch_size, 3).astype(np.float32)


def _fold(cells: Array, stage: Stage) -> Array:
    """(n, t, h, w, c) -> (n, t / t_fold, h / hw_fold, w / hw_fold, c * t_fold * hw_fold^2)."""
    n, t, h, w, c = cells.shape
    s, f = stage.t_fold, stage.hw_fold
    blocks = cells.reshape(n, t // s, s, h // f, f, w // f, f, c)
    return blocks.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(n, t // s, h // f, w // f, -1)


def gelu(x: Array) -> Array:
    """Exact GELU, x * Phi(x). Same shape and dtype."""
    normal_cdf: NDArray[np.float64] = 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))
    return (x * normal_cdf).astype(x.dtype)


def encode(patches: Array, weights: Mapping[str, Array], vision_config: Mapping[str, Any]) -> Array:
    """Patches of a still picture to rows: (n_patches, p, p, 3) -> (n_patches, d_model).

    weights: the checkpoint by name; vision_config: the block of that name in config.json.
    """
    n_frames, n_layers = vision_config["temporal_patch_size"], vision_config["n_layers"]
    stages = plan(patches.shape[1], n_frames, n_layers, patches.shape[3])
    cells = np.repeat(patches[:, None], n_frames, axis=1)  # a still picture stands still
    for i, stage in enumerate(stages):
        cells = _fold(cells, stage) @ weights[f"model.visual.layers.linear_{i}.weight"].T
        if stage.d_out is not None:
            cells = gelu(rms_norm(cells, weights[f"model.visual.layers.norm_{i}.weight"], NORM_EPS))
    rows = cells.reshape(len(patches), -1)
    return rms_norm(rows, weights["model.visual.final_norm.weight"], NORM_EPS)
