"""The command line: one thin function a command; the work is done elsewhere, and heavy imports wait for their command.

Here stand the program itself, the options that several commands share, and how findings and tables are printed.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualrefnet.errors import DataError, DualRefNetError

if TYPE_CHECKING:
    from dualrefnet.data.check import Finding
    from dualrefnet.display.format import PrintedTable

app = typer.Typer(
    name="dualrefnet",
    help="Classify skin lesions from an image and the patient's metadata. Not a medical device.\n\n"
    "First steps: `dualrefnet doctor`, then `dualrefnet demo`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)

COLOURS = {"PASS": "green", "WARN": "yellow", "FAIL": "red"}
# Characters that a column of words gets at least, if it needs them.
LONGEST = 30

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")]
ModelFolder = Annotated[Path, typer.Argument(metavar="RUN_OR_BUNDLE", help="A run folder, or an exported bundle.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Change the recipe: training.epochs=3 data.root=DIR"),
]
Root = Annotated[Path | None, typer.Option("--root", metavar="DIR", help="Where the data are now, if they have moved.")]
Description = Annotated[
    Path | None, typer.Option("--description", metavar="YAML", help="csv_table: its columns; default: dataset.yaml.")
]
Cache = Annotated[
    Path | None, typer.Option("--cache", metavar="DIR", help="Folder of the prepared images; else $DUALREFNET_CACHE.")
]
Masks = Annotated[
    Path | None, typer.Option("--masks", metavar="DIR", help="Lesion masks, IMAGE_ID.png; default: masks/ of the data.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one.")]
PredictionDevice = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Variant = Annotated[str, typer.Option(help="Of a bundle: float32, or int8 if it has that.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads that read images; default: one a core.")]
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
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line; an error that the user can fix is one line and exit status 2."""
    from dualrefnet.cli import data, deployment, reports, runs  # noqa: F401 (registers the commands)

    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks must not end a finished job.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except DualRefNetError as error:
        _stop(str(error))
    except OSError as error:
        # What the disk refuses is for the user to fix; without a file's name it is a bug.
        if error.filename is None:
            raise
        _stop(f"{os.fsdecode(error.filename)}: {error.strerror or error}; name another place, or change its rights")


def refuse_without_effect(context: typer.Context, reason: str, *names: str) -> None:
    """Refuse options that were given and have no effect; `names` are those of the command's parameters."""
    for option in context.command.params:
        source = context.get_parameter_source(str(option.name))
        if option.name in names and source is not None and source.name == "COMMANDLINE":
            raise DataError(f"{option.opts[0]} has no effect {reason}; leave it out")


def _stop(message: str) -> None:
    from dualrefnet.progress import error

    error(message)
    sys.exit(2)


def print_findings(findings: list[Finding]) -> None:
    """Print a verdict a line, with examples of what is not a PASS."""
    from rich.text import Text

    from dualrefnet.progress import output

    console = output()
    for finding in findings:
        line = Text.assemble((finding.level, COLOURS[finding.level]), f"  {finding.check}: {finding.message}")
        console.print(line, soft_wrap=True)
        if finding.examples and finding.level != "PASS":
            examples = ", ".join(map(str, finding.examples[:3]))
            console.print(f"      e.g. {examples}", style="dim", soft_wrap=True)


def print_table(table: PrintedTable) -> None:
    """Print a table and its notes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from dualrefnet.progress import output

    console = output()
    # What is said at the left may be long, and the numbers must leave it some room.
    words = [
        max(len(text) for text in (name, *(row[number].text for row in table.rows)))
        for number, name in enumerate(table.columns)
    ]
    taken = sum(min(length, LONGEST) + 2 for length in words[: table.left])
    room = max(9, (console.width - taken) // max(1, len(table.columns) - table.left) - 2)
    shown = Table(title=table.title, box=box.SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(table.columns):
        left = number < table.left
        shown.add_column(name, justify="left" if left else "right", max_width=None if left else room)
    for row in table.rows:
        texts = [Text.assemble((cell.text, "bold" if cell.bold else ""), f"{cell.mark} {cell.small}") for cell in row]
        for text in texts:
            text.rstrip()
        shown.add_row(*texts)
    console.print(shown)
    for note in table.notes:
        console.print(f"- {note}")
