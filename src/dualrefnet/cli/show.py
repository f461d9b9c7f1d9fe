"""How commands show findings and tables on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from dualrefnet.data.check import Finding
    from dualrefnet.display.format import PrintedTable

COLOURS = {"PASS": "green", "WARN": "yellow", "FAIL": "red"}
# Characters that a column of words gets at least, if it needs them.
LONGEST = 30
# Characters a line where the output goes into a file.
PIPED = 140


def output() -> Console:
    """Return the console of results: as wide as the terminal, or as a page where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPED)


def print_findings(findings: list[Finding]) -> None:
    """Print a verdict a line, with examples of what is not a PASS."""
    console = output()
    for finding in findings:
        # Ids and messages come from the user's table: square brackets in them are no markup.
        console.print(
            f"[{COLOURS[finding.level]}]{finding.level}[/]  {finding.check}: {escape(finding.message)}", soft_wrap=True
        )
        if finding.examples and finding.level != "PASS":
            console.print(
                f"      e.g. {escape(', '.join(map(str, finding.examples[:3])))}", style="dim", soft_wrap=True
            )


def print_table(table: PrintedTable) -> None:
    """Print a table and its notes."""
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
        shown.add_row(*(escape(f"{cell.text} {cell.small}".strip()) for cell in row))
    console.print(shown)
    for note in table.notes:
        console.print(f"- {note}", markup=False)
