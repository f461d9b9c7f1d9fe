"""Prediction on a Ray cluster: the chunks of `dualrefnet.deploy.batch`, on many machines.

Each actor holds the model and is given one chunk of rows at a time, so memory doesn't grow with their number. The model
and the images must be on a file system that all machines see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dualrefnet.cluster import connect
from dualrefnet.deploy.batch import BATCH, Case, Chunk, ModelFolder, Work, predict_chunks
from dualrefnet.errors import DependencyError, RunError, install_hint

try:
    import ray
    from ray.util import ActorPool
except ImportError:
    raise DependencyError(f"prediction on Ray needs Ray: {install_hint('scale')}") from None

# An image that takes its process down does so every time.
RETRIES = 3


class _Actor:
    def __init__(self, model: ModelFolder, batch: int, workers: int) -> None:
        self._predictor, self._batch, self._workers = model.load(), batch, workers

    def predict(self, number: int, cases: list[Case]) -> tuple[int, bytes]:
        [result] = predict_chunks(self._predictor, [(number, cases)], self._batch, self._workers)
        return result


def ray_work(model: ModelFolder, address: str, batch: int = BATCH, workers: int | None = None) -> Work:
    """Return the `work` of `predict_to_csv` on Ray; every actor decodes with `workers` CPUs (None: one)."""
    # A remote machine has another working directory.
    model, cpus = replace(model, path=model.path.resolve()), workers or 1

    def work(chunks: Iterator[Chunk]) -> Iterator[tuple[int, bytes]]:
        connected = ray.is_initialized()
        if not connected:
            connect(address, **({"include_dashboard": False} if address == "local" else {}))
        try:
            yield from _predict(model, chunks, batch, cpus)
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else type(error).__name__
            raise RunError(f"Ray ended the prediction: {reason}; finished chunks are kept for --resume") from error
        finally:
            if not connected:
                ray.shutdown()

    return work


def _predict(model: ModelFolder, chunks: Iterator[Chunk], batch: int, cpus: int) -> Iterator[tuple[int, bytes]]:
    gpus = 1 if model.device.startswith("cuda") else 0
    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    most = int(available.get("CPU", 0) // cpus)
    most = min(most, int(available.get("GPU", 0))) if gpus else most
    if most < 1:
        have = " and ".join(f"{available.get(kind, 0):.0f} {kind}s" for kind in ("CPU", "GPU"))
        needs = f"{cpus} CPUs{' and a GPU' if gpus else ''}"
        raise RunError(f"a model needs {needs} and the cluster has {have}; change --workers or --device")
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": RETRIES, "max_task_retries": RETRIES}
    actor_class = ray.remote(**options)(_Actor)
    pool: Any = ActorPool([])
    started = 0
    for number, cases in chunks:
        if not pool.has_free() and started < most:
            pool.push(actor_class.remote(model, batch, cpus))
            started += 1
        elif not pool.has_free():
            yield pool.get_next_unordered()
        absolute = [case if case.path is None else replace(case, path=case.path.absolute()) for case in cases]
        pool.submit(lambda actor, chunk: actor.predict.remote(*chunk), (number, absolute))
    while pool.has_next():
        yield pool.get_next_unordered()
