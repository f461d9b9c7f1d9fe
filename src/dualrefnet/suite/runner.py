"""The suite folder: who works in it, which suite it is for, which of its runs are finished and which have failed.

It holds `suite.yaml`, `cells.csv`, `runs/<run>/`, `failures/<run>.json`, `logs/<run>.log`, `splits/` and, for a smoke
test,
`data/`.
"""

# also: The processes that do the runs of a suite on this machine: a run that takes its process down fails alone.
# also: What a call on a suite has done so far, and what a person sees of it.
# also: Running a suite: what is finished is skipped, what was cut short goes on, what fails is written down and the
# rest runs.

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Literal, NamedTuple

import pandas as pd
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from dualrefnet.errors import DualRefNetError, RunError
from dualrefnet.files import remove_partial, write_csv, write_json, write_yaml
from dualrefnet.progress import console, progress_bar, remark, warn
from dualrefnet.recipe import Recipe
from dualrefnet.run import Run
from dualrefnet.suite.grid import Cell, Suite, differences, expand, load_suite, with_recipes

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
            raise RunError(
                f"{out} is in use by another `dualrefnet suite` ({file.read().strip()}); let it end, or name another --out"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        with (out / ".workers").open("a", encoding="utf-8") as left:
            deadline = time.monotonic() + PATIENCE
            while not _flock(left, exclusive=True):
                if time.monotonic() > deadline:
                    raise RunError(
                        f"workers of a call that was killed still write to {out}; end them, then run the same command again"
                    )
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
    table = pd.DataFrame(
        [[getattr(cell, name) for name in CELL_COLUMNS] for cell in cells], columns=["cell", *CELL_COLUMNS[1:]]
    )
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


@dataclass(frozen=True)
class Job:
    """One run to be done, ready to be sent to another process or machine.

    Attributes:
        run: its name.
        recipe: what to train.
        suite: the suite folder, absolute.
        cache: where image stores lie; None: the user's cache folder.
        threads: CPU threads.
    """

    run: str
    recipe: Recipe
    suite: Path
    cache: Path | None
    threads: int

    @property
    def log(self) -> Path:
        """Where what the run says is written."""
        return self.suite / "logs" / f"{self.run}.log"


class Event(NamedTuple):
    """A run was started, or has ended."""

    run: str
    state: Literal["started", "ended"]
    failure: Failure | None = None


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def perform(job: Job) -> Failure | None:
    """Train a job in this process, all it says going to its log; return why it failed, or None."""
    with _saying_to(job.log):
        print(f"--- {datetime.now():%Y-%m-%d %H:%M:%S}, process {os.getpid()} on {socket.gethostname()}", flush=True)
        try:
            with worker_lock(job.suite):
                _train(job)
            return None
        except DualRefNetError as error:
            console.print(f"[bold red]error:[/bold red] {error}", soft_wrap=True)
            return Failure(" ".join(str(error).split()), type(error).__name__, orderly=True)
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines()
            return Failure(f"{type(error).__name__}{f': {lines[0]}' if lines else ''}", type(error).__name__)


def work_locally(jobs: list[Job], workers: int) -> Generator[Event]:
    """Do jobs in processes of this machine, several at a time; closing the iterator kills them.

    A process does one job after another, and is replaced after an unforeseen error: its memory or its GPU may be in
    disorder.
    """
    waiting = list(reversed(jobs))
    idle: list[_Worker] = [_Worker(slot) for slot in range(min(workers, len(jobs)))]
    busy: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and idle:
                worker = idle.pop(0)
                worker.begin(waiting.pop())
                busy.append(worker)
                yield Event(worker.run, "started")
            ready = wait([handle for worker in busy for handle in (worker.connection, worker.sentinel)])
            for worker in [worker for worker in busy if worker.connection in ready or worker.sentinel in ready]:
                busy.remove(worker)
                failure = worker.result()
                if failure is None or failure.orderly:
                    idle.append(worker)
                else:
                    worker.kill()
                    idle += [_Worker(worker.slot)] if waiting else []
                yield Event(worker.run, "ended", failure)
    finally:
        for worker in (*idle, *busy):
            worker.kill()


def _train(job: Job) -> None:
    import cv2
    import torch

    from dualrefnet.training.train import train_recipe

    torch.set_num_threads(job.threads)
    cv2.setNumThreads(job.threads)
    try:
        train_recipe(job.recipe, job.suite / "runs" / job.run, resume=True, cache=job.cache, workers=job.threads)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Worker:
    """A process that does jobs, seen from its parent."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.run = ""
        # Not forked: a fork of a process with threads (torch, OpenCV) may hang, and CUDA doesn't survive it.
        context = get_context("spawn")
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, slot), daemon=True, name=f"dualrefnet-suite-{slot}")
        self._process.start()
        other.close()
        self.sentinel = self._process.sentinel

    def begin(self, job: Job) -> None:
        self.run = job.run
        # If it is dead, its sentinel tells.
        with suppress(OSError):
            self.connection.send(job)

    def result(self) -> Failure | None:
        with suppress(EOFError, OSError):
            if self.connection.poll():
                return self.connection.recv()  # type: ignore[no-any-return]
        self._process.join(5)
        return Failure(_why_dead(self._process.exitcode), "WorkerDied")

    def kill(self) -> None:
        # Killing is safe at any moment: every file is written beside its place and then renamed, and runs go on.
        self._process.kill()
        self._process.join()
        self.connection.close()


def _why_dead(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = (
            "; most often the system was out of memory: fewer --workers, or a smaller training.batch_size"
            if name == "SIGKILL"
            else ""
        )
        return f"its process was ended by {name}{hint}"
    return f"its process ended with status {code}"


def _serve(connection: Connection, slot: int) -> None:
    """Do jobs until the parent goes."""
    _die_with_parent()
    # Ctrl-C reaches the whole terminal; the parent alone decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    gpus = torch.cuda.device_count()
    if gpus > 1:
        # Before CUDA is used for the first time, so that accelerate sees one GPU and takes it.
        visible = (
            os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            if os.environ.get("CUDA_VISIBLE_DEVICES")
            else map(str, range(gpus))
        )
        os.environ["CUDA_VISIBLE_DEVICES"] = list(visible)[slot % gpus]
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(perform(job))


def _die_with_parent() -> None:
    """Make sure that this process doesn't outlive its parent, however that ends."""
    parent = parent_process()
    assert parent is not None
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def watch() -> None:
        # The sentinel is a pipe that the parent's end closes, on every system.
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _saying_to(log: Path) -> Iterator[None]:
    """Lead what this process says, its libraries' words in C included, to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        kept = [os.dup(number) for number in (1, 2)]
        try:
            _flush()
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            _flush()
            for number, descriptor in zip((1, 2), kept, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


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
            TextColumn("{task.description}"),
            BarColumn(),
            _Says(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task(
            "all runs", total=outcome.total, completed=self._earlier, says=self._summary
        )

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
            self._tasks[event.run] = self._progress.add_task(
                event.run, total=None, says=lambda: duration(time.monotonic() - now)
            )
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


SMOKE_IMAGES, SMOKE_SIDE = 120, 64


def run_suite(
    suite: Suite,
    out: Path,
    workers: int = 1,
    cache: Path | None = None,
    ray_address: str | None = None,
    cores: int | None = None,
    keep_models: bool = True,
) -> Outcome:
    """Train what a suite folder lacks.

    Args:
        suite: a checked suite, overrides included.
        out: the suite folder; new, or begun with the same suite.
        workers: runs at the same time on this machine.
        cache: where image stores lie; None: the user's cache folder.
        ray_address: run on a Ray cluster instead: its address, or `local`.
        cores: CPU cores of one run; None: the machine's, shared by the workers (on Ray: 1).
        keep_models: keep the parameters of finished runs; the tables need their predictions alone.

    Raises:
        DualRefNetError: the folder is in use or holds something else; Ray isn't there; nothing can be read.
        KeyboardInterrupt: the workers have been stopped; the same call goes on.
    """
    if ray_address is not None:
        from dualrefnet.suite.ray_runner import require_ray

        require_ray()
    suite = with_recipes(suite)
    cells = expand(suite)
    recipes = {cell.run: cell.recipe for cell in cells if cell.run == cell.name}
    out = out.absolute()
    with suite_lock(out):
        open_folder(out, suite, cells)
        if suite.smoke:
            _draw(out / "data")
        _count_splits(out, suite)
        pending = {run: recipe for run, recipe in recipes.items() if not is_finished(out, run)}
        outcome = Outcome(len(recipes), len(recipes) - len(pending))
        if outcome.skipped:
            remark(f"{outcome.skipped} of {outcome.total} runs are finished already and are skipped")
        for run, failure in _fill_stores(pending, cache).items():
            del pending[run]
            record_end(out, run, failure)
            outcome.count(run, failure)
        threads = cores or (1 if ray_address else max(1, available_cores() // workers))
        jobs = [Job(run, recipe, out, cache and cache.absolute(), threads) for run, recipe in pending.items()]
        if ray_address:
            from dualrefnet.suite.ray_runner import work_on_ray

            events = work_on_ray(jobs, ray_address)
        else:
            events = work_locally(jobs, workers)
        with View(outcome) as view, closing(events):
            for event in events:
                if event.state == "ended":
                    record_end(out, event.run, event.failure)
                    if event.failure is None and not keep_models:
                        Run(out / "runs" / event.run).weights_file.unlink(missing_ok=True)
                    outcome.count(event.run, event.failure)
                view.show(event)
    return outcome


def _draw(root: Path) -> None:
    from dualrefnet.data.synthetic import make_synthetic

    if (root / "metadata.csv").is_file():
        return
    remove_partial(root)
    remark("drawing the sample data set: invented pictures, not clinical ones")
    with progress_bar("drawing") as show:
        make_synthetic(root, images=SMOKE_IMAGES, side=SMOKE_SIDE, progress=show)


def _count_splits(out: Path, suite: Suite) -> None:
    """Write the rows of every split that the suite names."""
    from dualrefnet.data.loader import read_dataset
    from dualrefnet.data.protocols import split_dataset

    for split in suite.splits:
        data = split.recipe.data
        rows = split_dataset(read_dataset(split.recipe), data.protocol, data.fold, data.folds, data.split_seed)
        write_csv(out / "splits" / f"{data.dataset}-{data.protocol}.csv", rows)


def _fill_stores(recipes: dict[str, Recipe], cache: Path | None) -> dict[str, Failure]:
    """Prepare the images of all runs, once for those that share them; return the runs that can't have them, and why."""
    from dualrefnet.data.loader import fill_recipe_store, read_dataset, stored_size
    from dualrefnet.data.schema import Dataset

    datasets: dict[str, Dataset] = {}
    stores: dict[str, DualRefNetError | None] = {}
    failures = {}
    for run, recipe in recipes.items():
        if recipe.data.rows == "all":
            continue
        source = recipe.data.model_dump_json(include={"dataset", "root", "description"})
        key = f"{source} {recipe.image.model_dump_json()} {stored_size(recipe)}"
        if key not in stores:
            try:
                if source not in datasets:
                    datasets[source] = read_dataset(recipe)
                fill_recipe_store(recipe, datasets[source], cache)
                stores[key] = None
            except DualRefNetError as error:
                stores[key] = error
                warn(str(error))
        problem = stores[key]
        if problem is not None:
            failures[run] = Failure(" ".join(str(problem).split()), type(problem).__name__)
    return failures
