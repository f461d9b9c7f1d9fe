"""What a person sees on the terminal: results on standard output; notes, warnings, errors and bars on the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

# Characters a line where the output goes into a file.
PIPED = 140
# Seconds between two lines of progress where there is no terminal.
EVERY = 30.0


def terminal(stderr: bool = False, width: int | None = None) -> Console:
    """Return a console on which text stands as it is: names in square brackets are no markup, `:car:` is no picture."""
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


Item = TypeVar("Item")

# Standard output is for results; progress and notes must not mix with a table that is piped elsewhere.
console = terminal(stderr=True)


def output() -> Console:
    """Return the console of results: as wide as the terminal, or as a page where there is none.

    $COLUMNS isn't asked where there is none: readline leaves one to the children of every process that imports it.
    """
    found = terminal()
    return found if found.is_terminal else terminal(width=PIPED)


class ShowProgress(Protocol):
    """Shows how many of how many things are done."""

    def __call__(self, done: int, total: int) -> None: ...


def note(message: str) -> None:
    """Say something that the user should know."""
    console.print(Text.assemble(("· ", "dim"), message), soft_wrap=True)


def warn(message: str) -> None:
    """Say something that may spoil the result."""
    console.print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)


def error(message: str) -> None:
    """Say what went wrong and what to do."""
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


@contextmanager
def progress_bar(description: str, enabled: bool = True) -> Iterator[ShowProgress]:
    """Give a function that takes (done, in all) and shows a bar; without a terminal a line every 30 seconds."""
    if not enabled or not console.is_terminal:
        yield _lines(description) if enabled else lambda done, total: None
        return
    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(description: str) -> ShowProgress:
    start = noted = time.monotonic()
    first: int | None = None

    def show(done: int, total: int) -> None:
        nonlocal first, noted
        # What an earlier process did says nothing about the speed.
        first = done if first is None else first
        now = time.monotonic()
        if now - noted >= EVERY and done > first:
            noted = now
            left = timedelta(seconds=round((total - done) * (now - start) / (done - first)))
            note(f"{description}: {done:,} of {total:,}, {left} left")

    return show


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Give the items one after the other, with a bar of how many are done; none without a description."""
    with progress_bar(description, bool(description)) as show:
        for done, item in enumerate(items, 1):
            yield item
            show(done, len(items))
