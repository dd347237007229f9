"""The app that commands are added to, the options that they share, and how a run of theirs is stopped.

Everything heavy is imported by the command that needs it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from ..runtime.interrupts import Interrupted, telling

app = typer.Typer(
    help="Random Self-Ensemble: defend a classifier by noise, and measure honestly how well.",
    epilog="--debug after any command shows the traceback of an error.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"selfensemble {metadata.version('selfensemble')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of no command."""


MODEL_HELP = (
    "Folder that `train` wrote, a name of the zoo, or of a network: package.module:attribute, "
    "path/to/file.py:attribute, timm:NAME, torchvision:NAME, transformers:FOLDER-OR-ID."
)
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, ...; auto takes an accelerator if there is one.")]


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Turn Ctrl-C into a line that says that the same command continues with what is in `folder`."""
    text = f"stopped; {folder} holds what is finished: continue with the same command"
    try:
        with telling(text):
            yield
    except KeyboardInterrupt:
        raise Interrupted(text) from None
