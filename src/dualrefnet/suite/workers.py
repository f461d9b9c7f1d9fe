"""The processes that do the runs of a suite on this machine: a run that takes its process down fails alone."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal, NamedTuple

from dualrefnet.errors import DualRefNetError
from dualrefnet.progress import console
from dualrefnet.recipe import Recipe
from dualrefnet.suite.folder import Failure, worker_lock


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

    A process does one job after another, and is replaced after an unforeseen error: its memory or its GPU may be in disorder.
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
        hint = "; most often the system was out of memory: fewer --workers, or a smaller training.batch_size" if name == "SIGKILL" else ""
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
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else map(str, range(gpus))
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
