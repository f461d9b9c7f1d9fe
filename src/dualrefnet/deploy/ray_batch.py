"""Prediction on a Ray cluster, with Ray Data: the same rows, batches and file as on one machine, on many.

The list of cases goes into a file beside the result, which every machine must see, as it must see the photographs and
the model. Ray
passes no more around than places in that file on the way out, and lines of the result on the way back, so neither this
process nor
Ray's memory grows with the number of photographs.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualrefnet.deploy.batch import BATCH, Batch, Case, Cases, ModelFolder, Work, predict_batches
from dualrefnet.errors import DependencyError, RunError

# Batches that an actor is given at once: it decodes the second while it predicts the first. Lost if it dies, and then
# done again.
BATCHES_A_TASK = 16
RETRIES = 3

try:
    import ray
    import ray.data
except ImportError:
    raise DependencyError("prediction on Ray needs Ray Data: pip install 'dualrefnet[scale]'") from None


def ray_work(model: ModelFolder, out: Path, address: str, batch: int = BATCH, workers: int | None = None) -> Work:
    """Return what does the work of `dualrefnet.deploy.batch.predict_to_csv` on Ray.

    Args:
        model: what every actor loads; its folder must be seen by all machines.
        out: the result; the list of cases lies beside it while the work is done.
        address: of a cluster (`auto`, `ray://...`, `host:port`), or `local` to start Ray on this machine.
        batch: rows that a model sees at once.
        workers: CPUs of one actor, which decode; None: one.
    """
    # A remote machine has another working directory.
    model = ModelFolder(model.path.resolve(), model.device, model.variant)
    spool = out.with_name(f"{out.name}.cases").resolve()

    def work(cases: Cases, first: int) -> Iterator[Batch]:
        with ExitStack() as stack:
            stack.callback(spool.unlink, missing_ok=True)
            places = _write_cases(cases.start_at(first), spool, batch * BATCHES_A_TASK)
            _connect(address, stack)
            yield from _predict(model, spool, places, batch, workers or 1)

    return work


def _predict(model: ModelFolder, spool: Path, places: NDArray[np.int64], batch: int, workers: int) -> Iterator[Batch]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = 1 if model.device.startswith("cuda") else 0
    actors = int(min(resources.get("CPU", 0) // workers, resources.get("GPU", 0) if gpus else len(places)))
    if actors < 1:
        have = ", ".join(f"{resources.get(kind, 0):.0f} {kind}s" for kind in ("CPU", "GPU"))
        wanted = f"{workers} CPUs{' and a GPU' if gpus else ''}"
        raise RunError(f"a model is to have {wanted} and the cluster has {have}; change --workers or --device")
    # A copy: what the caller does with Ray Data besides is none of our business.
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = context.print_on_execution_start = False
    # Every batch is a block of its own, and is written as soon as it is there; otherwise a task's batches come
    # together.
    context.target_max_block_size = 1
    most = min(actors, len(places))
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # Ray 2.60 to 2.63 have no other way to bound retries, and warn that this one will end.
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        # One block a task, so that slow ones are shared out among the actors.
        results = ray.data.from_numpy([place[None] for place in places]).map_batches(
            _Actor,
            fn_constructor_args=(model, spool, batch, workers),
            batch_size=1,
            batch_format="numpy",
            num_cpus=workers,
            num_gpus=gpus,
            # A photograph that takes its process down does so every time.
            max_task_retries=RETRIES,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
        )
    expected = 0
    try:
        for row in results.iter_rows():
            if row["number"] != expected:
                raise RuntimeError(f"Ray returned batch {row['number']} where {expected} should be")
            expected += 1
            yield Batch(row["lines"], int(row["failed"]))
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = lines[-1] if lines else type(error).__name__
        raise RunError(f"Ray ended the prediction: {said}; what is done is kept for --resume") from error


class _Actor:
    """A process of the cluster that holds the model."""

    def __init__(self, model: ModelFolder, spool: Path, batch: int, workers: int) -> None:
        self._predictor, self._spool = model.load(), spool
        self._batch, self._workers = batch, workers

    def __call__(self, task: dict[str, NDArray[np.int64]]) -> Iterator[dict[str, Any]]:
        """Predict the cases of one task; every row of the answer is a batch."""
        for number, offset, rows in task["data"]:
            cases = _read_cases(self._spool, int(offset), int(rows))
            for further, done in enumerate(predict_batches(self._predictor, cases, self._batch, self._workers)):
                yield {"number": [int(number) + further], "lines": [done.lines], "failed": [done.failed]}


def _write_cases(cases: Iterator[Case], spool: Path, rows: int) -> NDArray[np.int64]:
    """Write cases as lines of JSON; return of every task, (tasks, 3): number of its first batch, where its lines
    begin, how many.
    """
    places: list[tuple[int, int, int]] = []
    with spool.open("wb") as file:
        # It holds patients' answers.
        os.chmod(spool, 0o600)
        while chunk := list(islice(cases, rows)):
            places.append((len(places) * BATCHES_A_TASK, file.tell(), len(chunk)))
            for case in chunk:
                path = None if case.path is None else str(case.path.absolute())
                line = json.dumps([case.name, path, case.form, case.error])
                file.write(line.encode("ascii") + b"\n")
    return np.array(places, dtype=np.int64).reshape(-1, 3)


def _read_cases(spool: Path, offset: int, rows: int) -> Iterator[Case]:
    with spool.open("rb") as file:
        file.seek(offset)
        for line in islice(file, rows):
            name, path, form, error = json.loads(line)
            yield Case(name, None if path is None else Path(path), form, error)


def _connect(address: str, stack: ExitStack) -> None:
    """Connect to Ray, and leave it when the stack is left; a connection that is there already is used, and stays."""
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(f"no Ray cluster answers at {address}: {' '.join(str(error).split())}") from None
    stack.callback(ray.shutdown)
