"""Writes a suite folder with known predictions, as the tables read it: no training."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.data.schema import DatasetSchema
from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.files import write_csv, write_json, write_yaml
from dualrefnet.models.base import Architecture
from dualrefnet.recipe import Recipe
from dualrefnet.suite.grid import Cell, expand, load_suite
from dualrefnet.suite.results import SuiteResults, aggregate
from dualrefnet.training.train import model_description

CLASSES = ["ACK", "BCC", "MEL"]
IMAGES = 24
LABELS = np.arange(IMAGES) % 3
Predict = Callable[[Cell], NDArray[np.int64]]
SUITE: dict[str, Any] = {
    "name": "small",
    "title": "Small & simple: 100% drawn_up",
    "description": "Two methods, two folds, two seeds.",
    "reference": "dualrefnet",
    "measures": ["accuracy", "balanced_accuracy"],
    "grid": [
        {
            "recipe": "sample",
            "set": {"data.protocol": "grouped-cv"},
            "methods": ["dualrefnet", "concat"],
            "folds": [0, 1],
            "seeds": [0, 1],
        }
    ],
}
# Errors of every run, by (method, fold, seed).
ERRORS = {
    ("dualrefnet", 0, 0): (0,),
    ("dualrefnet", 0, 1): (0, 1),
    ("dualrefnet", 1, 0): (),
    ("dualrefnet", 1, 1): (3,),
    ("concat", 0, 0): (0, 1, 2, 3, 4, 5),
    ("concat", 0, 1): (0, 1, 2, 3, 4, 5, 6, 9),
    ("concat", 1, 0): (6, 7, 8, 9),
    ("concat", 1, 1): (0, 1, 2, 3),
}


def wrong_on(*images: int) -> NDArray[np.int64]:
    """Return the predictions of a fold, correct but for some images."""
    predicted = LABELS.copy()
    predicted[list(images)] = (predicted[list(images)] + 1) % 3
    return predicted


def planned(cell: Cell) -> NDArray[np.int64]:
    return wrong_on(*ERRORS[cell.key.method, cell.fold, cell.seed])


def image_ids(cell: Cell) -> list[str]:
    return [f"f{cell.fold}-{index:02}" for index in range(IMAGES)]


def write_model(folder: Path, recipe: Recipe, classes: list[str], sources: list[dict[str, Any]]) -> None:
    """Write the model.json of a recipe, without metadata fields."""
    built = Architecture(image_size=recipe.image.size, metadata_width=0, classes=len(classes), section=recipe.model)
    encoder = MetadataEncoder(recipe.metadata, (), (), (), (), None)
    schema = DatasetSchema(name=recipe.data.dataset, title="", classes=classes, malignant=classes[2:], fields=())
    write_json(folder / "model.json", model_description(recipe, built, encoder, schema, sources))


def write_run(
    folder: Path,
    cell: Cell,
    predicted: NDArray[np.int64],
    ids: list[str] | None = None,
    weights: str = "package",
    drawn: bool = False,
) -> None:
    """Write what the tables read of a run: two images per patient, in an order that is not that of the ids."""
    ids, names = ids or image_ids(cell), np.array(CLASSES)
    write_yaml(folder / "recipe.yaml", cell.recipe.model_dump(mode="json"))
    scores = np.full((IMAGES, 3), 0.1)
    scores[np.arange(IMAGES), predicted] = 0.8
    table = pd.DataFrame({"image_id": ids, "split": "test", "label": names[LABELS], "predicted": names[predicted]})
    table[[f"prob_{name}" for name in CLASSES]] = scores
    validation = table.assign(image_id="v" + table["image_id"], split="val")
    write_csv(folder / "predictions.csv", pd.concat([validation, table.iloc[::-1]], ignore_index=True))
    rows = pd.concat([table, validation])
    patients = rows["split"] + [f"-{name[:-2]}{int(name[-2:]) // 2}" for name in rows["image_id"]]
    split = rows.assign(patient_id=patients)[["image_id", "patient_id", "label", "split"]]
    write_csv(folder / "split.csv", split)
    sources = [
        {
            "kind": weights,
            "description": f"weights of kind {weights}",
            "sha256": None,
            "mean": [0.5] * 3,
            "std": [0.2] * 3,
        }
    ]
    write_model(folder, cell.recipe, CLASSES, sources)
    machine = {"machine": "", "cpu": None, "gpu": None, "cores": 1, "memory_gib": 1.0}
    data = {"table_sha256": "", "split_sha256": "", "rows_used": 2 * IMAGES}
    made = {"dualrefnet": "", "git_commit": None, "seed": 0, "packages": {}, "precision": "fp32", "processes": 1}
    write_json(folder / "fingerprint.json", {**made, "data": data, "hardware": machine, "weights": sources})
    leaks = cell.key.protocol == "paper"
    leakage = {"train": 0.493, "train_or_val": 0.554} if leaks else {"train": 0, "train_or_val": 0}
    metrics = compute_metrics(LABELS, scores, CLASSES, ["MEL"])
    metrics |= {"dataset": cell.key.dataset, "drawn": drawn, "leakage": {"patient": leakage, "lesion": None}}
    write_json(folder / "metrics.json", metrics)


def write_suite(folder: Path, suite: dict[str, Any], predict: Predict = planned, **options: Any) -> Path:
    write_yaml(folder / "suite.yaml", suite)
    for cell in expand(load_suite(folder / "suite.yaml")):
        write_run(folder / "runs" / cell.run, cell, predict(cell), **options)
    return folder


def changed(**values: Any) -> dict[str, Any]:
    """Return a copy of SUITE with keys of its block replaced (`grid_...`), or its own."""
    suite = deepcopy(SUITE)
    for key, value in values.items():
        target = suite["grid"][0] if key.startswith("grid_") else suite
        target[key.removeprefix("grid_")] = value
    return suite


def row(table: pd.DataFrame, **values: str) -> pd.Series:
    chosen = table[np.logical_and.reduce([table[column] == value for column, value in values.items()])]
    assert len(chosen) == 1, chosen
    return chosen.iloc[0]


def paper_suite(folder: Path, methods: list[str], measures: list[str], **values: Any) -> SuiteResults:
    """Return the results of a suite on the paper's split, in which every run errs on three images."""
    block = {"recipe": "pad_ufes_20_paper", "methods": methods, **values.pop("block", {})}
    suite = {"name": "paper", "title": "Paper", "table": "3a", "measures": measures, "grid": [block], **values}
    return aggregate(write_suite(folder, suite, lambda cell: wrong_on(0, 1, 2)))
