"""The runs of a suite on a Ray cluster: the same jobs, written to the same folder, which every machine must see."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dualrefnet.cluster import connect
from dualrefnet.errors import RunError
from dualrefnet.suite.runner import Event, Failure, Job, available_cores, perform


def work_on_ray(jobs: list[Job], address: str) -> Generator[Event]:
    """Do jobs as Ray tasks, as many at a time as the cluster has room for; closing the iterator cancels them.

    A job takes `threads` CPUs, and a GPU if the cluster has any and the recipe may use it. `address` is that of a
    cluster (`auto`, `ray://...`, `host:port`), or `local` to start Ray on this machine.

    Raises:
        RunError: no cluster answers, or it has too few CPUs for one run.
    """
    # Where data, weights and prepared images are, which the machines of a cluster cannot know.
    variables = {name: value for name, value in os.environ.items() if name.startswith("DUALREFNET_")}
    options: dict[str, Any] = {"runtime_env": {"env_vars": variables}}
    if address == "local":
        options |= {"num_cpus": available_cores(), "include_dashboard": False}
    ray = connect(address, **options)
    try:
        resources = ray.cluster_resources()
        needed, cpus = max((job.threads for job in jobs), default=0), resources.get("CPU", 0)
        if needed > cpus:
            raise RunError(f"a run needs {needed} CPUs and the cluster has {cpus:.0f}; give fewer --cores")
        # A crash would only be repeated: the next call tries failed runs again.
        task = ray.remote(max_retries=0)(_perform)
        waiting = {}
        for job in jobs:
            gpus = 1 if resources.get("GPU", 0) and job.recipe.training.device in ("auto", "cuda") else 0
            reference = task.options(num_cpus=job.threads, num_gpus=gpus, name=job.run).remote(job, Path.cwd())
            waiting[reference] = (job, _size(job.log))
        started: set[str] = set()
        while waiting:
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


def _perform(job: Job, folder: Path) -> Failure | None:
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
