"""The suite folder: who works in it, which suite it is for, which of its runs are finished and which have failed.

It holds `suite.yaml`, `cells.csv`, `runs/<run>/`, `failures/<run>.json`, `logs/<run>.log`, `splits/` and, for a smoke test,
`data/`.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import pandas as pd

from dualrefnet.errors import RunError
from dualrefnet.files import write_csv, write_json, write_yaml
from dualrefnet.suite.grid import Cell, Suite, differences, load_suite

CELL_COLUMNS = ("name", "run", "dataset", "protocol", "method", "backbone", "variant", "fold", "seed")
# How long a new call waits for workers of one that was killed; they stop by themselves within a second or two.
PATIENCE = 30.0


class Failure(NamedTuple):
    """Why a run failed.

    Attributes:
        error: one line.
        kind: of error.
        orderly: it was foreseen, and the process is fit for another run.
    """

    error: str
    kind: str
    orderly: bool = False


@contextmanager
def suite_lock(out: Path) -> Iterator[None]:
    """Keep a second call out of a suite folder, and wait until no worker of a killed call is left.

    Raises:
        RunError: another call works there.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; name a folder for the suite with --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a+", encoding="utf-8") as file:
        if not _flock(file, exclusive=True):
            file.seek(0)
            raise RunError(f"{out} is in use by another `dualrefnet suite` ({file.read().strip()}); let it end, or name another --out")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        with (out / ".workers").open("a", encoding="utf-8") as left:
            deadline = time.monotonic() + PATIENCE
            while not _flock(left, exclusive=True):
                if time.monotonic() > deadline:
                    raise RunError(f"workers of a call that was killed still write to {out}; end them, then run the same command again")
                time.sleep(0.1)
        yield


@contextmanager
def worker_lock(out: Path) -> Iterator[None]:
    """Show that a worker writes to the suite folder.

    Raises:
        RunError: the call that this worker belongs to is gone, and another one begins.
    """
    with (out / ".workers").open("a", encoding="utf-8") as file:
        if not _flock(file, exclusive=False):
            raise RunError(f"another call has taken over {out}")
        yield


def open_folder(out: Path, suite: Suite, cells: list[Cell]) -> None:
    """Write down what the folder is for, or see that it is for this suite.

    Raises:
        RunError: it isn't.
    """
    file = out / "suite.yaml"
    if file.is_file():
        changed = differences(load_suite(file), suite)
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise RunError(
                f"{out} was begun with another suite or other overrides ({'; '.join(changed[:3])}{more}); name another folder with --out"
            )
    elif any(not child.name.startswith(".") for child in out.iterdir()):
        raise RunError(f"{out} isn't empty and isn't a suite folder; name another one with --out")
    else:
        # First, and never again: with it the folder is a suite folder.
        write_yaml(file, suite.model_dump(mode="json"))
    table = pd.DataFrame([[getattr(cell, name) for name in CELL_COLUMNS] for cell in cells], columns=["cell", *CELL_COLUMNS[1:]])
    write_csv(out / "cells.csv", table)


def is_finished(out: Path, name: str) -> bool:
    """Return whether a run is finished; then what an earlier, unfinished try of it left is removed."""
    from dualrefnet.run import Run

    run = Run(out / "runs" / name)
    if run.finished:
        # A kill just after the last file was written leaves these.
        run.checkpoint_file.unlink(missing_ok=True)
        (out / "failures" / f"{name}.json").unlink(missing_ok=True)
    return run.finished


def record_end(out: Path, run: str, failure: Failure | None) -> None:
    """Write down why a run has failed, or that it has no longer."""
    file = out / "failures" / f"{run}.json"
    if failure is None:
        file.unlink(missing_ok=True)
    else:
        write_json(file, {"error": failure.error, "kind": failure.kind, "log": f"logs/{run}.log"})


def _flock(file: IO[str], exclusive: bool) -> bool:
    """Lock a file until it is closed; return False if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; two calls at once aren't noticed there.
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some cluster file systems have no locks; there the user must see to it.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    return True
