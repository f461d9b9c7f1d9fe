"""Does a form name its patient? For each form the nearest other one is looked up, as a model with a memory would."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from dualrefnet.audit.audited_rows import AuditedRows
from dualrefnet.audit.form_alone import FOLD_NOISE, encoded_form, neighbour
from dualrefnet.audit.measures import LEVEL, enough_for_folds, one_thread, predict_in_folds, recall_samples
from dualrefnet.evaluation.intervals import percentile_interval
from dualrefnet.findings import Finding


def reidentification(rows: AuditedRows, samples: int, seed: int) -> tuple[pd.DataFrame, list[Finding]]:
    """Look up the nearest form, as a vector of standardised columns, gaps zero.

    Returns:
        Table `question`, `value`, `low`, `high` (intervals over patients where there are any). And the findings.
    """
    if not rows.schema.fields:
        return pd.DataFrame(), [Finding("PASS", "reidentification", "there is no metadata")]
    form = StandardScaler().fit_transform(encoded_form(rows, "M2"))
    who = rows.schema.unit
    train, test = rows.sides == "train", rows.test
    told: list[tuple[str, float, float, float]] = []
    findings = []
    if train.any() and test.any():
        same = _same_group(form[train], form[test], rows.groups[train], rows.groups[test])
        told.append((f"test images whose nearest training form is of the same {who}", float(same.mean()), np.nan, np.nan))
        message = (
            f"for {int(same.sum()):,} of {len(same):,} test images ({same.mean():.1%}) the nearest training form is one of the same {who}"
        )
        findings.append(Finding("WARN" if same.any() else "PASS", "nearest_form", message, count=int(same.sum())))
    several = pd.Series(rows.groups).duplicated(keep=False).to_numpy()
    if several.any():
        found = _nearest_other(form[several], rows.groups[several])
        told.append(
            (f"images of {who}s with several images whose nearest other form is of the same {who}", float(found.mean()), np.nan, np.nan)
        )
    if not enough_for_folds(rows.labels, rows.groups):
        return pd.DataFrame(told, columns=["question", "value", "low", "high"]), findings
    drawn, values = {}, {}
    for name, groups in (("images", None), (f"{who}s", rows.groups)):
        predicted = predict_in_folds(neighbour, form, rows.labels, groups, len(rows.classes), seed).argmax(axis=1)
        values[name], drawn[name] = recall_samples(rows.labels, predicted, rows.groups, len(rows.classes), samples, seed)
        low, high = percentile_interval(drawn[name], LEVEL) or (np.nan, np.nan)
        told.append((f"balanced accuracy of the class of the nearest form, 5 folds of {name}", values[name], low, high))
    # The same patients were drawn for both, so that the difference is paired.
    low, high = percentile_interval(drawn["images"] - drawn[f"{who}s"], LEVEL) or (np.nan, np.nan)
    message = (
        f"the class of the nearest form is right in {values['images']:.3f} (balanced accuracy) in folds of images and "
        f"{values[f'{who}s']:.3f} in folds of {who}s, difference {values['images'] - values[f'{who}s']:.3f} [{low:.3f}, {high:.3f}]"
    )
    findings.append(
        Finding("WARN", "reidentification", f"{message}: a form nearly names its {who}")
        if low > FOLD_NOISE
        else Finding("PASS", "reidentification", f"{message}: forms don't name their {who}")
    )
    return pd.DataFrame(told, columns=["question", "value", "low", "high"]), findings


def _same_group(
    known: NDArray[np.float64], asked: NDArray[np.float64], known_groups: NDArray[np.object_], asked_groups: NDArray[np.object_]
) -> NDArray[np.bool_]:
    with one_thread():
        nearest = NearestNeighbors(n_neighbors=1).fit(known).kneighbors(asked, return_distance=False)[:, 0]
    same: NDArray[np.bool_] = known_groups[nearest] == asked_groups
    return same


def _nearest_other(form: NDArray[np.float64], groups: NDArray[np.object_]) -> NDArray[np.bool_]:
    # Without an argument a row isn't its own neighbour.
    with one_thread():
        nearest = NearestNeighbors(n_neighbors=1).fit(form).kneighbors(return_distance=False)[:, 0]
    same: NDArray[np.bool_] = groups[nearest] == groups
    return same
