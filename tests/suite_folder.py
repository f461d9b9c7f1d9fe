"""Write a suite directory with answers that are known, as the tables read it: no training."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.evaluation.metrics import compute_metrics
from dualrefnet.files import write_csv, write_json, write_yaml
from dualrefnet.suite.grid import Cell, expand, load_suite
from dualrefnet.suite.results import Aggregate, aggregate

CLASSES = ["ACK", "BCC", "MEL"]
IMAGES = 24
Answer = Callable[[Cell], NDArray[np.int64]]
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
LABELS = np.arange(IMAGES) % 3


def wrong_on(*images: int) -> NDArray[np.int64]:
    """Return right answers for a fold, but for some images."""
    answers = LABELS.copy()
    answers[list(images)] = (answers[list(images)] + 1) % 3
    return answers


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


def planned(cell: Cell) -> NDArray[np.int64]:
    return wrong_on(*ERRORS[cell.method, cell.fold, cell.seed])


def image_ids(cell: Cell) -> list[str]:
    return [f"f{cell.fold}-{index:02}" for index in range(IMAGES)]


def write_run(
    folder: Path,
    cell: Cell,
    answers: NDArray[np.int64],
    ids: list[str] | None = None,
    weights: str = "package",
    drawn: bool = False,
) -> None:
    """Write what the tables read of a run: two images a patient, in an order that is not that of the ids."""
    ids = ids or image_ids(cell)
    write_yaml(folder / "recipe.yaml", cell.recipe.model_dump(mode="json"))
    scores = np.full((IMAGES, 3), 0.1)
    scores[np.arange(IMAGES), answers] = 0.8
    names = np.array(CLASSES)
    table = pd.DataFrame({"image_id": ids, "split": "test", "label": names[LABELS], "predicted": names[answers]})
    table[[f"prob_{name}" for name in CLASSES]] = scores
    validation = table.assign(image_id="v" + table["image_id"], split="val")
    write_csv(folder / "predictions.csv", pd.concat([validation, table.iloc[::-1]], ignore_index=True))
    rows = pd.concat([table, validation])
    patients = rows["split"] + [f"-{name[:-2]}{int(name[-2:]) // 2}" for name in rows["image_id"]]
    write_csv(
        folder / "split.csv",
        pd.DataFrame(
            {"image_id": rows["image_id"], "patient_id": patients, "label": rows["label"], "split": rows["split"]}
        ),
    )
    write_json(folder / "model.json", {"classes": CLASSES, "malignant": ["MEL"]})
    write_json(
        folder / "fingerprint.json", {"weights": [{"kind": weights, "description": f"weights of kind {weights}"}]}
    )
    shares = {"train": 0.493, "train_or_val": 0.554} if cell.protocol == "paper" else {"train": 0, "train_or_val": 0}
    leakage = {"patient": {**shares, "per_class": {}}, "lesion": None}
    metrics = compute_metrics(LABELS, scores, CLASSES, ["MEL"])
    write_json(folder / "metrics.json", {**metrics, "dataset": cell.dataset, "drawn": drawn, "leakage": leakage})


def write_suite(folder: Path, suite: dict[str, Any], answers: Answer = planned, **options: Any) -> Path:
    write_yaml(folder / "suite.yaml", suite)
    for cell in expand(load_suite(folder / "suite.yaml")):
        write_run(folder / "runs" / cell.run, cell, answers(cell), **options)
    return folder


def changed(**values: Any) -> dict[str, Any]:
    """Return a copy of SUITE with keys of its block replaced (`grid_...`), or its own."""
    # Deep: a caller that changes the result mustn't change the suite of all other tests.
    suite = deepcopy(SUITE)
    block = {
        **suite["grid"][0],
        **{key.removeprefix("grid_"): value for key, value in values.items() if key.startswith("grid_")},
    }
    return {**suite, **{key: value for key, value in values.items() if not key.startswith("grid_")}, "grid": [block]}


def row(table: pd.DataFrame, **values: str) -> pd.Series:
    chosen = table[np.logical_and.reduce([table[column] == value for column, value in values.items()])]
    assert len(chosen) == 1, chosen
    return chosen.iloc[0]


def paper_suite(tmp_path: Path, **values: Any) -> Aggregate:
    block = {
        "recipe": "pad_ufes_20_paper",
        "methods": values.pop("methods", ["dualrefnet", "visual"]),
        **values.pop("block", {}),
    }
    suite = {
        "name": "paper",
        "title": "Paper",
        "table": "3a",
        "measures": ["accuracy", "f1_macro"],
        "grid": [block],
        **values,
    }
    return aggregate(write_suite(tmp_path, suite, lambda cell: wrong_on(0, 1, 2)))
