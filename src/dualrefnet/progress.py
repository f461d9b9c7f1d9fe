"""What a person sees while something takes longer than a few seconds: progress bars and notes, on standard error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

# Standard output is for results; progress and notes must not mix with a table that is piped elsewhere.
console = Console(stderr=True, highlight=False)


class ShowProgress(Protocol):
    """Shows how many of how many things are done."""

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""


def note(message: str) -> None:
    """Say something that the user should know."""
    console.print(f"[dim]·[/dim] {message}", soft_wrap=True)


def warn(message: str) -> None:
    """Say something that may spoil the result."""
    console.print(f"[bold yellow]warning:[/bold yellow] {message}", soft_wrap=True)


@contextmanager
def progress_bar(description: str, enabled: bool = True) -> Iterator[ShowProgress]:
    """Give a function that takes (done, in all) and shows a bar with the remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not enabled or not console.is_terminal
    ) as progress:
        task = progress.add_task(description, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


def track(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Give the items one after the other, with a bar of how many are done."""
    with progress_bar(description) as show:
        for done, item in enumerate(items, 1):
            yield item
            show(done, len(items))
