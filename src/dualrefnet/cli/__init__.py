"""The command line: one thin function a command; the work is done elsewhere, and heavy imports wait for their command.

Here stand the program itself and the options that several commands share.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dualrefnet.errors import DualRefNetError

app = typer.Typer(
    name="dualrefnet",
    help="Classify skin lesions from an image and the patient's metadata. Not a medical device.\n\n"
    "First steps: `dualrefnet doctor`, then `dualrefnet demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")]
ModelFolder = Annotated[
    Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="A run folder, or the folder of an exported bundle.")
]
Root = Annotated[Path | None, typer.Option("--root", metavar="DIR", help="Where the data are now, if they have moved.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Folder of the prepared images; default: $DUALREFNET_CACHE or the user's cache folder.",
    ),
]
Masks = Annotated[
    Path | None,
    typer.Option(
        "--masks",
        metavar="DIR",
        help="Lesion masks, IMAGE_ID.png; default: masks/ in the data's folder, if there is one.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")]
PredictionDevice = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Variant = Annotated[str, typer.Option(help="Of a bundle: float32, or int8 if it has that.")]
Workers = Annotated[int | None, typer.Option(help="Threads that read images; default: one a core.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Use a Ray cluster (extra `scale`): its address, `auto`, or `local` to start Ray here. Data, model and "
        "--out must be on a file system that all its machines see.",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        import dualrefnet

        typer.echo(dualrefnet.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line; an error that the user can fix is one line and exit status 2."""
    from dualrefnet.cli import data, deployment, reports, runs  # noqa: F401 (registers the commands)

    try:
        app()
    except DualRefNetError as error:
        from dualrefnet.progress import console

        console.print(f"[bold red]error:[/bold red] {error}", soft_wrap=True, markup=True)
        sys.exit(2)
