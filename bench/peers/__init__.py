"""Other engines that run models of equal matrices, each in a process of its own.

`worker.py` is what such a process does, `client.py` starts and asks it, and `table.py` lists the
engines. The engines' libraries are no dependency of this project: a worker may run in another
virtual environment, and nothing here but our own engine's worker imports `duplex_engine`.
"""

from __future__ import annotations
