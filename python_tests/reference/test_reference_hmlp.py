"""Vision plans, patches and rows of the NumPy twin against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from transformers.models.inkling.modeling_inkling import plan_out_scales

from duplex_engine.reference import hmlp, inkling


@pytest.mark.parametrize("patch_size", [2, 8, 10, 12, 14, 16, 20, 24, 32, 40, 60, 64])
@pytest.mark.parametrize("temporal_patch_size", [1, 2, 3, 4])
def test_plan_equals_transformers(patch_size: int, temporal_patch_size: int) -> None:
    for n_layers in range(1, 10):
        scales = plan_out_scales(temporal_patch_size, patch_size, n_layers, 3).int().tolist()
        expected = []
        for k in range(n_layers):
            (t0, hw0, _, c0), (t1, hw1, _, c1) = scales[k], scales[k + 1]
            t_fold, hw_fold = t1 // t0, hw1 // hw0
            d_out = c1 if k + 1 < n_layers else None
            expected.append((t_fold, hw_fold, c0 * t_fold * hw_fold**2, d_out))
        assert hmlp.plan(patch_size, temporal_patch_size, n_layers) == expected, f"{n_layers=}"


def test_plan_of_the_published_models() -> None:
    assert hmlp.plan(40, 2, 4) == [
        (1, 5, 75, 128),
        (1, 2, 512, 320),
        (1, 4, 5120, 4800),
        (2, 1, 9600, None),
    ]


def test_plan_rejects_nonsense() -> None:
    with pytest.raises(ValueError, match="n_layers=0"):
        hmlp.plan(40, 2, 0)


def _patches_by_torch(image: np.ndarray, side: int) -> torch.Tensor:
    """InklingImageProcessor's formulas, patch by patch, without torchvision."""
    pixels = torch.from_numpy(image).float()
    mean, std = torch.tensor(hmlp.CLIP_MEAN), torch.tensor(hmlp.CLIP_STD)
    patches = []
    for top in range(0, image.shape[0], side):
        for left in range(0, image.shape[1] + 1 - image.shape[1] % side, side):
            patch = torch.full((side, side, 3), -1.0)
            part = pixels[top : top + side, left : left + side]
            patch[: part.shape[0], : part.shape[1]] = part
            patches.append((patch - mean * 255) / (std * 255))
    return torch.stack(patches)


@pytest.mark.parametrize("size", [(40, 40), (80, 120), (1, 1), (41, 39), (97, 203)])
def test_patchify_follows_the_formulas(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = hmlp.patchify(image)
    assert found.shape[0] == -(-size[0] // 40) * (size[1] // 40 + 1)
    np.testing.assert_allclose(found, _patches_by_torch(image, 40).numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(40, 40), (41, 39), (97, 203)])
def test_patchify_equals_the_image_processor(size: tuple[int, int]) -> None:
    pytest.importorskip("torchvision", reason="InklingImageProcessor needs torchvision")
    from transformers import InklingImageProcessor

    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = InklingImageProcessor()
    inputs = processor(image, return_tensors="pt", input_data_format="channels_last")
    expected = inputs["pixel_values"]
    found = hmlp.patchify(image)
    for frame in (0, 1):
        np.testing.assert_allclose(found, expected[:, frame].numpy(), rtol=0, atol=2e-6)


def test_patchify_says_what_it_expects() -> None:
    with pytest.raises(ValueError, match="uint8"):
        hmlp.patchify(np.zeros((40, 40, 3), np.float32))  # type: ignore[arg-type]


def test_gelu_is_exact() -> None:
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(hmlp.gelu(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["moe_local", "moe_mixed", "stock_patches", "four_frame_patches"])
def test_rows_of_a_picture(name: str, tmp_path: Path) -> None:
    model = oracle.build(name, tmp_path)
    weights, config = inkling.load(tmp_path)
    side = config["vision_config"]["patch_size"]
    image = np.random.default_rng(2).integers(0, 256, (side + 3, 2 * side, 3), dtype=np.uint8)
    patches = hmlp.patchify(image, side)
    found = hmlp.encode(patches, weights, config["vision_config"])
    expected = oracle.embed(model, [("image", patches)]).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
