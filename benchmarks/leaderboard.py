"""The leaderboard of cross-fitted systems, recomputed from their out-of-fold probabilities without any training.

`python benchmarks/leaderboard.py` reads docs/results/cross_fitted/, and writes docs/results/leaderboard.csv and the
paired differences beside it. `--add NAME=RUN` takes a finished cross-fitted run in first; `--average NAME=A+B` adds the
mean of the probabilities of several systems, none of which has seen the patient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dualrefnet.evaluation.bootstrap import Bootstrap, holm
from dualrefnet.evaluation.calibration import fit_temperature
from dualrefnet.evaluation.comparison import PooledBootstrap, metrics_with_intervals, pooled_bootstrap
from dualrefnet.evaluation.curves import GRID, class_curves
from dualrefnet.files import write_csv
from dualrefnet.progress import track
from dualrefnet.recipe import changes, load_recipe
from dualrefnet.run import Run
from dualrefnet.runtime.calibration import Floats, apply_temperature

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MALIGNANT = ("BCC", "MEL", "SCC")
COMPARED = ("balanced_accuracy", "auc_macro_ovr", "malignant.auc")
# At which the sensitivity for melanoma is read: 90% specificity.
FALSE_POSITIVE_RATE = 0.1
# Keys that say what a run is called, where it ran, or that have columns of their own.
ELSEWHERE = ("name", "data.", "training.device", "training.precision", "model.init_")


def take(name: str, folder: Path, to: Path) -> dict[str, Any]:
    """Write a run's out-of-fold probabilities as `to/NAME.csv`, and return its row of `systems.csv`."""
    run = Run(folder)
    recipe, fingerprint = run.recipe, run.fingerprint
    folds = run.split[["image_id", "fold"]]
    table = run.test.rows.rename(columns={"group": "patient_id"}).merge(folds, on="image_id", validate="one_to_one")
    probabilities = [str(column) for column in table if str(column).startswith("prob_")]
    columns = ["image_id", "patient_id", "fold", "label", "predicted", *probabilities]
    write_csv(to / f"{name}.csv", table[columns].sort_values("image_id").round(6))
    changed = changes(load_recipe("pad_ufes_20"), recipe)
    metadata_only = recipe.model.method == "metadata_only"
    return {
        "system": name,
        "method": recipe.model.method,
        "encoder": "" if metadata_only else recipe.model.backbone,
        "starts_from": "" if metadata_only else " <- ".join(source["description"] for source in fingerprint["weights"]),
        "pixels": None if metadata_only else recipe.image.size,
        "tier": recipe.metadata.tier,
        "views": None if metadata_only else recipe.model.views,
        "epochs": recipe.training.epochs,
        "folds": recipe.data.folds,
        "seed": recipe.seed,
        "protocol": recipe.data.protocol,
        "precision": fingerprint["precision"],
        "overrides": " ".join(f"{key}={after}" for key, (_, after) in changed.items() if not key.startswith(ELSEWHERE)),
    }


def calibrated(labels: NDArray[np.int64], scores: Floats, folds: NDArray[np.int64]) -> Floats:
    """Return the probabilities of each fold at the temperature that fits the other folds."""
    result = np.empty_like(scores)
    for fold in np.unique(folds):
        own = folds == fold
        result[own] = apply_temperature(scores[own], fit_temperature(labels[~own], scores[~own]))
    return result


def measure(
    labels: NDArray[np.int64], scores: Floats, folds: NDArray[np.int64], bootstrap: Bootstrap, classes: list[str]
) -> dict[str, float]:
    """Return the measures of one system, each with the ends of its 95% interval."""
    metrics = metrics_with_intervals(labels, scores, bootstrap, classes, MALIGNANT)
    errors = metrics_with_intervals(labels, calibrated(labels, scores, folds), bootstrap, classes)
    melanoma = next(one.roc for one in class_curves(labels, scores, bootstrap, classes).of if one.name == "MEL")
    at = int(np.isclose(GRID, FALSE_POSITIVE_RATE).argmax())
    found = {
        "balanced_accuracy": (metrics["balanced_accuracy"], *metrics["balanced_accuracy_ci95"]),
        "auc_macro_ovr": (metrics["auc_macro_ovr"], *metrics["auc_macro_ovr_ci95"]),
        "malignant_auc": (metrics["malignant"]["auc"], *metrics["malignant"]["auc_ci95"]),
        "melanoma_sensitivity_at_90_specificity": (melanoma.y[at], melanoma.low[at], melanoma.high[at]),
        "ece_calibrated": (errors["ece"], *errors["ece_ci95"]),
    }
    row: dict[str, float] = {}
    for key, (value, low, high) in found.items():
        row |= {key: value, f"{key}_low": low, f"{key}_high": high}
    return row | {f"sensitivity_{one}": metrics["per_class"][one]["sensitivity"] for one in classes}


def compare(pooled: PooledBootstrap, systems: list[str], reference: str) -> pd.DataFrame:
    """Return how far each system is from the reference; `p_holm` is corrected over the systems of a measure."""
    rows = []
    for key in COMPARED:
        found = {name: pooled.difference(name, reference, key) for name in systems if name != reference}
        for (name, one), p_holm in zip(found.items(), holm([one.p for one in found.values()]), strict=True):
            of = {"system": name, "reference": reference, "measure": key}
            rows.append(of | {"difference": one.value, "low": one.low, "high": one.high, "p": one.p, "p_holm": p_holm})
    return pd.DataFrame(rows)


def main(
    add: list[str] = typer.Option([], help="NAME=RUN, a cross-fitted run to take in (again)"),
    average: list[str] = typer.Option([], help="NAME=A+B, systems whose probabilities are averaged"),
    reference: str = typer.Option("dualrefnet", help="the system that the others are compared with"),
    resamples: int = 2000,
    results: Path = RESULTS,
) -> None:
    """Measure all systems on the same images; intervals and paired differences over resampled patients."""
    folder = results / "cross_fitted"
    index = folder / "systems.csv"
    systems: list[dict[Any, Any]] = pd.read_csv(index).to_dict("records") if index.exists() else []
    for one in [*add, *average]:
        name, _, of = one.partition("=")
        row = take(name, Path(of), folder) if one in add else {"system": name, "mean_of": of}
        systems = [other for other in systems if other["system"] != name] + [row]
    write_csv(index, pd.DataFrame(systems).convert_dtypes())
    single = [str(system["system"]) for system in systems if pd.isna(system.get("mean_of"))]
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in single}
    first = tables[reference]
    classes = [str(column).removeprefix("prob_") for column in first if str(column).startswith("prob_")]
    labels = pd.Index(classes).get_indexer(pd.Index(first["label"])).astype(np.int64)
    scores = {}
    for name, table in tables.items():
        if not table[["image_id", "label"]].equals(first[["image_id", "label"]]):
            raise SystemExit(f"{name}.csv has other images or labels than {reference}.csv")
        values = table.filter(like="prob_").to_numpy()
        scores[name] = values / values.sum(axis=1, keepdims=True)
    averaged = {str(system["system"]): str(system.get("mean_of")).split("+") for system in systems}
    for name in averaged.keys() - scores.keys():
        scores[name] = np.mean([scores[part] for part in averaged[name]], axis=0)

    bootstrap = Bootstrap(first["patient_id"], resamples, 0)
    measured = []
    for system in track(systems, "measuring"):
        name = str(system["system"])
        folds = tables[name if name in tables else averaged[name][0]]["fold"].to_numpy()
        measured.append(system | measure(labels, scores[name], folds, bootstrap, classes))
    leaderboard = pd.DataFrame(measured).sort_values("balanced_accuracy", ascending=False)
    write_csv(results / "leaderboard.csv", leaderboard.round(4).convert_dtypes())
    seeds = {name: [values] for name, values in scores.items()}
    pooled = pooled_bootstrap(labels, seeds, bootstrap, classes, MALIGNANT)
    against = compare(pooled, list(leaderboard["system"]), reference)
    write_csv(results / "leaderboard-differences.csv", against.round(4))
    show(leaderboard, against, f"{len(first)} images of {bootstrap.groups} patients; 95% intervals over patients")


def show(leaderboard: pd.DataFrame, against: pd.DataFrame, title: str) -> None:
    """Print the leaderboard; the last column is the paired difference in balanced accuracy."""
    table = Table(title=title, title_justify="left")
    measures = ("balanced_accuracy", "auc_macro_ovr", "melanoma_sensitivity_at_90_specificity", "ece_calibrated")
    for column in ("system", *measures, "difference"):
        table.add_column(column.replace("_", " "))
    paired = against[against["measure"] == "balanced_accuracy"].set_index("system").to_dict("index")
    for row in leaderboard.to_dict("records"):
        cells = [f"{row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]" for key in measures]
        one = paired.get(row["system"])
        last = f"{one['difference']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}], p {one['p_holm']:.3f}" if one else ""
        table.add_row(str(row["system"]), *cells, last)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
