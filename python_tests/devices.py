"""Which device the tests run on."""

from __future__ import annotations

import os

__all__ = ["CUDA", "DEVICE"]

# DUPLEX_TEST_DEVICE=cuda runs the tests on a GPU (docs/GPU.md).
DEVICE = os.environ.get("DUPLEX_TEST_DEVICE", "cpu")
# For tests about the CUDA backend itself: its kernels run on the host where no GPU is named.
CUDA = DEVICE if DEVICE != "cpu" else "cuda_host"
