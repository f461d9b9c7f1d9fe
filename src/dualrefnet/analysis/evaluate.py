"""Evaluate a run: predictions of its validation and test split, and the metrics with their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from dualrefnet.analysis.availability import measure_availability, predict_split
from dualrefnet.analysis.opened_run import open_run
from dualrefnet.analysis.out_of_distribution import fit_run
from dualrefnet.data.protocols import leakage
from dualrefnet.data.schema import Dataset
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.calibration import fit_calibration, fit_thresholds, measure_calibrated
from dualrefnet.evaluation.comparison import metrics_with_intervals
from dualrefnet.files import write_csv, write_json
from dualrefnet.progress import progress_bar
from dualrefnet.run import Run


def evaluate_run(
    run: Run,
    root: Path | str | None = None,
    dataset: Dataset | None = None,
    cache: Path | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Predict validation and test, write `predictions.csv`, `calibration.json` and `metrics.json`, return the metrics.

    The calibration is fitted on the validation split alone. Arguments and errors are those of `open_run`.
    """
    opened = open_run(run, root, dataset, cache, device)
    recipe, schema, groups = opened.recipe, opened.dataset.schema, opened.groups
    wanted, seed, classes, malignant = recipe.evaluation, recipe.seed, schema.classes, schema.malignant
    tables, predicted, arrays, measured = [], {}, {}, {}
    for split in ("val", "test"):
        examples = opened.examples(split)
        predicted[split] = predict_split(opened, split, examples)
        table = prediction_table(examples.image_ids, split, examples.labels, predicted[split].recorded, classes)
        tables.append(table)
        probabilities = table[[f"prob_{name}" for name in classes]].to_numpy(dtype=float)
        patients = groups.loc[table["image_id"]].to_numpy()
        arrays[split] = (examples.labels, probabilities, Bootstrap(patients, wanted.bootstrap, seed))
        with progress_bar("bootstrap") as show:
            bootstrap = Bootstrap(patients, wanted.bootstrap, seed, progress=show)
            measured[split] = metrics_with_intervals(examples.labels, probabilities, bootstrap, classes, malignant)
    write_csv(run.path / "predictions.csv", pd.concat(tables, ignore_index=True))
    validation, test = predicted["val"], predicted["test"]
    targets = wanted.coverage, wanted.referral_sensitivity
    thresholds = [
        fit_thresholds(
            one.group,
            one.flat(arrays["val"][0]),
            one.probabilities.reshape(-1, len(classes)),
            classes,
            malignant,
            *targets,
            one.draws,
        )
        for one in validation.groups
        if one.group is not None
    ]
    calibration = fit_calibration(*arrays["val"], classes, malignant, *targets, thresholds, validation.field_effects)
    write_json(run.calibration_file, calibration.to_json())
    labels, _, resampled = arrays["test"]
    metrics = {
        **measured["test"],
        "calibrated": measure_calibrated(calibration, *arrays["test"]),
        "availability": measure_availability(calibration, test, labels, resampled),
        "split": "test",
        "protocol": recipe.data.protocol,
        "dataset": schema.title,
        "drawn": schema.synthetic,
        "unit": schema.unit,
        "method": recipe.model.method,
        "leakage": leakage(opened.dataset, opened.split),
        "validation": measured["val"],
    }
    if validation.vectors is not None and test.vectors is not None:
        metrics["out_of_scope"] = fit_run(opened, validation.vectors, test.vectors)
    write_json(run.metrics_file, metrics)
    return metrics


def prediction_table(
    image_ids: tuple[str, ...], split: str, labels: np.ndarray, probabilities: np.ndarray, classes: tuple[str, ...]
) -> pd.DataFrame:
    """Return rows of `predictions.csv`: image_id, split, label, predicted, prob_<CLASS>."""
    names = np.array(classes, dtype=object)
    preds = names[probabilities.argmax(axis=1)]
    table = pd.DataFrame({"image_id": image_ids, "split": split, "label": names[labels], "predicted": preds})
    return pd.concat([table, pd.DataFrame(probabilities, columns=[f"prob_{name}" for name in classes])], axis=1)
