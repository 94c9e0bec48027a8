"""Checkpoints that the package makes itself.

=============  =====================================================================
module         what it makes
=============  =====================================================================
``random``     weights drawn at random in the published layout: for demos and tests
=============  =====================================================================
"""

from __future__ import annotations

from duplex_engine.models.random import PRESETS, write_random_checkpoint

__all__ = ["PRESETS", "write_random_checkpoint"]
