"""Trainings in other processes of this machine, or as tasks of a Ray cluster.

A training that fails is reported and the others go on; a worker ends when its parent does.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from dualrefnet import progress
from dualrefnet.cluster import connect
from dualrefnet.errors import DualRefNetError, RunError
from dualrefnet.recipe import Recipe
from dualrefnet.run import Run

# Seconds a run waits for the worker of a killed call, which may write to its folder for another second or two.
PATIENCE = 30.0


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
    """One run to be trained, ready to be sent elsewhere; `fold`: a member of the cross-fitted run in `folder`."""

    run: str
    recipe: Recipe
    folder: Path
    home: Path
    cache: Path | None
    threads: int
    fold: int | None = None
    tested: bool = True

    @property
    def log(self) -> Path:
        return self.home / "logs" / f"{self.run}.log"


def work(jobs: Iterable[Job], workers: int, ray_address: str | None) -> Generator[Event]:
    """Do jobs (a deque may be added to), `workers` at a time here, or on Ray; closing the iterator ends them."""
    jobs = jobs if isinstance(jobs, deque) else deque(jobs)
    return work_on_ray(jobs, ray_address) if ray_address else work_locally(jobs, workers)


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def perform(job: Job) -> Failure | None:
    """Train a job in this process, with its output in its log; return why it failed, or None."""
    with _output_to(job.log):
        print(f"--- {datetime.now():%Y-%m-%d %H:%M:%S}, process {os.getpid()} on {socket.gethostname()}", flush=True)
        lock = job.home / ".locks" / job.run
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

    from dualrefnet.training.train import train_member, train_recipe

    torch.set_num_threads(job.threads)
    cv2.setNumThreads(job.threads)
    try:
        if job.fold is None:
            train_recipe(job.recipe, job.folder, resume=True, cache=job.cache, workers=job.threads, tested=job.tested)
        else:
            train_member(Run(job.folder), job.fold, job.cache, job.threads)
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


def work_locally(waiting: deque[Job], workers: int) -> Generator[Event]:
    """Do jobs in processes of this machine; closing the iterator kills them."""
    slots = deque(range(workers))
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


def work_on_ray(jobs: deque[Job], address: str) -> Generator[Event]:
    """Do jobs as Ray tasks, as many at a time as the cluster has room for; closing the iterator cancels them.

    A job takes `threads` CPUs, and a GPU if the cluster has any and the recipe may use it.
    """
    # Where data, weights and prepared images are, which the machines of a cluster cannot know.
    variables = {name: value for name, value in os.environ.items() if name.startswith("DUALREFNET_")}
    options: dict[str, Any] = {"runtime_env": {"env_vars": variables}}
    if address == "local":
        options |= {"num_cpus": available_cores(), "include_dashboard": False}
    ray = connect(address, **options)
    try:
        resources = ray.cluster_resources()
        cpus = resources.get("CPU", 0)
        # A crash would only be repeated: the next call tries failed runs again.
        task = ray.remote(max_retries=0)(_perform_in)
        waiting: dict[Any, tuple[Job, int]] = {}
        started: set[str] = set()
        while jobs or waiting:
            while jobs:
                job = jobs.popleft()
                if job.threads > cpus:
                    raise RunError(f"a run needs {job.threads} CPUs and the cluster has {cpus:.0f}; give fewer --cores")
                gpus = 1 if resources.get("GPU", 0) and job.recipe.training.device in ("auto", "cuda") else 0
                reference = task.options(num_cpus=job.threads, num_gpus=gpus, name=job.run).remote(job, Path.cwd())
                waiting[reference] = (job, _size(job.log))
            ready, _ = ray.wait(list(waiting), timeout=1.0)
            for job, before in waiting.values():
                # The scheduler does not tell when a task begins; its log does.
                if job.run not in started and _size(job.log) > before:
                    started.add(job.run)
                    yield Event(job.run, ended=False)
            for reference in ready:
                job, _ = waiting.pop(reference)
                yield Event(job.run, ended=True, failure=_result(ray, reference))
    finally:
        # Disconnecting ends the tasks of this call that are still running.
        with suppress(Exception):
            ray.shutdown()


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _perform_in(job: Job, folder: Path) -> Failure | None:
    # Paths in a recipe are relative to the folder of the command.
    if folder.is_dir():
        os.chdir(folder)
    return perform(job)


def _result(ray: Any, reference: Any) -> Failure | None:
    try:
        return ray.get(reference)  # type: ignore[no-any-return]
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        memory = isinstance(error, ray.exceptions.OutOfMemoryError)
        hint = "; give it more --cores, so that fewer runs share a machine" if memory else ""
        return Failure(f"Ray ended it: {lines[0] if lines else type(error).__name__}{hint}", type(error).__name__)
