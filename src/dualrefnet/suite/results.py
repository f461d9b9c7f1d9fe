"""From a suite folder to tidy tables: systems, comparisons, classes, splits, and which runs are missing.

A system is all runs that differ in fold and seed only. Nothing unfinished is dropped silently: it is in
`SuiteResults.missing`, and every system says how many of its planned runs it has. Beside measured numbers stand those
printed in the paper, with their caveats (`paper.yaml`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from dualrefnet.data.protocols import split_counts
from dualrefnet.errors import DualRefNetError, RunError
from dualrefnet.evaluation.bootstrap import NAN, Bootstrap, Difference, Estimate, holm
from dualrefnet.evaluation.comparison import (
    PooledBootstrap,
    class_differences,
    corrected_classes,
    flat_measures,
    pooled_bootstrap,
)
from dualrefnet.files import read_csv, read_json, sha256_of_json
from dualrefnet.models.registry import METHODS
from dualrefnet.recipe import Recipe, changes, load_recipe, shipped_recipes
from dualrefnet.run import Run, TestSplit
from dualrefnet.suite.grid import Cell, Key, Lookup, Suite, expand, load_suite

LABEL_LEAKING = "LABEL-LEAKING IMPUTATION: missing metadata was imputed from the diagnosis; not a valid result"
LEAKING_SPLIT = "leaking split: the same patients or lesions in training and test"
UNGROUPED = "nothing groups the images: one person may be in training and test"
SYNTHETIC = "synthetic data, not clinical"
FROZEN = "frozen encoder"
RANDOM = "encoder from random weights"

# What may differ from the paper's recipe without being another experiment: names, places, machines, how the test set is
# measured, and what chooses the row and the column of a table. Random weights are told by `departures` itself.
_FREE = re.compile(
    r"(name|description|seed)$|data\.(root|fold|folds|split_seed)$|training\.(device|tracker)$|evaluation\."
    r"|model\.(method|backbone|members|weights|target_weights)\b"
)
# Keys that say nothing about other methods.
_ONLY_OF = {
    "model.metanet_variant": ("metanet",),
    "model.vgg_head": ("no_metadata", "concat", "metanet", "metablock"),
    "model.combination_factor": ("concat",),
}
_PARTS = {"train": "training", "val": "validation", "test": "test"}

COSTS = ("parameters", "multiply_adds")
CLASS_MEASURES = ("sensitivity", "specificity", "ppv", "npv", "f1", "auc")


@dataclass(frozen=True)
class FinishedRun:
    """A finished run; `weights`: `kind` and `description` of what each encoder started from."""

    run: Run
    fold: int
    seed: int
    recipe: Recipe
    metrics: dict[str, Any]
    weights: list[dict[str, Any]]
    cost: dict[str, int]
    classes: tuple[str, ...]
    malignant: tuple[str, ...]
    split: pd.DataFrame
    test: TestSplit


@dataclass(frozen=True)
class Pool:
    """The test splits of all folds of a system put together, in the order of the ids, with one (N, C) array a seed."""

    test: pd.DataFrame
    seeds: list[NDArray[np.float64]]
    runs: int

    @property
    def fingerprint(self) -> str:
        """Equal for two systems that were tested on the same images."""
        return sha256_of_json([self.test[column].tolist() for column in self.test])


@dataclass(frozen=True)
class System:
    """All runs of one system; `pool` is None without runs, or where they cannot be pooled (`problem`)."""

    key: Key
    planned: int
    runs: list[FinishedRun]
    paper: Lookup
    pool: Pool | None = None
    problem: str = ""
    departures: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        return self.runs[0].run.unit if self.runs else ""

    @property
    def flags(self) -> tuple[str, ...]:
        recipes, image = [run.recipe for run in self.runs], reads_image(self.key.method)
        # The recipes of one system differ in name, fold and seed only.
        alike = {"name": "", "description": "", "seed": 0}
        different = {
            recipe.model_copy(update={**alike, "data": recipe.data.model_copy(update={"fold": 0})}).model_dump_json()
            for recipe in recipes
        }
        flags = {
            LABEL_LEAKING: any(recipe.metadata.imputation == "label_leaking" for recipe in recipes),
            LEAKING_SPLIT: any(recipe.data.may_leak for recipe in recipes),
            UNGROUPED: self.unit == "image",
            SYNTHETIC: any(run.metrics.get("drawn") for run in self.runs),
            FROZEN: image and any(recipe.training.encoder == "frozen" for recipe in recipes),
            RANDOM: image and any(weights["kind"] == "none" for run in self.runs for weights in run.weights),
            "its runs have different recipes": len(different) > 1,
            f"pooled over {self.pool.runs if self.pool else 0} runs only": self.pool
            and self.pool.runs < len(self.runs),
            self.problem: self.problem,
        }
        return tuple(flag for flag, applies in flags.items() if applies)


@dataclass(frozen=True)
class SuiteResults:
    """Everything a suite folder holds, as tidy tables: a row a cell, system, comparison, class or split, each by
    measure.
    """

    suite: Suite
    members: list[System]
    missing: pd.DataFrame
    systems: pd.DataFrame
    comparisons: pd.DataFrame
    per_class: pd.DataFrame
    class_comparisons: pd.DataFrame
    splits: pd.DataFrame
    samples: int


class Reported(NamedTuple):
    """A number of the paper, and how it is averaged over classes: `macro`, `weighted`, or empty (not an average)."""

    value: float
    average: str = ""

    def comparable(self, measure: str) -> bool:
        """Return whether `measure` is averaged as this number is."""
        return not self.average or measure.endswith(f"_{self.average}")


@cache
def paper() -> dict[str, Any]:
    """Return the content of `paper.yaml`; don't change it."""
    text = resources.files("dualrefnet.suite").joinpath("paper.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)  # type: ignore[no-any-return]


def reported(
    dataset: str, table: str, method: str, backbone: str, measure: str, metric: str | None = None
) -> Reported | None:
    """Return the paper's number in a table (`3a`, `3b`, `4`, `text`), or None; `metric` is its name there."""
    usual = "auc" if measure == "auc_macro_ovr" else measure.removesuffix("_macro").removesuffix("_weighted")
    metric = metric or usual
    # Kappa is in no table.
    table = "text" if metric == "kappa" else table
    backbones = paper()["results"].get(dataset, {}).get(table, {}).get(method, {})
    # Table 4 names no backbone, so that any fits.
    value = backbones.get(backbone, backbones.get("best", {})).get(metric)
    if value is None:
        return None
    averaged = metric in ("f1", "precision", "recall")
    return Reported(value, "" if not averaged else "weighted" if method in paper()["weighted"] else "macro")


def reported_class(dataset: str, method: str, backbone: str, name: str, measure: str) -> float | None:
    """Return a number of Table 2 (DualRefNet with its best backbone), or None if the paper has none."""
    if method != "dualrefnet":
        return None
    found: float | None = paper()["per_class"].get(dataset, {}).get(backbone, {}).get(name, {}).get(measure)
    return found


def reported_splits(dataset: str) -> dict[str, dict[str, int]]:
    """Return Table 1: `train`, `val` and `test` -> class -> number of images; empty if the data set isn't in it."""
    splits: dict[str, dict[str, int]] = paper()["splits"].get(dataset, {})
    return splits


def departures(
    recipe: Recipe, split: pd.DataFrame | None = None, reading: Mapping[str, Any] | None = None
) -> list[str]:
    """Say in what a run isn't the experiment that the paper's numbers are of; empty: they may stand side by side.

    `reading`: keys of the recipe that the paper's number itself is of, in an ablation.
    """
    name = f"{recipe.data.dataset}_paper"
    if name not in shipped_recipes():
        return [f"the paper has no results on {recipe.data.dataset}"]
    found = []
    if split is not None:
        for part, expected in reported_splits(recipe.data.dataset).items():
            labels = Counter(split.loc[split["split"] == part, "label"])
            if labels.total() != sum(expected.values()):
                found.append(f"{labels.total():,} of {sum(expected.values()):,} {_PARTS[part]} images")
            elif labels != Counter(expected):
                found.append(f"{_PARTS[part]} images of other classes")
    if recipe.model.weights == "none" and reads_image(recipe.model.method):
        found.append(RANDOM)
    return found + [
        f"{key} {ours}, not {theirs}"
        for key, (theirs, ours) in changes(load_recipe(name, reading), recipe).items()
        if not _FREE.match(key) and recipe.model.method in _ONLY_OF.get(key, (recipe.model.method,))
    ]


def other_experiment(found: Collection[str]) -> str:
    """Return, as a sentence, why the paper's numbers are left out."""
    return f"The paper's numbers are left out, since they are of another experiment. Here: {'; '.join(found)}."


def caveats(dataset: str, table: str, methods: Collection[str]) -> list[str]:
    """Return what limits a comparison of `methods` with a table of the paper, one sentence each."""
    return [
        caveat["text"]
        for caveat in paper()["caveats"]
        if f"{dataset}/{table}" in caveat["tables"]
        and ("methods" not in caveat or not set(methods).isdisjoint(caveat["methods"]))
    ]


def reads_image(method: str) -> bool:
    return method not in METHODS or METHODS[method].reads_image


def aggregate(suite_dir: Path, samples: int = 1000, label: str = "bootstrap") -> SuiteResults:
    """Read a suite folder and measure its systems; more samples are drawn for many comparisons."""
    if not (suite_dir / "suite.yaml").is_file():
        raise RunError(
            f"{suite_dir} has no suite.yaml: it isn't a suite's folder; "
            f"`dualrefnet suite NAME --out {suite_dir}` makes one"
        )
    suite = load_suite(suite_dir / "suite.yaml")
    systems, missing = _read_systems(suite_dir, suite)
    pairs = [(system, reference_of(system, systems, suite)) for system in systems]
    # The smallest p that B samples can give is 2 / (B + 1), and Holm multiplies it by the number of comparisons.
    compared = [len(system.runs[0].classes) for system, reference in pairs if reference is not None and system.runs]
    samples = max(samples, 100 * (sum(compared) if suite.per_class else len(compared)))
    drawn = _bootstraps(systems, samples, label)
    for bootstrap in drawn.values():
        known = next(iter(bootstrap.points.values()))
        unknown = [measure for measure in suite.measures if measure not in known]
        if unknown:
            names = ", ".join(measure for measure in known if not measure.startswith("per_class."))
            raise RunError(
                f"{suite_dir / 'suite.yaml'}: no measure is called {unknown[0]!r}; "
                f"correct `measures`; there are: {names}"
            )
    split_rows = []
    for split in suite.splits:
        path = suite_dir / "splits" / f"{split.dataset}-{split.protocol}.csv"
        if path.is_file():
            rows = read_csv(path, dtype=str, keep_default_na=False)
            split_rows += _split_rows(split.dataset, split.protocol, rows)
        else:
            missing.append((f"split {split.dataset} {split.protocol}", "", "not started", f"there is no {path}"))
    return SuiteResults(
        suite,
        systems,
        pd.DataFrame(missing, columns=["cell", "run", "state", "error"]),
        pd.DataFrame([_system_row(system, measure, drawn, suite) for system in systems for measure in suite.measures]),
        _comparisons(pairs, drawn, suite),
        pd.DataFrame([row for system in systems if suite.per_class for row in _class_rows(system, drawn)]),
        _class_comparisons(pairs if suite.per_class else [], drawn),
        pd.DataFrame(split_rows),
        samples,
    )


def _read_systems(suite_dir: Path, suite: Suite) -> tuple[list[System], list[tuple[str, str, str, str]]]:
    """Return the systems, and (cell, run, state, error) of every cell without a result."""
    cells: dict[Key, list[Cell]] = {}
    for cell in expand(suite):
        cells.setdefault(cell.key, []).append(cell)
    loaded: dict[str, FinishedRun | tuple[str, str]] = {}
    systems, missing = [], []
    for key, members in cells.items():
        runs = []
        for cell in members:
            if cell.run not in loaded:
                loaded[cell.run] = _load(suite_dir, cell)
            found = loaded[cell.run]
            if isinstance(found, FinishedRun):
                runs.append(found)
            else:
                missing.append((cell.name, cell.run, *found))
        pool, problem = None, ""
        try:
            pool = pool_runs(runs) if runs else None
        except RunError as error:
            problem = str(error)
        departing = [departures(run.recipe, run.split, members[0].reading) for run in runs] or [
            departures(members[0].recipe, None, members[0].reading)
        ]
        named = tuple(dict.fromkeys(text for some in departing for text in some))
        systems.append(System(key, len(members), runs, members[0].paper or Lookup(), pool, problem, named))
    return systems, missing


def _load(suite_dir: Path, cell: Cell) -> FinishedRun | tuple[str, str]:
    """Return a finished run, or (state, error)."""
    run = Run(suite_dir / "runs" / cell.run)
    if not run.finished:
        failure = suite_dir / "failures" / f"{cell.run}.json"
        if failure.is_file():
            return "failed", str(read_json(failure)["error"])
        return "unfinished" if run.path.is_dir() else "not started", ""
    try:
        description = run.model
        return FinishedRun(
            run,
            cell.fold,
            cell.seed,
            run.recipe,
            run.metrics,
            run.fingerprint["weights"],
            description.get("cost", {}),
            tuple(description["classes"]),
            tuple(description["malignant"]),
            run.split,
            run.test,
        )
    except (DualRefNetError, OSError, KeyError, ValueError) as error:
        return "unreadable", f"{' '.join(str(error).split())}; remove {run.path} and run the suite again"


def pool_runs(runs: Sequence[FinishedRun]) -> Pool:
    """Put the test splits of all folds together, once per seed; the seeds that have the most folds are taken."""
    seeds: dict[int, list[FinishedRun]] = {}
    for run in sorted(runs, key=lambda run: run.fold):
        seeds.setdefault(run.seed, []).append(run)
    folds = {seed: tuple(run.fold for run in members) for seed, members in seeds.items()}
    chosen = max(folds.values(), key=lambda some: (len(some), list(folds.values()).count(some)))
    pools = []
    for seed in sorted(seed for seed in seeds if folds[seed] == chosen):
        test = pd.concat([run.test.rows for run in seeds[seed]], ignore_index=True)[["image_id", "label", "group"]]
        shared = int(test["image_id"].duplicated().sum())
        if shared:
            raise RunError(f"not pooled: {shared} test images are in more than one fold of seed {seed}")
        order = np.argsort(test["image_id"].to_numpy(dtype=str), kind="stable")
        scores = np.concatenate([run.test.probabilities for run in seeds[seed]])
        pools.append((test.iloc[order].reset_index(drop=True), scores[order]))
    if any(not test.equals(pools[0][0]) for test, _ in pools):
        raise RunError("not pooled: the seeds have different test images")
    return Pool(pools[0][0], [scores for _, scores in pools], len(pools) * len(chosen))


def reference_of(system: System, systems: list[System], suite: Suite) -> System | None:
    """Return what a system is compared with; None: it is the reference, or there is none.

    The reference has the same data set and protocol, and the same method and backbone if there is one; if it exists
    with one backbone only, it is taken for others too. A reference encoder is that of the same method and variant.
    """
    key, reference = system.key, suite.reference_of(system.key.dataset)
    if not reference:
        return None
    rivals = [other for other in systems if other.key[:2] == key[:2]]
    if suite.rows == "variant" and any(other.key.variant == reference for other in rivals):
        if key.variant == reference:
            return None
        rivals = [other for other in rivals if other.key.variant == reference]
        rivals = [other for other in rivals if other.key.method == key.method] or rivals
    elif not any(other.key.method == reference for other in rivals):
        rivals = [other for other in rivals if other.key[2:] == (key.method, reference, key.variant)]
        return rivals[0] if rivals and rivals[0].key != key else None
    else:
        if key.method == reference and (suite.rows == "method" or not key.variant):
            return None
        rivals = [other for other in rivals if other.key.method == reference and other.key != key]
        plain = [other for other in rivals if not other.key.variant]
        rivals = [other for other in rivals if other.key.variant == key.variant] or plain
    same = [other for other in rivals if other.key.backbone == key.backbone]
    if same or len(rivals) != 1:
        return same[0] if same else None
    return rivals[0]


def _bootstraps(systems: list[System], samples: int, label: str) -> dict[Key, PooledBootstrap]:
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
        bootstrap = Bootstrap(pool.test["group"].to_numpy(), samples, label=label)
        drawn = pooled_bootstrap(labels, seeds, bootstrap, first.classes, first.malignant)
        result |= {system.key: drawn for system in members}
    return result


def _system_row(system: System, measure: str, drawn: dict[Key, PooledBootstrap], suite: Suite) -> dict[str, Any]:
    key, runs = system.key, system.runs
    values = np.array([flat_measures(run.metrics).get(measure, NAN) for run in runs])
    bootstrap = drawn.get(key)
    pooled = bootstrap.value(key.name, measure) if bootstrap else Estimate(NAN)
    printed = None if system.departures else printed_value(system, measure, suite)
    encoders = [run.recipe.training.encoder for run in runs] if reads_image(key.method) else ["none"]
    weights = [weights["description"] for run in runs for weights in run.weights]
    return {
        **key._asdict(),
        "measure": measure,
        "pooled": pooled.value,
        "low": pooled.low,
        "high": pooled.high,
        "mean": values.mean() if len(values) else NAN,
        "sd": values.std(ddof=1) if len(values) > 1 else NAN,
        "runs": len(runs),
        "planned": system.planned,
        "folds": len({run.fold for run in runs}),
        "seeds": len({run.seed for run in runs}),
        "images": bootstrap.images if bootstrap else 0,
        "groups": bootstrap.groups if bootstrap else 0,
        "unit": system.unit,
        "paper": printed.value if printed else NAN,
        "paper_average": printed.average if printed else "",
        "difference": pooled.value - printed.value if printed and printed.comparable(measure) else NAN,
        "encoder": "/".join(dict.fromkeys(encoders)),
        "weights": "; ".join(dict.fromkeys(weights)),
        # Runs of earlier versions don't say.
        **{name: runs[0].cost.get(name, NAN) if runs else NAN for name in COSTS},
        "flags": system.flags,
    }


def printed_value(system: System, measure: str, suite: Suite) -> Reported | None:
    """Return the paper's number for a system, whatever the runs are."""
    key, metrics = system.key, system.paper.metrics
    table = system.paper.table or suite.table or ""
    if key.variant and table == "text" and measure not in metrics:
        # What the text reports under an ordinary name is of the full model.
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
            key, other = system.key, reference.key
            bootstrap, found, note = drawn.get(key), Difference(NAN), ""
            if bootstrap is None or other not in drawn:
                note = f"not compared: {'it' if bootstrap is None else 'the reference'} has no pooled value"
            elif drawn[other] is not bootstrap:
                note = "not compared: the reference was tested on other images"
            else:
                found = bootstrap.difference(key.name, other.name, measure)
            name = " ".join(part for part in other[2:] if part)
            numbers = {"difference": found.value, "low": found.low, "high": found.high, "p": found.p}
            place = {**key._asdict(), "reference": name, "measure": measure}
            family.append({**place, **numbers, "samples": found.samples, "note": note})
        corrected = holm([row["p"] for row in family])
        rows += [{**row, "p_holm": p} for row, p in zip(family, corrected, strict=True)]
    columns = [*Key._fields, "reference", "measure", "difference", "low", "high", "p", "p_holm", "samples", "note"]
    return pd.DataFrame(rows, columns=columns)


def _class_comparisons(
    pairs: Sequence[tuple[System, System | None]], drawn: dict[Key, PooledBootstrap]
) -> pd.DataFrame:
    """Compare systems class by class; Holm's correction counts all classes and systems of a measure."""
    rows = []
    for system, reference in pairs:
        bootstrap = drawn.get(system.key)
        if reference is None or bootstrap is None or drawn.get(reference.key) is not bootstrap:
            continue
        name = " ".join(part for part in reference.key[2:] if part)
        found = class_differences(bootstrap, system.key.name, reference.key.name, system.runs[0].classes)
        rows.append(found.assign(**system.key._asdict(), reference=name))
    return corrected_classes(pd.concat(rows, ignore_index=True)) if rows else pd.DataFrame()


def _class_rows(system: System, drawn: dict[Key, PooledBootstrap]) -> list[dict[str, Any]]:
    bootstrap, key = drawn.get(system.key), system.key
    if bootstrap is None:
        return []
    rows = []
    for name in system.runs[0].classes:
        images = int(bootstrap.points[key.name][f"per_class.{name}.support"])
        for measure in CLASS_MEASURES:
            found = bootstrap.value(key.name, f"per_class.{name}.{measure}")
            other = key.variant or system.departures
            printed = None if other else reported_class(key.dataset, key.method, key.backbone, name, measure)
            paper = NAN if printed is None else printed
            numbers = {"pooled": found.value, "low": found.low, "high": found.high, "paper": paper}
            place = {**key._asdict(), "class": name, "images": images, "measure": measure}
            rows.append({**place, **numbers, "difference": found.value - paper})
    return rows


def _split_rows(dataset: str, protocol: str, split: pd.DataFrame) -> list[dict[str, Any]]:
    # The paper's counts are of its own split; beside another protocol's they would say nothing.
    printed = reported_splits(dataset)
    classes = tuple(printed["train"]) if printed else tuple(sorted(set(split["label"])))
    counts = split_counts(split, classes)
    rows = []
    for name, numbers in zip(classes, counts.to_numpy(), strict=False):  # The last row is the total.
        for part, images in zip(counts.columns, numbers.tolist(), strict=True):
            paper = printed.get(part, {}).get(name) if protocol == "paper" else None
            place = {"dataset": dataset, "protocol": protocol, "class": name, "split": part}
            equal = "" if paper is None else "yes" if images == paper else "NO"
            rows.append({**place, "images": images, "paper": paper, "equal": equal})
    return rows
