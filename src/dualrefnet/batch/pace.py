"""What a person sees of a prediction that takes hours: how many are done, how fast, how long it will take; on standard error."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dualrefnet.progress import console, remark

# Seconds over which the speed is taken, and between two lines where there is no terminal.
WINDOW = 30.0
EVERY = 60.0


class Pace:
    """The speed of the last half minute; what an earlier process did counts for nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def after(self, done: int, total: int) -> str:
        """Note that `done` of `total` are done; return the speed and the time left, empty until both can be told."""
        now = self._clock()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()
        then, before = self._seen[0]
        if now <= then or done <= before:
            return ""
        speed = (done - before) / (now - then)
        left = timedelta(seconds=round((total - done) / speed))
        return f"{speed:,.{0 if speed >= 10 else 1}f} images/s, {left} left"


@contextmanager
def show_pace(description: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that takes (done, in all): it moves a bar on a terminal, and writes a line a minute elsewhere."""
    pace = Pace()
    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None, said="")
        said_at = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal said_at
            said = pace.after(done, total)
            progress.update(task, completed=done, total=total, said=said)
            if not console.is_terminal and time.monotonic() - said_at > EVERY:
                said_at = time.monotonic()
                remark(f"{description}: {done:,} of {total:,}, {said}")

        yield update
