"""Cases of the kernels that need nothing but their own row (kernels/rows.cu)."""

from __future__ import annotations

from math import erf

import numpy as np
from ptx.arguments import (
    BF16,
    F32,
    EmbedAudio,
    EmbedText,
    Floats,
    Fold,
    Norm,
    SiluMul,
    encode,
    pad,
    round_up,
    rounded,
)
from ptx.device import BF16_UNIT, UNIT, Device, both, check_close

EPS = 1e-5


def rms_norm(x: Floats, weight: Floats) -> np.ndarray:
    """In double precision."""
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + np.float32(EPS)) * weight


def norm_shape(width: int) -> tuple[int, int]:
    """Threads and bytes of shared memory of a thread block that norms a row."""
    return round_up(-(-width // 4), 32), (2 * round_up(width, 16) + 4) * 4


def norm_bound(expected: np.ndarray, width: int, dtype: int = F32) -> np.ndarray:
    """Sixteen partial sums, four sums of them, a division, a root and three products."""
    units = width / 16 + 4 + 6
    return np.abs(expected) * (units * UNIT + (BF16_UNIT if dtype == BF16 else 0)) + 1e-37


def embed_text(device: Device, dtype: int) -> None:
    """Rows of a table, each normed."""
    random = np.random.default_rng(1)
    width, padded, ids = 40, 48, [6, 0, 6, 3]
    table = rounded(random.normal(size=(7, width)), dtype)
    weight = random.normal(size=width).astype(np.float32)
    expected = rms_norm(table[ids], weight)
    for rows in (None, [2, 0, 4, 3]):
        out = device.out(np.full((5, 64), np.nan, np.float32))
        args = EmbedText(
            device.put(ids, np.int32), device.put(encode(pad(table, padded), dtype)), dtype,
            device.put(pad(weight[None], padded)), EPS, width, 4, out, 64,
            0 if rows is None else device.put(rows, np.int32),
        )  # fmt: skip
        device.launch("rows/embed_text_kernel", (4,), *norm_shape(width), args)
        found = device.get(out)[rows or range(4)]
        check_close(found[:, :width], expected, norm_bound(expected, padded))
        assert not found[:, width:padded].any()
        assert np.isnan(found[:, padded:]).all()
        assert np.isnan(device.get(out)).all(1).sum() == 1


def embed_audio(device: Device, dtype: int) -> None:
    """The sum of one row for each mel band, normed; the rows go to others of the batch."""
    random = np.random.default_rng(2)
    width, padded, n_mels, n_levels = 24, 32, 3, 4
    table = rounded(random.normal(size=(n_mels * n_levels, width)), dtype)
    weight = random.normal(size=width).astype(np.float32)
    bins = random.integers(0, n_levels, size=(5, n_mels))
    rows = [3, 1, 6, 0, 4]
    out = device.out(np.full((7, padded), np.nan, np.float32))
    args = EmbedAudio(
        device.put(bins, np.uint8), n_mels, n_levels,
        device.put(encode(pad(table, padded), dtype)), dtype,
        device.put(pad(weight[None], padded)), EPS, width, 5, out, padded,
        device.put(rows, np.int32),
    )  # fmt: skip
    device.launch("rows/embed_audio_kernel", (5,), *norm_shape(width), args)
    terms = table[np.arange(n_mels) * n_levels + bins].astype(np.float64)
    expected = rms_norm(terms.sum(1), weight)
    scale = np.abs(expected) / np.abs(terms.sum(1))
    sums = 2 * n_mels * UNIT * np.abs(terms).sum(1) * scale
    found = device.get(out)[rows][:, :width]
    check_close(found, expected, norm_bound(expected, padded) * 2 + 2 * sums)
    assert np.isnan(device.get(out)).all(1).sum() == 2


def norm(device: Device, dtype: int) -> None:
    """Without and with GELU."""
    random = np.random.default_rng(3)
    width, padded = 300, 304
    x = random.normal(size=(3, width)).astype(np.float32)
    x[1] *= 1e-12  # below eps
    weight = random.normal(size=width).astype(np.float32)
    plain = rms_norm(x, weight)
    gelu = 0.5 * plain * (1 + np.vectorize(erf)(plain * np.sqrt(0.5)))
    for activation, expected in enumerate((plain, gelu)):
        out = device.out_rows(3, padded + 16, dtype)
        args = Norm(
            device.put_late(pad(x, padded + 16)), padded + 16,
            device.put(pad(weight[None], padded)), EPS, width, 3, activation, out,
        )  # fmt: skip
        device.launch("rows/norm_kernel", (3,), *norm_shape(width), args)
        # GELU is nowhere steeper than 1.2, and erf is good to a few units of 1.
        bound = 1.2 * norm_bound(plain, padded) + norm_bound(expected, 16, dtype)
        check_close(device.read(out)[:, :width], expected, bound + 6 * UNIT * np.abs(plain))


def silu_mul(device: Device, dtype: int) -> None:
    """Gates from where exp underflows to where it does not matter."""
    random = np.random.default_rng(4)
    width, up = 272, 288
    x = random.normal(size=(2, up + width)).astype(np.float32)
    x[0, :width] = np.linspace(-90, 90, width)
    out = device.out_rows(2, width, dtype)
    args = SiluMul(device.put_late(x), up + width, width, up, 2, out)
    device.launch("rows/silu_mul_kernel", (2, -(-width // 256)), 256, 0, args)
    gate = np.maximum(x[:, :width].astype(np.float64), -87.3)  # as far as exp goes
    expected = x[:, :width] / (1 + np.exp(-gate)) * x[:, up:]
    bound = np.abs(expected) * (12 * UNIT + (BF16_UNIT if dtype == BF16 else 0)) + 1e-37
    check_close(device.read(out), expected, bound)


def fold(device: Device, dtype: int) -> None:
    """Cells of pictures gathered into rows: nothing is computed."""
    n, t, h, w, c, t_fold, hw_fold, stride = 2, 2, 6, 9, 5, 2, 3, 16
    random = np.random.default_rng(5)
    x = rounded(random.normal(size=(n, t, h, w, stride)), dtype)
    width = t_fold * hw_fold**2 * c
    padded = round_up(width, 16)
    n_rows = n * (t // t_fold) * (h // hw_fold) * (w // hw_fold)
    out = device.out_rows(n_rows, padded + 16, dtype)
    args = Fold(device.put(x), stride, n, t, h, w, c, t_fold, hw_fold, out)
    device.launch("rows/fold_kernel", (n_rows, -(-padded // 256)), 256, 0, args)
    cells = x[..., :c].reshape(
        n, t // t_fold, t_fold, h // hw_fold, hw_fold, w // hw_fold, hw_fold, c
    )
    expected = cells.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(n_rows, width)
    found = device.read(out)
    assert (found[:, :width] == expected).all()
    assert not found[:, width:padded].any()
    assert np.isnan(found[:, padded:]).all()


CASES = {
    **both("embed_text", embed_text),
    **both("embed_audio", embed_audio),
    **both("norm", norm),
    **both("silu_mul", silu_mul),
    **both("fold", fold),
}
