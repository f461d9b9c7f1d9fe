"""Train a suite: what is finished is skipped, what was cut short resumes, what fails is recorded and the rest goes on.

The suite folder holds `suite.yaml`, `cells.csv`, `runs/<run>/`, `failures/<run>.json`, `logs/<run>.log`, `splits/` and,
for a smoke test, `data/`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from filelock import FileLock, Timeout

from dualrefnet import progress
from dualrefnet.errors import DualRefNetError, RunError
from dualrefnet.files import locked, make_folder, write_csv, write_json, write_yaml
from dualrefnet.progress import note, progress_bar, warn
from dualrefnet.recipe import Recipe, differences
from dualrefnet.run import Run
from dualrefnet.suite.grid import Cell, Key, Suite, expand, load_suite, with_recipes

# Seconds a run waits for the worker of a killed call, which may write to its folder for another second or two.
PATIENCE = 30.0

SMOKE_IMAGES, SMOKE_SIZE = 120, 64


class Failure(NamedTuple):
    """Why a run failed: one line, and the kind of error."""

    error: str
    kind: str


class Event(NamedTuple):
    """A run was started, or has ended."""

    run: str
    ended: bool
    failure: Failure | None = None


@dataclass(frozen=True)
class Job:
    """One run to be done, ready to be sent to another process or machine; `suite` is absolute."""

    run: str
    recipe: Recipe
    suite: Path
    cache: Path | None
    threads: int

    @property
    def log(self) -> Path:
        return self.suite / "logs" / f"{self.run}.log"


@dataclass
class Outcome:
    """What a call has done: runs of the suite, those that an earlier call had finished, those that this one finished,
    and why others failed.
    """

    total: int
    skipped: int
    finished: list[str] = field(default_factory=list)
    failed: dict[str, Failure] = field(default_factory=dict)


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

    `workers` runs at the same time on this machine, or as Ray has room at `ray_address` (a cluster's, or `local`), each
    with `cores` (None: the machine's, shared by the workers; on Ray: 1). Without `keep_models` the parameters of
    finished runs are removed: the tables need only their predictions.

    Raises:
        DualRefNetError: the folder is in use or holds something else; Ray is not available; nothing can be read.
        KeyboardInterrupt: the workers have been stopped; the same call resumes.
    """
    if ray_address is not None:
        from dualrefnet.cluster import require_ray
        from dualrefnet.suite.ray_runner import work_on_ray

        require_ray()
    suite = with_recipes(suite)
    cells = expand(suite)
    out = out.absolute()
    with _suite_lock(out):
        _open_folder(out, suite, cells)
        if suite.smoke:
            _draw_sample(out / "data")
        _count_splits(out, suite)
        runs = {cell.run: cell.recipe for cell in cells if cell.run == cell.name}
        pending = {run: recipe for run, recipe in runs.items() if not _finished(out, run)}
        outcome = Outcome(len(runs), len(runs) - len(pending))
        if outcome.skipped:
            note(f"{outcome.skipped} of {outcome.total} runs are finished already and are skipped")
        for run, failure in _fill_stores(pending, cache).items():
            del pending[run]
            _record(out, outcome, run, failure)
        threads = cores or (1 if ray_address else max(1, available_cores() // workers))
        jobs = [Job(run, recipe, out, cache and cache.absolute(), threads) for run, recipe in pending.items()]
        events = work_on_ray(jobs, ray_address) if ray_address else _work_locally(jobs, workers)
        with progress_bar("runs") as show, closing(events):
            starts: dict[str, float] = {}
            for event in events:
                if not event.ended:
                    starts[event.run] = time.monotonic()
                    note(f"started {event.run}")
                    continue
                _record(out, outcome, event.run, event.failure)
                if event.failure is None and not keep_models:
                    Run(out / "runs" / event.run).weights_file.unlink(missing_ok=True)
                done = outcome.skipped + len(outcome.finished) + len(outcome.failed)
                show(done, outcome.total)
                took = timedelta(seconds=round(time.monotonic() - starts.get(event.run, time.monotonic())))
                if event.failure is None:
                    note(f"finished {event.run} in {took}; {done}/{outcome.total} done")
                else:
                    warn(f"{event.run} failed after {took}: {event.failure.error}")
    return outcome


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _suite_lock(out: Path) -> Iterator[None]:
    """Keep a second call out of a suite folder."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; name a folder for the suite with --out")
    busy = f"{out} is in use by another `dualrefnet suite`; wait until it ends, or name another --out"
    with locked(make_folder(out) / ".lock", busy):
        yield


def _open_folder(out: Path, suite: Suite, cells: list[Cell]) -> None:
    """Write what the folder is for, or refuse one that is for something else."""
    file = out / "suite.yaml"
    if file.is_file():
        changed = differences(load_suite(file), suite)
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise RunError(
                f"{out} was begun with another suite or other overrides ({'; '.join(changed[:3])}{more}); "
                "name another folder with --out"
            )
    elif any(not child.name.startswith(".") for child in out.iterdir()):
        raise RunError(f"{out} isn't empty and isn't a suite folder; name another one with --out")
    else:
        write_yaml(file, suite.model_dump(mode="json"))
    rows = [(cell.name, cell.run, *cell.key, cell.fold, cell.seed) for cell in cells]
    write_csv(out / "cells.csv", pd.DataFrame(rows, columns=["cell", "run", *Key._fields, "fold", "seed"]))


def _finished(out: Path, name: str) -> bool:
    """Return whether a run is finished, with files that can be read; then leftovers of earlier tries are removed."""
    run = Run(out / "runs" / name)
    finished = run.finished and not run.damage()
    if finished:
        # A kill just after the last file was written leaves these.
        run.checkpoint_file.unlink(missing_ok=True)
        (out / "failures" / f"{name}.json").unlink(missing_ok=True)
    return finished


def _record(out: Path, outcome: Outcome, run: str, failure: Failure | None) -> None:
    file = out / "failures" / f"{run}.json"
    if failure is None:
        outcome.finished.append(run)
        file.unlink(missing_ok=True)
    else:
        outcome.failed[run] = failure
        write_json(file, {**failure._asdict(), "log": f"logs/{run}.log"})


def _draw_sample(root: Path) -> None:
    from dualrefnet.data.synthetic import make_synthetic

    if (root / "metadata.csv").is_file():
        return
    note("writing the sample data set: synthetic images, not clinical ones")
    with progress_bar("images") as show:
        make_synthetic(root, images=SMOKE_IMAGES, side=SMOKE_SIZE, progress=show)


def _count_splits(out: Path, suite: Suite) -> None:
    """Write the rows of every split that the suite names."""
    from dualrefnet.data.loader import read_dataset
    from dualrefnet.data.protocols import split_dataset

    for split in suite.splits:
        data = split.recipe.data
        rows = split_dataset(
            read_dataset(split.recipe), data.protocol, data.fold, data.folds, data.split_seed, data.split_file
        )
        write_csv(out / "splits" / f"{data.dataset}-{data.protocol}.csv", rows)


def _fill_stores(recipes: dict[str, Recipe], cache: Path | None) -> dict[str, Failure]:
    """Prepare the images of all runs, once for those that share them; return the runs whose data cannot be read."""
    from dualrefnet.data.loader import fill_recipe_store, read_dataset, stored_size
    from dualrefnet.data.schema import Dataset

    datasets: dict[str, Dataset] = {}
    stores: dict[str, Failure | None] = {}
    failures = {}
    for run, recipe in recipes.items():
        if recipe.data.rows == "all":
            continue
        source = recipe.data.model_dump_json(include={"dataset", "root", "description", "keep", "classes"})
        key = f"{source} {recipe.image.model_dump_json()} {stored_size(recipe)}"
        if key not in stores:
            stores[key] = None
            try:
                if source not in datasets:
                    datasets[source] = read_dataset(recipe)
                fill_recipe_store(recipe, datasets[source], cache)
            except DualRefNetError as error:
                stores[key] = Failure(" ".join(str(error).split()), type(error).__name__)
                warn(str(error))
        if failure := stores[key]:
            failures[run] = failure
    return failures


def perform(job: Job) -> Failure | None:
    """Train a job in this process, with its output in its log; return why it failed, or None."""
    with _output_to(job.log):
        print(f"--- {datetime.now():%Y-%m-%d %H:%M:%S}, process {os.getpid()} on {socket.gethostname()}", flush=True)
        lock = job.suite / ".locks" / job.run
        lock.parent.mkdir(exist_ok=True)
        try:
            with FileLock(lock, timeout=PATIENCE):
                _train(job)
            return None
        except Timeout:
            return Failure("a worker of another call still trains it; end that, then run the same command", "RunError")
        except DualRefNetError as error:
            progress.error(str(error))
            return Failure(" ".join(str(error).split()), type(error).__name__)
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines()
            return Failure(f"{type(error).__name__}{f': {lines[0]}' if lines else ''}", type(error).__name__)


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


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Append what this process prints to a file, the output of C libraries included."""
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


class _Worker:
    """A pool of one process: when a run takes its process down, it fails alone and the other pools go on."""

    def __init__(self, slot: int) -> None:
        # Not forked: a fork of a process with threads (torch, OpenCV) may hang, and CUDA does not survive it.
        context = get_context("spawn")
        receiver, self._alive = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(1, context, initializer=_start_worker, initargs=(receiver, slot))

    def submit(self, job: Job) -> Future[Failure | None]:
        return self._pool.submit(perform, job)

    def kill(self) -> None:
        # Safe at any moment: every file is written beside its place and then renamed, and runs resume.
        self._alive.close()
        self._pool.shutdown(cancel_futures=True)


def _start_worker(alive: Connection, slot: int) -> None:
    """Prepare a worker, which ends as soon as its parent closes the other end of `alive` or dies."""
    # Ctrl-C reaches every process of the terminal; the parent alone decides what becomes of a run.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        with suppress(EOFError, OSError):
            alive.recv()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    import torch

    gpus = torch.cuda.device_count()
    if gpus > 1:
        # Before CUDA is used for the first time, so that accelerate sees one GPU and takes it.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]


def _work_locally(jobs: list[Job], workers: int) -> Generator[Event]:
    """Do jobs in processes of this machine; closing the iterator kills them."""
    waiting, slots = deque(jobs), deque(range(min(workers, len(jobs))))
    pool: dict[int, _Worker] = {}
    running: dict[Future[Failure | None], tuple[int, str]] = {}
    try:
        while waiting or running:
            while waiting and slots:
                slot, job = slots.popleft(), waiting.popleft()
                if slot not in pool:
                    pool[slot] = _Worker(slot)
                running[pool[slot].submit(job)] = (slot, job.run)
                yield Event(job.run, ended=False)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                slot, run = running.pop(future)
                try:
                    failure = future.result()
                except BrokenProcessPool:
                    failure = Failure(
                        "its process died; most often the system was out of memory: "
                        "fewer --workers, or a smaller training.batch_size",
                        "WorkerDied",
                    )
                if failure is not None:
                    # Its memory or its GPU may be in disorder.
                    pool.pop(slot).kill()
                slots.append(slot)
                yield Event(run, ended=True, failure=failure)
    finally:
        for worker in pool.values():
            worker.kill()
