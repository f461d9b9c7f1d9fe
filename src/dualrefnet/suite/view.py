"""What a call on a suite has done so far, and what a person sees of it."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from dualrefnet.progress import console, remark, warn
from dualrefnet.suite.folder import Failure
from dualrefnet.suite.workers import Event


@dataclass
class Outcome:
    """What a call has done.

    Attributes:
        total: runs of the suite.
        skipped: runs that an earlier call had finished.
        finished: runs that this call finished.
        failed: run -> why.
    """

    total: int
    skipped: int
    finished: list[str] = field(default_factory=list)
    failed: dict[str, Failure] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """Runs of which it is known how they have ended."""
        return self.skipped + len(self.finished) + len(self.failed)

    def count(self, run: str, failure: Failure | None) -> None:
        """Count a run that has ended."""
        if failure is None:
            self.finished.append(run)
        else:
            self.failed[run] = failure


class View(AbstractContextManager["View"]):
    """What a person sees while a suite runs: a bar and the running cells on a terminal, else a line an event."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._begun = time.monotonic()
        self._starts: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._earlier = outcome.done
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), _Says(), console=console, transient=True, disable=not console.is_terminal
        )
        self._all = self._progress.add_task("all runs", total=outcome.total, completed=self._earlier, says=self._summary)

    def __enter__(self) -> View:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        """Show that a run was started or has ended."""
        outcome, now = self._outcome, time.monotonic()
        if event.state == "started":
            self._starts[event.run] = now
            self._tasks[event.run] = self._progress.add_task(event.run, total=None, says=lambda: duration(time.monotonic() - now))
            if not console.is_terminal:
                remark(f"started {event.run}")
            return
        took = duration(now - self._starts.get(event.run, now))
        if event.run in self._tasks:
            self._progress.remove_task(self._tasks.pop(event.run))
        self._progress.update(self._all, completed=outcome.done)
        if event.failure is not None:
            warn(f"{event.run} failed after {took}: {event.failure.error}")
        elif not console.is_terminal:
            remark(f"finished {event.run} in {took}; {self._summary()}")

    def _summary(self) -> str:
        outcome, done = self._outcome, self._outcome.done
        parts = [f"{done}/{outcome.total} done"] + ([f"{len(outcome.failed)} failed"] if outcome.failed else [])
        if self._earlier < done < outcome.total:
            left = (time.monotonic() - self._begun) / (done - self._earlier) * (outcome.total - done)
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)


class _Says(ProgressColumn):
    """What the task itself has to say."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["says"]())


def duration(seconds: float) -> str:
    """Write a time as a person would: `45 s`, `12 min`, `3 h 5 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
