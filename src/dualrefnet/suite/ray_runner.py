"""The runs of a suite on a Ray cluster: the same jobs, written to the same folder, which every machine must see."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dualrefnet.errors import RunError
from dualrefnet.suite.runner import Event, Failure, Job, available_cores, perform

# Where data, weights and prepared images lie, which the machines of a cluster can't know.
_PASSED_ON = "DUALREFNET_"


def require_ray() -> Any:
    """Return the module `ray`.

    Raises:
        RunError: it isn't installed.
    """
    try:
        import ray
    except ImportError:
        raise RunError(
            "Ray isn't installed; it comes with the extra `scale`: pip install 'dualrefnet[scale]'"
        ) from None
    return ray


def work_on_ray(jobs: list[Job], address: str) -> Generator[Event]:
    """Do jobs as Ray tasks, as many at a time as the cluster has room for; closing the iterator cancels them.

    Args:
        jobs: what to do; each takes `threads` CPUs, and a GPU if the cluster has any and the recipe may use it.
        address: of a cluster (`auto`, `ray://...`, `host:port`), or `local` to start Ray on this machine.

    Raises:
        RunError: there is no cluster at the address, or it has too few CPUs for one run.
    """
    ray = require_ray()
    variables = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    local: dict[str, Any] = {"num_cpus": available_cores(), "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(
            address=address, log_to_driver=False, logging_level="error", runtime_env={"env_vars": variables}, **local
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(f"no Ray cluster answers at {address}: {' '.join(str(error).split())}") from None
    try:
        resources = ray.cluster_resources()
        needed = max((job.threads for job in jobs), default=0)
        if needed > resources.get("CPU", 0):
            raise RunError(
                f"a run is to have {needed} CPUs and the cluster has {resources.get('CPU', 0):.0f}; give fewer --cores"
            )
        # A crash would only be repeated: the next call tries failed runs again.
        task = ray.remote(max_retries=0)(_perform)
        waiting = {}
        for job in jobs:
            gpus = 1 if resources.get("GPU", 0) and job.recipe.training.device in ("auto", "cuda") else 0
            said = job.log.stat().st_size if job.log.exists() else 0
            reference = task.options(num_cpus=job.threads, num_gpus=gpus, name=job.run).remote(job, Path.cwd())
            waiting[reference] = (job, said)
        started: set[str] = set()
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=1.0)
            for job, said in waiting.values():
                # The scheduler doesn't tell when a task begins; its log does.
                if job.run not in started and job.log.exists() and job.log.stat().st_size > said:
                    started.add(job.run)
                    yield Event(job.run, "started")
            for reference in ready:
                job, _ = waiting.pop(reference)
                yield Event(job.run, "ended", _result(ray, reference))
    finally:
        # Disconnecting ends the tasks of this call that are still running.
        with suppress(Exception):
            ray.shutdown()


def _perform(job: Job, folder: Path) -> Failure | None:
    """Do a job on any machine; paths in its recipe are relative to the folder of the command."""
    if folder.is_dir():
        os.chdir(folder)
    return perform(job)


def _result(ray: Any, reference: Any) -> Failure | None:
    try:
        return ray.get(reference)  # type: ignore[no-any-return]
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        hint = (
            "; give it more --cores, so that fewer runs share a machine"
            if isinstance(error, ray.exceptions.OutOfMemoryError)
            else ""
        )
        return Failure(f"Ray ended it: {lines[0] if lines else type(error).__name__}{hint}", type(error).__name__)
