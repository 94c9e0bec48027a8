"""Checkpoints that come with the package, and those that it makes.

==============  ====================================================================
name            what it is
==============  ====================================================================
``reference``   folder of a small trained interaction model; its README.md is its card
``random.py``   weights drawn at random in the published layout: for tests
==============  ====================================================================
"""

from __future__ import annotations

from duplex_engine.models.random import PRESETS, write_random_checkpoint

__all__ = ["PRESETS", "write_random_checkpoint"]
