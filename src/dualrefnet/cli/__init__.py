"""The command line: one thin function a command; the work is done elsewhere, and heavy imports wait for their command."""

from __future__ import annotations

import sys

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
    from dualrefnet.progress import console

    try:
        app()
    except DualRefNetError as error:
        console.print(f"[bold red]error:[/bold red] {error}", soft_wrap=True, markup=True)
        sys.exit(2)
