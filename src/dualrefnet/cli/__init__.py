"""The command line: one thin function a command; the work is done elsewhere, and heavy imports wait for their command.

Here stand the program itself, the options that several commands share, and how findings and tables are printed.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import typer

from dualrefnet.errors import DataError, DualRefNetError

if TYPE_CHECKING:
    from rich.text import Text

    from dualrefnet.data.check import Finding
    from dualrefnet.display.format import Cell, PrintedTable

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


def _holding(*names: str) -> Callable[[Path], Path]:
    """Return a check that a folder holds one of these files, before its command imports torch."""

    def check(folder: Path) -> Path:
        if not any((folder / name).is_file() for name in names):
            from dualrefnet.run import Run

            _ = Run(folder).recipe  # Says why it isn't a run.
        return folder

    return check


def existing(paths: Path | list[Path] | None) -> Path | list[Path] | None:
    """Refuse files and folders that aren't there, before their command imports torch."""
    for path in [paths] if isinstance(paths, Path) else paths or []:
        if not path.exists():
            raise DataError(f"there is no file or folder {path}")
    return paths


RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A finished run's folder.", callback=_holding("recipe.yaml"))
]
ModelFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_BUNDLE",
        help="A run folder, or an exported bundle.",
        callback=_holding("recipe.yaml", "bundle.json"),
    ),
]
RunOrSuite = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|SUITE",
        help="A finished run's folder, or a suite's.",
        callback=_holding("recipe.yaml", "suite.yaml"),
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Change the recipe: training.epochs=3 data.root=DIR"),
]
Root = Annotated[
    Path | None,
    typer.Option("--root", metavar="DIR", help="Where the data are now, if they have moved.", callback=existing),
]
Description = Annotated[
    Path | None, typer.Option("--description", metavar="YAML", help="csv_table: its columns; default: dataset.yaml.")
]
Cache = Annotated[
    Path | None, typer.Option("--cache", metavar="DIR", help="Folder of the prepared images; else $DUALREFNET_CACHE.")
]
Masks = Annotated[
    Path | None,
    typer.Option(
        "--masks",
        metavar="DIR",
        help="Lesion masks, IMAGE_ID.png; default: masks/ of the data.",
        callback=existing,
    ),
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


@contextmanager
def resumable(how: str) -> Iterator[None]:
    """Say in one line what Ctrl-C has left, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise DualRefNetError(f"interrupted; {how} goes on") from None


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
    """Print a table and its notes; columns that don't fit beside each other stand below, and no word is cut."""
    from rich import box
    from rich.table import Table

    from dualrefnet.progress import output

    console = output()
    console.print(table.title, soft_wrap=True)
    columns = [_Column.of(table, number, console.width) for number in range(len(table.columns))]
    for part in _parts(columns, table.left, console.width):
        shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for number, width in part.items():
            justify: Literal["left", "right"] = "left" if number < table.left else "right"
            shown.add_column(table.columns[number], justify=justify, width=width)
        for row in table.rows:
            # A number stands beside its interval, or above it.
            between = {number: " " if width >= columns[number].full else "\n" for number, width in part.items()}
            shown.add_row(*(_cell(row[number], space) for number, space in between.items()))
        console.print(shown)
        console.print()
    for note in table.notes:
        console.print(f"- {note}")


def _cell(cell: Cell, space: str) -> Text:
    from rich.text import Text

    text = Text.assemble((cell.text, "bold" if cell.bold else ""), f"{cell.mark}{space}{cell.small}")
    text.rstrip()
    return text


class _Column(NamedTuple):
    """Characters of a column in one line, and the fewest with which no word and no interval is cut."""

    full: int
    least: int

    @classmethod
    def of(cls, table: PrintedTable, number: int, room: int) -> _Column:
        name, cells = table.columns[number], [row[number] for row in table.rows]
        full = max(
            len(text) for text in (name, *(f"{cell.text}{cell.mark} {cell.small}".strip() for cell in cells), " ")
        )
        words = [word for text in (name, *(cell.text + cell.mark for cell in cells)) for word in text.split()]
        least = max(map(len, [*words, *(cell.small for cell in cells), " "]))
        # What is said at the left is read first, and gets some room.
        return cls(full, max(least, min(full, room // 3)) if number < table.left else least)


def _parts(columns: list[_Column], left: int, room: int) -> Iterator[dict[int, int]]:
    """Yield the columns that stand beside each other (the `left` ones and some others), each with its width."""
    gap, first, others = 2, list(range(left)), list(range(left, len(columns)))
    while others or first:
        part = first + others[:1]
        for number in others[1:]:
            if sum(columns[one].least + gap for one in (*part, number)) - gap > room:
                break
            part.append(number)
        widths = {number: columns[number].least for number in part}
        if sum(columns[number].full + gap for number in part) - gap <= room:
            widths = {number: columns[number].full for number in part}
        yield widths
        others = others[len(part) - left :]
        if not others:
            return
