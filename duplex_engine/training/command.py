"""How the commands of this package end on what their user can mend: one line, status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from duplex_engine.errors import DuplexError

__all__ = ["run_command"]


def run_command(main: Callable[..., None]) -> None:
    """Runs a function as the program, with its parameters as arguments and options."""
    try:
        typer.run(main)
    except (DuplexError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
