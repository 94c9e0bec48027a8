"""The command line: `duplex-engine demo`, `run`, `inspect`, `convert`, `eval`, `gpu-check` and
`worker`.

Owns the list of commands and how errors end a command: one red line, exit status 2. What a command
does is in the module of its name.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from duplex_engine.cli.convert import convert
from duplex_engine.cli.demo import demo
from duplex_engine.cli.eval import evaluate
from duplex_engine.cli.gpu_check import gpu_check
from duplex_engine.cli.inspect import inspect
from duplex_engine.cli.run import run
from duplex_engine.cli.worker import worker
from duplex_engine.errors import DuplexError

__all__ = ["app", "main"]

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


class _Commands(TyperGroup):
    """Ends every command in the same way, whatever stopped it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DuplexError as error:
            _print_error(str(error))
            raise typer.Exit(EXIT_ERROR) from None
        except BrokenPipeError:
            raise  # `| head` has seen enough: typer ends the program without a word
        except OSError as error:
            place = "" if error.filename is None else f"{error.filename}: "
            _print_error(f"{place}{error.strerror or error}")
            _drop_unwritten()
            raise typer.Exit(EXIT_ERROR) from None
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None


def _print_error(text: str) -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text(f"error: {text}", style="red"), highlight=False)


def _drop_unwritten() -> None:
    """Gives up what stdout could not take: the interpreter would fail on it again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Runs Inkling interaction models as a live stream of sound, pictures and text.",
    epilog="Begin with `duplex-engine demo`; each command has its own `--help` with examples.",
)
app.command()(demo)
app.command()(run)
app.command()(inspect)
app.command()(convert)
app.command("eval")(evaluate)
app.command("gpu-check")(gpu_check)
app.command()(worker)


def main() -> None:
    """The console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # None where the process began without it
        sys.stdout.reconfigure(errors="replace")  # bars and names that its encoding does not have
    app()
