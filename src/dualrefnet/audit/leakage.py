"""Patients and lesions of the test side that training has seen: the plainest leak, counted from the ids."""

from __future__ import annotations

import pandas as pd

from dualrefnet.data.adapters import Dataset
from dualrefnet.data.protocols import leakage
from dualrefnet.findings import MAX_EXAMPLES, Finding


def shared_ids(dataset: Dataset, split: pd.DataFrame) -> tuple[pd.DataFrame, list[Finding]]:
    """Count the test images whose patient or lesion is also in train, or in train or validation.

    Returns:
        Table `what` (patient, lesion), `class` (`all` or a label), `images` (of the test side), `train` and `train_or_val` (shares);
        only of what the data set names. And a finding for each of the two.
    """
    strict = leakage(dataset, split)
    # Validation counted as seen: then the shares by class count it too.
    wide = leakage(dataset, split.assign(split=split["split"].replace("val", "train")))
    rows = split[["image_id", "split"]].merge(dataset.table, on="image_id", how="left", validate="one_to_one")
    test = rows[rows["split"] == "test"]
    counted, findings = [], []
    for what in ("patient", "lesion"):
        check = f"{what}s_on_two_sides"
        if strict[what] is None:
            findings.append(Finding("WARN", check, f"the data set names no {what}: a {what} on two sides of the split can't be seen"))
            continue
        counted.append((what, "all", len(test), strict[what]["train"], wide[what]["train"]))
        for label in dataset.schema.classes:
            if label in strict[what]["per_class"]:
                shares = (strict[what]["per_class"][label], wide[what]["per_class"][label])
                counted.append((what, label, int((test["label"] == label).sum()), *shares))
        findings.append(_finding(what, check, rows, strict[what], wide[what]))
    return pd.DataFrame(counted, columns=["what", "class", "images", "train", "train_or_val"]), findings


def _finding(what: str, check: str, rows: pd.DataFrame, strict: dict[str, float], wide: dict[str, float]) -> Finding:
    test, column = rows["split"] == "test", f"{what}_id"
    seen = rows.loc[test & rows[column].isin(rows.loc[~test, column].dropna()), "image_id"]
    unnamed = int((test & rows[column].isna()).sum())
    but = f" ({unnamed:,} test images name no {what})" if unnamed else ""
    if not len(seen):
        return Finding("PASS", check, f"no test image shows a {what} of train or validation{but}")
    message = (
        f"{strict['train']:.1%} of the test images show a {what} that is also in train ({wide['train']:.1%} counting validation){but}; "
        "every number measured on them is too good: use the protocol grouped"
    )
    return Finding("FAIL", check, message, tuple(seen[:MAX_EXAMPLES]), len(seen))
