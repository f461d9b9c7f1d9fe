"""The tables of an audit, printed: for the command line and for a run's page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from dualrefnet.audit.dataset_audit import Audit
from dualrefnet.audit.form_alone import IMAGES, apart
from dualrefnet.evaluation.printed_table import Cell, PrintedTable

# Single columns that are worth a line.
COLUMNS = 8
MEASURES = ("balanced_accuracy", "auc", "malignant_auc")
MEASURE_HEAD = ("Balanced accuracy", "AUC", "AUC, malignant")


def printed_tables(audit: Audit) -> dict[str, PrintedTable]:
    """Return the tables that the audit has, under the names that they have there."""
    makers: dict[str, Callable[[pd.DataFrame], PrintedTable]] = {
        "shared": _shared, "near_duplicates": _copies, "missing_blocks": _missing, "missing_models": _models, "proxies": _columns,
        "reidentification": _forms, "form_alone": lambda table: _form_alone(table, audit.group),
    }  # fmt: skip
    return {name: make(audit.tables[name]) for name, make in makers.items() if name in audit.tables}


def _shared(table: pd.DataFrame) -> PrintedTable:
    # By class only where there is something to tell.
    table = table if table["train_or_val"].any() else table[table["class"] == "all"]
    rows = [
        [Cell(row["what"]), Cell(row["class"]), Cell(f"{row['images']:,}"), _share(row["train"]), _share(row["train_or_val"])]
        for row in table.to_dict("records")
    ]
    head = ("Seen", "Class", "Test images", "In train", "In train or validation")
    return PrintedTable("Test images whose patient or lesion is on another side", head, rows, left=2)


def _copies(table: pd.DataFrame) -> PrintedTable:
    table = table if table["copies"].any() else table[table["class"] == "all"]
    rows = [[Cell(row["class"]), *_counts(row, "images", "copies"), _share(row["share"])] for row in table.to_dict("records")]
    return PrintedTable("Test images with a near-duplicate in train or validation", ("Class", "Test images", "With a copy", "Share"), rows)


def _missing(table: pd.DataFrame) -> PrintedTable:
    classes = [name for name in table.columns if name not in ("block", "rows", "share", "malignant_missing", "malignant_present")]
    keys = ("share", *classes, "malignant_missing", "malignant_present")
    rows = [[Cell(row["block"]), *_counts(row, "rows"), *(_share(row[key]) for key in keys)] for row in table.to_dict("records")]
    head = ("Missing together", "Rows", "Share", *classes, "Malignant if missing", "If not")
    return PrintedTable("What is missing, by class", head, rows)


def _models(table: pd.DataFrame) -> PrintedTable:
    rows = [[Cell(row["mask"]), *_counts(row, "rows"), *_measures(row)] for row in table.to_dict("records")]
    note = (
        "A model that sees only which cells of the form are empty or unknown, measured on patients it hasn't learned from. Guessing gives "
        "an AUC of .5; what is above it is known from how the form was filled in, not from the patient."
    )
    return PrintedTable("What a model learns from the gaps of the form alone", ("What is missing", "Rows", *MEASURE_HEAD), rows, (note,))


def _columns(table: pd.DataFrame) -> PrintedTable:
    rows = [
        [
            Cell(row["column"], bold=row["verdict"] != "PASS"), Cell("yes" if row["feature"] else "no"), Cell(row["verdict"]),
            *_measures(row),
        ]
        for row in table.head(COLUMNS).to_dict("records")
    ]  # fmt: skip
    note = (
        f"The {min(COLUMNS, len(table))} strongest of {len(table)} columns, each alone, where it is recorded. A column that was filled in "
        "because of the diagnosis, such as whether a biopsy was taken, must not be a feature."
    )
    return PrintedTable("What single columns tell", ("Column", "A feature", "Verdict", *MEASURE_HEAD), rows, (note,), left=3)


def _forms(table: pd.DataFrame) -> PrintedTable:
    rows = [[Cell(row["question"]), _interval(row["value"], row["low"], row["high"])] for row in table.to_dict("records")]
    return PrintedTable("The nearest form", ("Question", "Value"), rows)


def _form_alone(table: pd.DataFrame, group: str) -> PrintedTable:
    ways = list(dict.fromkeys(table["measured"]))
    rows = []
    for (features, learner), part in table.groupby(["features", "learner"], sort=False):
        cells = {row["measured"]: _interval(row["balanced_accuracy"], row["low"], row["high"]) for row in part.to_dict("records")}
        rows.append([Cell(str(features)), Cell(str(learner)), *(cells.get(way, Cell("–")) for way in ways)])
    note = (
        f"Balanced accuracy of models that see no photograph. “{IMAGES}” puts photographs of one {group} on both sides, “{apart(group)}” "
        f"keeps a {group} on one: the difference is the recognition of {group}s by their forms."
    )
    head = ("Columns", "Learner", *(way.capitalize() for way in ways))
    return PrintedTable("How far the form goes without a photograph", head, rows, (note,), left=2)


def _counts(row: dict[Any, Any], *keys: str) -> list[Cell]:
    return [Cell(f"{row[key]:,}") for key in keys]


def _measures(row: dict[Any, Any]) -> list[Cell]:
    return [_interval(row[key], row[f"{key}_low"], row[f"{key}_high"]) for key in MEASURES]


def _interval(value: float, low: float, high: float) -> Cell:
    if not np.isfinite(value):
        return Cell("–")
    return Cell(f"{value:.3f}", small=f"[{low:.3f}, {high:.3f}]" if np.isfinite(low) else "")


def _share(value: float) -> Cell:
    return Cell(f"{value:.1%}" if np.isfinite(value) else "–")
