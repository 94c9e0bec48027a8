"""The engine's arithmetic once more, in NumPy, to be read and to be tested against.

Each module mirrors one C++ file and follows the numbered steps of ``docs/MODEL.md``:

=============  ==============================  ============================================
module         mirrors                         what it computes
=============  ==============================  ============================================
``dmel``       ``csrc/encoders/dmel.cpp``      sound -> 80 quantised mel bins per 50 ms
``hmlp``       ``csrc/encoders/hmlp.cpp``      picture -> patches -> one row per patch
``inkling``    ``csrc/model/inkling.cpp``      rows -> decoder layers -> logits
=============  ==============================  ============================================

Nothing here is streamed, cached, blocked or threaded: a whole clip, picture or sequence goes in
at once. The arithmetic runs in the dtype of its inputs, so float64 weights give a reference that
is far more exact than anything it judges.
"""

from __future__ import annotations

from duplex_engine.reference import dmel, hmlp, inkling

__all__ = ["dmel", "hmlp", "inkling"]
