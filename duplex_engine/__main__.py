"""`python -m duplex_engine` is `duplex-engine`."""

from __future__ import annotations

from duplex_engine.cli import main

if __name__ == "__main__":
    main()
