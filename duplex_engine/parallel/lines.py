"""Lines of JSON between the process of rank 0 and a worker: by a pipe, or by a socket."""

from __future__ import annotations

import json
import math
import os
from typing import Any

__all__ = ["Lines", "line"]


def line(message: dict[str, Any]) -> bytes:
    """One message as it travels."""
    return json.dumps(message).encode() + b"\n"


class Lines:
    """Whole lines of a descriptor, which is set to not block."""

    def __init__(self, descriptor: int, max_bytes: float = math.inf) -> None:
        """max_bytes: who sends more of a line than that is heard no further."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._max_bytes = max_bytes
        self._rest = b""
        self.is_at_end = False

    def take(self) -> list[bytes]:
        """The lines that have come. Behind the last one `is_at_end` is set."""
        while True:
            try:
                piece = os.read(self._descriptor, 65536)
            except BlockingIOError:
                break
            except OSError:  # a connection that was cut
                piece = b""
            if not piece:
                self.is_at_end = True
                break
            self._rest += piece
            if len(self._rest) > self._max_bytes:
                self.is_at_end = True
                break
        *lines, self._rest = self._rest.split(b"\n")
        return lines
