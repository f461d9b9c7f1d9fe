"""Measure a run: predictions of its validation and test side, and the measures with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dualrefnet.analysis.availability import SplitPredictions, measure_availability, predict_split
from dualrefnet.analysis.opened_run import open_run
from dualrefnet.analysis.out_of_distribution import fit_run
from dualrefnet.data.protocols import leakage
from dualrefnet.data.schema import Dataset
from dualrefnet.evaluation.calibration import Calibration, fit_calibration, fit_thresholds, measure_calibrated
from dualrefnet.evaluation.comparison import bootstrap_intervals, with_intervals
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.files import write_csv, write_json
from dualrefnet.progress import progress_bar
from dualrefnet.run import Run

SIDES = ("val", "test")


def evaluate_run(
    run: Run,
    root: Path | str | None = None,
    dataset: Dataset | None = None,
    cache: Path | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Predict validation and test, write `predictions.csv`, `calibration.json` and `metrics.json`, and return the
    measures.

    Args:
        run: a trained run.
        root: where the data lie now, if not where the recipe says.
        dataset: the data set, if it has been read already.
        cache: where image stores lie.
        device: where to compute; None: a GPU if there is one.

    Raises:
        RunError: images of the split have vanished, or the run holds no trained model.
    """
    opened = open_run(run, root, dataset, cache, device)
    recipe, dataset, groups = opened.recipe, opened.dataset, opened.groups
    tables, answers = [], {}
    for side in SIDES:
        examples = opened.examples(side)
        with progress_bar(f"predicting {side}") as show:
            answers[side] = predict_split(opened, side, examples, show)
        tables.append(
            prediction_table(examples.image_ids, side, examples.labels, answers[side].recorded, dataset.schema.classes)
        )
    predictions = pd.concat(tables, ignore_index=True)
    write_csv(run.path / "predictions.csv", predictions)
    measures = {
        side: measure(
            predictions[predictions["split"] == side], groups, dataset, recipe.evaluation.bootstrap, recipe.seed
        )
        for side in SIDES
    }
    calibration, calibrated = calibrate(run, predictions, groups, dataset, answers["val"])
    labels, _, patients = _arrays(predictions[predictions["split"] == "test"], groups, dataset.schema.classes)
    with progress_bar("with less than was recorded") as show:
        availability = measure_availability(
            calibration, answers["test"], labels, patients, recipe.evaluation.bootstrap, recipe.seed, show
        )
    metrics = {
        **measures["test"],
        "calibrated": calibrated,
        "availability": availability,
        "split": "test",
        "protocol": recipe.data.protocol,
        "dataset": dataset.schema.title,
        "drawn": dataset.schema.synthetic,
        "unit": dataset.schema.unit,
        "method": recipe.model.method,
        "leakage": leakage(dataset, opened.split),
        "validation": measures["val"],
    }
    val, test = answers["val"].vectors, answers["test"].vectors
    if val is not None and test is not None:
        with progress_bar("out-of-scope score") as show:
            metrics["out_of_scope"] = fit_run(opened, val, test, show)
    write_json(run.metrics_file, metrics)
    return metrics


def calibrate(
    run: Run, predictions: pd.DataFrame, groups: pd.Series, dataset: Dataset, validation: SplitPredictions
) -> tuple[Calibration, dict[str, Any]]:
    """Calibrate on validation, write `calibration.json`, and return the calibration and what it is worth on the test
    side.

    Args:
        run: its folder.
        predictions: of validation and test, as recorded.
        groups: image id -> patient.
        dataset: for its classes.
        validation: all that the run answers about the validation side.
    """
    schema, wanted, seed = dataset.schema, run.recipe.evaluation, run.recipe.seed
    val, test = (_arrays(predictions[predictions["split"] == side], groups, schema.classes) for side in SIDES)
    thresholds = [
        fit_thresholds(
            one.group,
            one.flat(val[0]),
            one.probabilities.reshape(-1, len(schema.classes)),
            schema.classes,
            schema.malignant,
            wanted.coverage,
            wanted.referral_sensitivity,
            one.draws,
        )
        for one in validation.groups
        if one.group is not None
    ]
    calibration = fit_calibration(
        *val,
        schema.classes,
        schema.malignant,
        wanted.coverage,
        wanted.referral_sensitivity,
        wanted.bootstrap,
        seed,
        thresholds,
        validation.field_effects,
    )
    write_json(run.calibration_file, calibration.to_json())
    return calibration, measure_calibrated(calibration, *test, wanted.bootstrap, seed)


def prediction_table(
    image_ids: tuple[str, ...], side: str, labels: np.ndarray, probabilities: np.ndarray, classes: tuple[str, ...]
) -> pd.DataFrame:
    """Return rows of `predictions.csv`: image_id, split, label, predicted, prob_<CLASS>."""
    names = np.array(classes, dtype=object)
    table = pd.DataFrame(
        {"image_id": image_ids, "split": side, "label": names[labels], "predicted": names[probabilities.argmax(axis=1)]}
    )
    return pd.concat([table, pd.DataFrame(probabilities, columns=[f"prob_{name}" for name in classes])], axis=1)


def measure(
    predictions: pd.DataFrame, groups: pd.Series, dataset: Dataset, bootstrap: int, seed: int
) -> dict[str, Any]:
    """Measure one side, with intervals over resampled groups (patients; for ISIC-2019 lesions)."""
    classes = dataset.schema.classes
    labels, probabilities, group = _arrays(predictions, groups, classes)
    metrics = compute_metrics(labels, probabilities, classes, dataset.schema.malignant)
    if not bootstrap:
        return metrics
    malignant = dataset.schema.malignant
    with progress_bar("bootstrap") as show:
        intervals = bootstrap_intervals(
            labels, probabilities, group, classes, samples=bootstrap, seed=seed, progress=show, malignant=malignant
        )
    return with_intervals(metrics, intervals)


def _arrays(
    predictions: pd.DataFrame, groups: pd.Series, classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels (N,), probabilities (N, C) and groups (N,) of rows of `predictions.csv`."""
    labels = predictions["label"].map({name: index for index, name in enumerate(classes)}).to_numpy(dtype=np.int64)
    probabilities = predictions[[f"prob_{name}" for name in classes]].to_numpy(dtype=float)
    return labels, probabilities, groups.loc[predictions["image_id"]].to_numpy()
