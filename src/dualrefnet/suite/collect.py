"""Read a suite directory: which cells were planned, which runs are finished, and the systems that they make up.

A system is all cells that differ in fold and seed only. Nothing unfinished is dropped without a word: it is in
`Collection.missing`, and the system's `flags` say how many of its runs there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.errors import DualRefNetError, RunError
from dualrefnet.files import read_json, sha256_of_json
from dualrefnet.models.registry import METHODS
from dualrefnet.recipe import Recipe
from dualrefnet.run import Run
from dualrefnet.suite.grid import Suite, expand, load_suite


class Key(NamedTuple):
    """What names a system."""

    dataset: str
    protocol: str
    method: str
    backbone: str
    variant: str

    @property
    def name(self) -> str:
        """All parts in one string, for messages and as a key."""
        return " ".join(part for part in self if part)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, with its test side in the order of the image ids.

    Attributes:
        fold: which fold was the test set.
        seed: of the training.
        recipe: resolved.
        metrics: content of metrics.json.
        weights: what the encoders started from: `kind` and `description` of each.
        classes: in the order of the columns of `probabilities`.
        malignant: the classes that are cancer.
        test: image_id, label, group; one row a test image.
        probabilities: (N, C), rows as in `test`.
    """

    fold: int
    seed: int
    recipe: Recipe
    metrics: dict[str, Any]
    weights: list[dict[str, Any]]
    classes: tuple[str, ...]
    malignant: tuple[str, ...]
    test: pd.DataFrame
    probabilities: NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """The test sides of all folds of a system put together.

    Attributes:
        test: image_id, label, group; one row a test image, in the order of the ids.
        seeds: one (N, C) array of probabilities a seed.
        runs: how many runs are in it.
    """

    test: pd.DataFrame
    seeds: list[NDArray[np.float64]]
    runs: int

    @property
    def fingerprint(self) -> str:
        """Equal for two systems that were tested on the same images."""
        return sha256_of_json([self.test[column].tolist() for column in self.test])


@dataclass(frozen=True)
class System:
    """All runs of one system.

    Attributes:
        key: its name.
        planned: number of runs that the suite asks for.
        runs: those that are finished.
        paper: where the paper's numbers for it stand (`table`, `metrics`), if not in the suite's table.
        pool: their test sides together; None if there is no run, or they can't be pooled.
        problem: why they can't be pooled.
    """

    key: Key
    planned: int
    runs: list[FinishedRun]
    paper: dict[str, Any] = field(default_factory=dict)
    pool: Pool | None = None
    problem: str = ""


@dataclass(frozen=True)
class Collection:
    """All that a suite directory holds.

    Attributes:
        suite: what was asked for.
        systems: in the order of the suite.
        missing: cell, run, state (`failed`, `unfinished` or `not started`) and error of every cell without a result.
        splits: (data set, protocol) -> split; those that aren't there yet are in `missing`.
    """

    suite: Suite
    systems: list[System]
    missing: pd.DataFrame
    splits: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict)


def collect(suite_dir: Path) -> Collection:
    """Read a suite directory.

    Raises:
        RunError: it isn't one.
    """
    if not (suite_dir / "suite.yaml").is_file():
        raise RunError(f"{suite_dir} has no suite.yaml: it isn't a suite's folder; `dualrefnet suite NAME --out {suite_dir}` makes one")
    suite = load_suite(suite_dir / "suite.yaml")
    loaded: dict[str, FinishedRun | str] = {}
    missing = []
    systems: dict[Key, System] = {}
    for cell in expand(suite):
        key = Key(cell.dataset, cell.protocol, cell.method, cell.backbone, cell.variant)
        system = systems.get(key, System(key, 0, [], dict(cell.paper or {})))
        if cell.run not in loaded:
            loaded[cell.run] = _load(suite_dir, cell.run, cell.fold, cell.seed)
        found = loaded[cell.run]
        runs = system.runs
        if isinstance(found, FinishedRun):
            runs = [*runs, found]
        else:
            state, _, error = found.partition(": ")
            missing.append({"cell": cell.name, "run": cell.run, "state": state, "error": error})
        systems[key] = replace(system, planned=system.planned + 1, runs=runs)
    splits = {}
    for dataset, protocol in ((split.dataset, split.protocol) for split in suite.splits):
        path = suite_dir / "splits" / f"{dataset}-{protocol}.csv"
        if path.is_file():
            splits[dataset, protocol] = pd.read_csv(path, dtype=str, keep_default_na=False)
        else:
            missing.append({"cell": f"split {dataset} {protocol}", "run": "", "state": "not started", "error": f"there is no {path}"})
    table = pd.DataFrame(missing, columns=["cell", "run", "state", "error"])
    return Collection(suite, [_pooled(system) for system in systems.values()], table, splits)


def pool_runs(runs: Sequence[FinishedRun]) -> Pool:
    """Put the test sides of all folds together, once a seed.

    Where runs are missing, the seeds that have the most folds are taken: all seeds must be measured on the same images.

    Raises:
        RunError: folds share test images, or seeds have different ones, so that nothing can be pooled.
    """
    seeds: dict[int, list[FinishedRun]] = {}
    for run in sorted(runs, key=lambda run: run.fold):
        seeds.setdefault(run.seed, []).append(run)
    folds = {seed: tuple(run.fold for run in members) for seed, members in seeds.items()}
    chosen = max(folds.values(), key=lambda some: (len(some), list(folds.values()).count(some)))
    pools = []
    for seed in sorted(seed for seed in seeds if folds[seed] == chosen):
        test = pd.concat([run.test for run in seeds[seed]], ignore_index=True)
        shared = int(test["image_id"].duplicated().sum())
        if shared:
            raise RunError(f"not pooled: {shared} test images are in more than one fold of seed {seed}")
        order = np.argsort(test["image_id"].to_numpy(dtype=str), kind="stable")
        scores = np.concatenate([run.probabilities for run in seeds[seed]])
        pools.append((test.iloc[order].reset_index(drop=True), scores[order]))
    if any(not test.equals(pools[0][0]) for test, _ in pools):
        raise RunError("not pooled: the seeds have different test images")
    return Pool(pools[0][0], [scores for _, scores in pools], len(pools) * len(chosen))


def reads_image(method: str) -> bool:
    """Return False for a method of the metadata alone."""
    return method not in METHODS or METHODS[method].reads_image


def _pooled(system: System) -> System:
    if not system.runs:
        return system
    try:
        return replace(system, pool=pool_runs(system.runs))
    except RunError as error:
        return replace(system, problem=str(error))


def _load(suite_dir: Path, name: str, fold: int, seed: int) -> FinishedRun | str:
    """Return a finished run, or `state: error`."""
    run = Run(suite_dir / "runs" / name)
    if not run.finished:
        failure = suite_dir / "failures" / f"{name}.json"
        if failure.is_file():
            return f"failed: {read_json(failure)['error']}"
        return "unfinished: " if run.path.is_dir() else "not started: "
    try:
        description, predictions, split = run.model, run.predictions, run.split
        rows = predictions[predictions["split"] == "test"].sort_values("image_id", kind="stable")
        groups = split.set_index("image_id")["patient_id"]
        return FinishedRun(
            fold,
            seed,
            run.recipe,
            run.metrics,
            run.fingerprint["weights"],
            tuple(description["classes"]),
            tuple(description["malignant"]),
            pd.DataFrame({column: rows[column].to_numpy() for column in ("image_id", "label")}).assign(
                group=groups.loc[rows["image_id"]].to_numpy()
            ),
            rows[[f"prob_{name}" for name in description["classes"]]].to_numpy(dtype=np.float64),
        )
    except (DualRefNetError, OSError, KeyError, ValueError) as error:
        return f"unreadable: {' '.join(str(error).split())}; remove {run.path} and run the suite again"
