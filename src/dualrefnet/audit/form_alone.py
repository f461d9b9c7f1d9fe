"""The form alone, without a picture: how far it goes, and how much of that is the recognition of patients.

Three kinds of learners on four sets of columns, each measured four ways: on this split's test side (trained on train, and
on train and validation), in five folds of images, and in five folds of patients. A learner that is much better in folds
of images has recognised patients by their forms.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dualrefnet.audit.audited_rows import AuditedRows
from dualrefnet.audit.measures import LEVEL, Learner, enough_for_folds, one_thread, predict_in_folds, recall_samples
from dualrefnet.audit.missingness import find_blocks
from dualrefnet.audit.proxies import FREE_TEXT
from dualrefnet.data.metadata import MetadataEncoder
from dualrefnet.evaluation.intervals import percentile_interval
from dualrefnet.findings import Finding
from dualrefnet.recipe import MetadataSection

ALWAYS, FLAGGED, ALL, OTHERS = "always recorded", "always recorded + missing flag", "all, gaps zero", "all, gaps zero + other columns"
LINEAR, FOREST, NEIGHBOUR = "logistic regression", "random forest", "1-nearest neighbour"
# Where it is measured; the fourth, folds of patients or lesions, is `apart`.
TRAIN, TRAIN_VAL, IMAGES = "test side, from train", "test side, from train and val", "5 folds of images"
# Folds of two seeds differ by up to this; less than this above it is noise.
FOLD_NOISE = 0.02
# Trees of the forest; of more than 10,000 rows 100 are enough and take half a minute a set of columns.
TREES, FEWER_TREES, MANY_ROWS = 500, 100, 10_000

Progress = Callable[[int, int], None]


def encoded_form(rows: AuditedRows, tier: str) -> NDArray[np.float64]:
    """Return the form as the literature's zero-filled columns: UNK a level of its own, numbers as they are; (N, M).

    Nothing is learned from the rows but the levels of categories that the schema doesn't name.
    """
    section = MetadataSection.model_validate(
        {"tier": tier, "imputation": "zero", "unknown": "level", "scale": "raw", "merge_aliases": False}
    )
    return MetadataEncoder.fit(rows.table, rows.schema, section).encode(rows.table).values.astype(float)


def feature_sets(rows: AuditedRows) -> dict[str, NDArray[np.float64]]:
    """Return the sets of columns that the data set has, each (N, M)."""
    sets: dict[str, NDArray[np.float64]] = {}
    empty = [block.mask for block in find_blocks(rows) if not block.code]
    if any(field.tier == "M1" for field in rows.schema.fields):
        sets[ALWAYS] = encoded_form(rows, "M1")
        if empty:
            sets[FLAGGED] = np.column_stack([sets[ALWAYS], empty[0]])
    if rows.schema.fields:
        sets[ALL] = encoded_form(rows, "M2")
    words = [name for name in rows.others.columns if 1 < rows.others[name].nunique() <= FREE_TEXT]
    if words:
        extra = pd.get_dummies(rows.others[words], dtype=float).to_numpy()
        sets[OTHERS] = np.column_stack([sets[ALL], extra]) if ALL in sets else extra
    return sets


def learners(count: int, forests: bool) -> dict[str, Learner]:
    """Return the learners for a table of `count` rows; classes are balanced, so that rare ones count.

    Args:
        count: number of rows.
        forests: whether trees are wanted, which take the most time.
    """
    chosen: dict[str, Learner] = {LINEAR: linear}
    if forests:
        trees = TREES if count <= MANY_ROWS else FEWER_TREES
        # Leaves of one row, weighted once for all trees, lose most with patients apart: they hold single patients.
        chosen[FOREST] = lambda: RandomForestClassifier(
            trees, class_weight="balanced_subsample", min_samples_leaf=2, random_state=0, n_jobs=-1
        )
    chosen[NEIGHBOUR] = neighbour
    return chosen


def apart(group: str) -> str:
    """Return what measuring in folds that keep patients (or lesions) together is called."""
    return f"5 folds of {group}s"


def linear() -> object:
    """Make logistic regression of standardised columns."""
    return make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=3000, tol=1e-3))


def neighbour() -> object:
    """Make the 1-nearest neighbour of standardised columns."""
    return make_pipeline(StandardScaler(), KNeighborsClassifier(1))


def form_alone(
    rows: AuditedRows, forests: bool, samples: int, seed: int, progress: Progress | None = None
) -> tuple[pd.DataFrame, list[Finding]]:
    """Measure every learner on every set of columns, four ways.

    Args:
        rows: of the split.
        forests: whether trees take part, which need most of the time.
        samples: bootstrap samples of patients.
        seed: of folds and draws.
        progress: called with (models measured, models in all).

    Returns:
        Table `features`, `learner`, `measured`, `balanced_accuracy`, `low`, `high`, and `patients_recognised` (folds of images less folds
        of patients, in the rows of the former) with `_low` and `_high`. And a finding.
    """
    sets = feature_sets(rows)
    if not sets:
        return pd.DataFrame(), [Finding("PASS", "form_alone", "there is no metadata")]
    if not enough_for_folds(rows.labels, rows.groups):
        return pd.DataFrame(), [Finding("WARN", "form_alone", "there are too few rows or patients for five folds")]
    makers = learners(len(rows.labels), forests)
    told: list[dict[str, object]] = []
    for number, (features, learner) in enumerate((features, learner) for features in sets for learner in makers):
        told += _measured(features, learner, sets[features], makers[learner], rows, samples, seed)
        if progress is not None:
            progress(number + 1, len(sets) * len(makers))
    table = pd.DataFrame(told)
    return table, [_finding(table, rows)]


def _measured(
    features: str, learner: str, columns: NDArray[np.float64], make: Learner, rows: AuditedRows, samples: int, seed: int
) -> list[dict[str, object]]:
    count, told = len(rows.classes), []
    test = rows.test
    for way, chosen in ((TRAIN, rows.sides == "train"), (TRAIN_VAL, ~test)):
        if not test.any() or len(set(rows.labels[chosen])) < 2:
            continue
        with one_thread():
            predicted = make().fit(columns[chosen], rows.labels[chosen]).predict(columns[test])
        value, low, high = _interval(rows.labels[test], predicted, rows.groups[test], count, samples, seed)
        told.append({"features": features, "learner": learner, "measured": way, "balanced_accuracy": value, "low": low, "high": high})
    drawn = {}
    grouped = apart(rows.schema.unit)
    for way, kept in ((IMAGES, None), (grouped, rows.groups)):
        predicted = predict_in_folds(make, columns, rows.labels, kept, count, seed).argmax(axis=1)
        value, drawn[way] = recall_samples(rows.labels, predicted, rows.groups, count, samples, seed)
        low, high = percentile_interval(drawn[way], LEVEL) or (np.nan, np.nan)
        told.append({"features": features, "learner": learner, "measured": way, "balanced_accuracy": value, "low": low, "high": high})
    # The same patients were drawn for both, so that the difference is paired.
    low, high = percentile_interval(drawn[IMAGES] - drawn[grouped], LEVEL) or (np.nan, np.nan)
    difference = float(told[-2]["balanced_accuracy"]) - float(told[-1]["balanced_accuracy"])  # type: ignore[arg-type]
    told[-2] |= {"patients_recognised": difference, "patients_recognised_low": low, "patients_recognised_high": high}
    return told


def _interval(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], groups: NDArray[np.object_], classes: int, samples: int, seed: int
) -> tuple[float, float, float]:
    if len(set(groups)) < 2:
        return np.nan, np.nan, np.nan
    value, drawn = recall_samples(labels, predicted, groups, classes, samples, seed)
    low, high = percentile_interval(drawn, LEVEL) or (np.nan, np.nan)
    return value, low, high


def _finding(table: pd.DataFrame, rows: AuditedRows) -> Finding:
    images = table[table["measured"] == IMAGES].to_dict("records")
    grouped = table[table["measured"] == apart(rows.schema.unit)].to_dict("records")
    best = max(grouped, key=lambda row: float(row["balanced_accuracy"]))
    one, other = max(zip(images, grouped, strict=True), key=lambda pair: float(pair[0]["patients_recognised_low"]))
    what = f"{rows.schema.unit}s"
    message = (
        f"without a picture the form gives a balanced accuracy of {best['balanced_accuracy']:.3f} with {what} apart ({best['learner']}, "
        f"{best['features']}; chance {1 / len(rows.classes):.3f}): a model that reads both must do better"
    )
    difference = f"{one['patients_recognised']:.3f} [{one['patients_recognised_low']:.3f}, {one['patients_recognised_high']:.3f}]"
    compared = (
        f"{one['learner']}, {one['features']}: {one['balanced_accuracy']:.3f} in folds of images, {other['balanced_accuracy']:.3f} in "
        f"folds of {what}, difference {difference}"
    )
    if one["patients_recognised_low"] > FOLD_NOISE:
        return Finding("WARN", "form_alone", f"{message}. The form recognises {what} ({compared}): never divide this data set by image")
    return Finding("PASS", "form_alone", f"{message}. It doesn't recognise {what} ({compared})")
