"""Train a suite: what is finished is skipped, what was cut short resumes, what fails is recorded and the rest goes on.

The suite folder holds `suite.yaml`, `cells.csv`, `runs/<run>/`, `failures/<run>.json`, `logs/<run>.log`, `splits/` and,
for a smoke test, `data/`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pandas as pd

from dualrefnet.cluster import require_ray
from dualrefnet.errors import DualRefNetError, RunError
from dualrefnet.files import locked, make_folder, write_csv, write_json, write_yaml
from dualrefnet.progress import note, progress_bar, warn
from dualrefnet.recipe import Recipe, differences
from dualrefnet.run import Run
from dualrefnet.suite.grid import Cell, Key, Suite, expand, load_suite, same_training, with_recipes
from dualrefnet.training.workers import Failure, Job, available_cores, work

SMOKE_IMAGES, SMOKE_SIZE = 120, 64


@dataclass
class Outcome:
    """What a call has done: all runs, those finished before, those that this call finished, and why others failed."""

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
    elsewhere: Mapping[str, Path] | None = None,
) -> Outcome:
    """Train what a suite folder lacks, `workers` runs at a time here, or as Ray has room at `ray_address`.

    `elsewhere`: finished runs of other suites, by `same_training`, that are taken over.
    """
    if ray_address is not None:
        require_ray()
    suite = with_recipes(suite)
    cells = expand(suite)
    out = out.absolute()
    with _suite_lock(out):
        _open_folder(out, suite, cells)
        if suite.smoke:
            _draw_sample({cell.recipe.data.root for cell in cells} | {split.recipe.data.root for split in suite.splits})
        _count_splits(out, suite)
        runs = {cell.run: cell.recipe for cell in cells if cell.run == cell.name}
        for run, recipe in runs.items():
            source = (elsewhere or {}).get(same_training(recipe))
            if source is not None and not _finished(out, run):
                _take_over(source, out / "runs" / run)
        pending = {run: recipe for run, recipe in runs.items() if not _finished(out, run)}
        outcome = Outcome(len(runs), len(runs) - len(pending))
        if outcome.skipped:
            note(f"{outcome.skipped} of {outcome.total} runs are finished already and are skipped")
        for run, failure in _fill_stores(pending, cache).items():
            del pending[run]
            _record(out, outcome, run, failure)
        threads = cores or (1 if ray_address else max(1, available_cores() // workers))
        cache = cache and cache.absolute()
        jobs = [Job(run, recipe, out / "runs" / run, out, cache, threads) for run, recipe in pending.items()]
        with progress_bar("runs") as show, closing(work(jobs, workers, ray_address)) as events:
            starts: dict[str, float] = {}
            for event in events:
                if not event.ended:
                    starts[event.run] = time.monotonic()
                    note(f"started {event.run}")
                    continue
                _record(out, outcome, event.run, event.failure)
                if event.failure is None and not keep_models:
                    trained = Run(out / "runs" / event.run)
                    for one in trained.members or [trained]:
                        one.weights_file.unlink(missing_ok=True)
                done = outcome.skipped + len(outcome.finished) + len(outcome.failed)
                show(done, outcome.total)
                took = timedelta(seconds=round(time.monotonic() - starts.get(event.run, time.monotonic())))
                if event.failure is None:
                    note(f"finished {event.run} in {took}; {done}/{outcome.total} done")
                else:
                    warn(f"{event.run} failed after {took}: {event.failure.error}")
    return outcome


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


def _take_over(source: Path, run: Path) -> None:
    """Give a suite a finished run of another one; hard links need no space."""

    def link(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:  # Another disk, or a file system without links.
            shutil.copy2(file, copy)

    partial = make_folder(run.parent) / f".{run.name}"
    for folder in (partial, run):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=link)
    os.replace(partial, run)


def _record(out: Path, outcome: Outcome, run: str, failure: Failure | None) -> None:
    file = out / "failures" / f"{run}.json"
    if failure is None:
        outcome.finished.append(run)
        file.unlink(missing_ok=True)
    else:
        outcome.failed[run] = failure
        write_json(file, {**failure._asdict(), "log": f"logs/{run}.log"})


def _draw_sample(roots: Collection[str | None]) -> None:
    from dualrefnet.data.synthetic import make_synthetic

    (root,) = (Path(str(root)) for root in roots)
    if (root / "metadata.csv").is_file():
        return
    note("writing the sample data set: synthetic images, not clinical ones")
    make_synthetic(root, images=SMOKE_IMAGES, side=SMOKE_SIZE)


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
