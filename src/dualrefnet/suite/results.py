"""Read a suite directory: which cells were planned, which runs are finished, and the systems that they make up.

A system is all cells that differ in fold and seed only. Nothing unfinished is dropped without a word: it is in
`Collection.missing`, and the system's `flags` say how many of its runs there are.
"""

# also: From a suite directory to tidy tables: systems, comparisons, classes, splits, and what is missing.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.protocols import split_counts
from dualrefnet.errors import DualRefNetError, RunError
from dualrefnet.evaluation.bootstrap import NAN, holm
from dualrefnet.evaluation.comparison import PooledBootstrap, flat_measures, pooled_bootstrap
from dualrefnet.files import read_json, sha256_of_json
from dualrefnet.models.registry import METHODS
from dualrefnet.recipe import Recipe
from dualrefnet.run import Run
from dualrefnet.suite.grid import Suite, expand, load_suite
from dualrefnet.suite.paper import Reported, reported, reported_class, reported_classes, reported_split


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
        raise RunError(
            f"{suite_dir} has no suite.yaml: it isn't a suite's folder; `dualrefnet suite NAME --out {suite_dir}` makes one"
        )
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
            missing.append(
                {
                    "cell": f"split {dataset} {protocol}",
                    "run": "",
                    "state": "not started",
                    "error": f"there is no {path}",
                }
            )
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


CLASS_MEASURES = ("sensitivity", "specificity", "ppv", "npv", "f1", "auc")


LABEL_LEAKING = "LABEL-LEAKING IMPUTATION: the metadata were filled in from the diagnosis; no result"


NOT_COMPARED = "not compared: "


@dataclass(frozen=True)
class Aggregate:
    """All tidy tables of a suite.

    Attributes:
        collection: what they were made from.
        systems: one row a system and measure.
        comparisons: one row a system, reference and measure.
        per_class: one row a system, class and measure; empty unless the suite asks for it.
        splits: one row a split, side and class; empty unless the suite counts splits.
        samples: bootstrap samples.
    """

    collection: Collection
    systems: pd.DataFrame
    comparisons: pd.DataFrame
    per_class: pd.DataFrame
    splits: pd.DataFrame
    samples: int


def aggregate(suite_dir: Path, samples: int = 1000, progress: Callable[[int, int], None] | None = None) -> Aggregate:
    """Read a suite directory and measure its systems.

    Args:
        suite_dir: the directory.
        samples: bootstrap samples; more are drawn where the number of comparisons asks for it.
        progress: called with (samples done, samples in all), for each test set anew.

    Raises:
        RunError: it isn't a suite directory, or a measure of the suite doesn't exist.
    """
    collection = collect(suite_dir)
    suite, systems = collection.suite, collection.systems
    pairs = [(system, reference_of(system, systems, suite)) for system in systems]
    # The smallest p that B samples can give is 2 / (B + 1), and Holm multiplies it by the number of comparisons.
    samples = max(samples, 100 * sum(reference is not None for _, reference in pairs))
    drawn = _bootstraps(systems, samples, progress)
    for bootstrap in drawn.values():
        known = next(iter(bootstrap.points.values()))
        unknown = [measure for measure in suite.measures if measure not in known]
        if unknown:
            names = ", ".join(measure for measure in known if not measure.startswith("per_class."))
            raise RunError(
                f"{suite_dir / 'suite.yaml'}: no measure is called {unknown[0]!r}; correct `measures`; there are: {names}"
            )
    return Aggregate(
        collection,
        pd.DataFrame([_system_row(system, measure, drawn, suite) for system in systems for measure in suite.measures]),
        _comparisons(pairs, drawn, suite),
        pd.DataFrame([row for system in systems if suite.per_class for row in _class_rows(system, drawn)]),
        pd.DataFrame([row for which, split in collection.splits.items() for row in _split_rows(which, split)]),
        samples,
    )


def reference_of(system: System, systems: list[System], suite: Suite) -> System | None:
    """Return what a system is compared with; None: it is the reference, or there is none.

    The reference has the same data set and protocol, and the same method (of a reference variant) and backbone if there
    is
    such a one; a reference that exists with one backbone only is taken for systems with others.
    """
    if not suite.reference:
        return None
    rivals = [other for other in systems if other.key[:2] == system.key[:2]]
    if suite.rows == "variant" and any(other.key.variant == suite.reference for other in rivals):
        if system.key.variant == suite.reference:
            return None
        rivals = [other for other in rivals if other.key.variant == suite.reference]
        rivals = [other for other in rivals if other.key.method == system.key.method] or rivals
    else:
        if system.key.method == suite.reference and (suite.rows == "method" or not system.key.variant):
            return None
        rivals = [other for other in rivals if other.key.method == suite.reference and other.key != system.key]
        rivals = [other for other in rivals if other.key.variant == system.key.variant] or [
            r for r in rivals if not r.key.variant
        ]
    same = [other for other in rivals if other.key.backbone == system.key.backbone]
    if same or len(rivals) != 1:
        return same[0] if same else None
    return rivals[0]


def flags_of(system: System) -> list[str]:
    """Return everything a reader must know before believing a system's numbers."""
    flags = []
    recipes = [run.recipe for run in system.runs]
    if any(recipe.metadata.imputation == "label_leaking" for recipe in recipes):
        flags.append(LABEL_LEAKING)
    if system.key.protocol == "paper":
        flags.append("leaking split: the same patients or lesions in training and test")
    if any(run.metrics.get("drawn") for run in system.runs):
        flags.append("drawn data, not clinical")
    if reads_image(system.key.method) and any(recipe.training.encoder == "frozen" for recipe in recipes):
        flags.append("frozen encoder")
    if reads_image(system.key.method) and any(
        weights["kind"] == "none" for run in system.runs for weights in run.weights
    ):
        flags.append("encoder from random weights")
    if (
        len(
            {
                recipe.model_copy(update=_LIKE | {"data": recipe.data.model_copy(update={"fold": 0})})
                for recipe in recipes
            }
        )
        > 1
    ):
        flags.append("its runs have different recipes")
    if len(system.runs) < system.planned:
        flags.append(f"{len(system.runs)} of {system.planned} runs")
    if system.pool and system.pool.runs < len(system.runs):
        flags.append(f"pooled over {system.pool.runs} runs only")
    if system.problem:
        flags.append(system.problem)
    return flags


# In what else than the fold the recipes of one system may differ.
_LIKE = {"name": "same", "description": "", "seed": 0}


def _bootstraps(
    systems: list[System], samples: int, progress: Callable[[int, int], None] | None
) -> dict[Key, PooledBootstrap]:
    """Measure all systems; those on the same test images share one bootstrap."""
    test_sets: dict[str, list[System]] = {}
    for system in systems:
        if system.pool:
            test_sets.setdefault(system.pool.fingerprint, []).append(system)
    result: dict[Key, PooledBootstrap] = {}
    for members in test_sets.values():
        first, pool = members[0].runs[0], members[0].pool
        assert pool is not None
        labels = np.array([first.classes.index(label) for label in pool.test["label"]])
        seeds = {system.key.name: system.pool.seeds for system in members if system.pool}
        groups = pool.test["group"].to_numpy()
        drawn = pooled_bootstrap(
            labels, seeds, groups, first.classes, samples, malignant=first.malignant, progress=progress
        )
        result |= {system.key: drawn for system in members}
    return result


def _system_row(system: System, measure: str, drawn: dict[Key, PooledBootstrap], suite: Suite) -> dict[str, Any]:
    values = np.array([flat_measures(run.metrics).get(measure, NAN) for run in system.runs])
    bootstrap = drawn.get(system.key)
    pooled = bootstrap.value(system.key.name, measure) if bootstrap else None
    paper = _paper(system, measure, suite)
    difference = pooled.value - paper.value if pooled and paper and paper.comparable(measure) else NAN
    encoders = (
        dict.fromkeys(run.recipe.training.encoder for run in system.runs)
        if reads_image(system.key.method)
        else ["none"]
    )
    weights = dict.fromkeys(weights["description"] for run in system.runs for weights in run.weights)
    return {
        **system.key._asdict(),
        "measure": measure,
        "pooled": pooled.value if pooled else NAN,
        "low": pooled.low if pooled else NAN,
        "high": pooled.high if pooled else NAN,
        "mean": values.mean() if len(values) else NAN,
        "sd": values.std(ddof=1) if len(values) > 1 else NAN,
        "runs": len(system.runs),
        "planned": system.planned,
        "folds": len({run.fold for run in system.runs}),
        "seeds": len({run.seed for run in system.runs}),
        "images": bootstrap.images if bootstrap else 0,
        "groups": bootstrap.groups if bootstrap else 0,
        "paper": paper.value if paper else NAN,
        "paper_average": paper.average if paper else "",
        "difference": difference,
        "encoder": "/".join(encoders),
        "weights": "; ".join(weights),
        "flags": "; ".join(flags_of(system)),
    }


def _paper(system: System, measure: str, suite: Suite) -> Reported | None:
    key, metrics = system.key, system.paper.get("metrics", {})
    table = system.paper.get("table") or suite.table or ""
    if key.variant and table == "text" and measure not in metrics:
        # What the text reports under an ordinary name is of the whole system.
        return None
    return reported(key.dataset, table, key.method, key.backbone, measure, metrics.get(measure))


def _comparisons(
    pairs: list[tuple[System, System | None]], drawn: dict[Key, PooledBootstrap], suite: Suite
) -> pd.DataFrame:
    rows = []
    for measure in suite.measures:
        family = []
        for system, reference in pairs:
            if reference is None:
                continue
            names = {
                **system.key._asdict(),
                "reference": " ".join(part for part in reference.key[2:] if part),
                "measure": measure,
            }
            row = {**names, "difference": NAN, "low": NAN, "high": NAN, "p": NAN, "samples": 0, "note": ""}
            bootstrap = drawn.get(system.key)
            if bootstrap is None or reference.key not in drawn:
                which = system if bootstrap is None else reference
                row["note"] = f"{NOT_COMPARED}{'the reference' if which is reference else 'it'} has no pooled value"
            elif drawn[reference.key] is not bootstrap:
                row["note"] = NOT_COMPARED + "the reference was tested on other images"
            else:
                found = bootstrap.difference(system.key.name, reference.key.name, measure)
                row |= {
                    "difference": found.value,
                    "low": found.low,
                    "high": found.high,
                    "p": found.p,
                    "samples": found.samples,
                }
            family.append(row)
        for row, p in zip(family, holm([row["p"] for row in family]), strict=True):
            rows.append({**row, "p_holm": p})
    columns = [*Key._fields, "reference", "measure", "difference", "low", "high", "p", "p_holm", "samples", "note"]
    return pd.DataFrame(rows, columns=columns)


def _class_rows(system: System, drawn: dict[Key, PooledBootstrap]) -> list[dict[str, Any]]:
    bootstrap, key = drawn.get(system.key), system.key
    if bootstrap is None:
        return []
    rows = []
    for name in system.runs[0].classes:
        for measure in CLASS_MEASURES:
            found = bootstrap.value(key.name, f"per_class.{name}.{measure}")
            paper = None if key.variant else reported_class(key.dataset, key.method, key.backbone, name, measure)
            numbers = {
                "pooled": found.value,
                "low": found.low,
                "high": found.high,
                "paper": NAN if paper is None else paper,
            }
            images = int(bootstrap.points[key.name][f"per_class.{name}.support"])
            difference = numbers["pooled"] - numbers["paper"]
            rows.append(
                {
                    **key._asdict(),
                    "class": name,
                    "images": images,
                    "measure": measure,
                    **numbers,
                    "difference": difference,
                }
            )
    return rows


def _split_rows(which: tuple[str, str], split: pd.DataFrame) -> list[dict[str, Any]]:
    dataset, protocol = which
    classes = reported_classes(dataset) or tuple(sorted(set(split["label"])))
    counts = split_counts(split, classes)
    rows = []
    for name, numbers in zip(classes, counts.to_numpy(), strict=False):  # The last row is the total.
        for side, images in zip(counts.columns, numbers.tolist(), strict=True):
            # The paper's counts are of its own split; beside another protocol's they would say nothing.
            paper = reported_split(dataset, side, name) if protocol == "paper" else None
            row = {
                "dataset": dataset,
                "protocol": protocol,
                "class": name,
                "split": side,
                "images": images,
                "paper": paper,
            }
            rows.append({**row, "equal": "" if paper is None else "yes" if images == paper else "NO"})
    return rows
