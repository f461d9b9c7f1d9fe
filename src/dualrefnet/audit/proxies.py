"""Proxies of the label: columns that hold the answer, or what was done because of the answer, under whatever name.

Every column, feature or not, is given alone to a shallow tree, in five folds that keep patients together. It is measured
on the rows in which the column is recorded: whether a cell is empty is the question of `missingness`, and mixing the two
would call every column of an incomplete form a proxy (13 columns of PAD-UFES-20 would have an AUC of .83 of malignancy;
where they are recorded it is .54).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.tree import DecisionTreeClassifier

from dualrefnet.audit.audited_rows import AuditedRows
from dualrefnet.audit.measures import enough_for_folds, measure, predict_in_folds
from dualrefnet.findings import Finding, Level

# The strongest honest columns that are known: growth (.76 of malignancy) and change in PAD-UFES-20, age in ISIC-2019 (.72).
# `biopsed`, a decision made because of the suspicion, has .89. All limits are for the lower end of the interval.
STRONG_AUC = 0.80
# An exact copy of the label has 1; a copy in which one label of ten is wrong about .94 (AUC) and .88 or .80 (knowledge, six or
# two classes).
ANSWER_AUC = 0.90
# Balanced accuracy between chance (0) and all (1).
ANSWER_KNOWLEDGE = 0.70
# A value that settles malignancy must be held by this share of the rows ...
SETTLING_SHARE = 0.05
# ... and by so many patients that chance makes this of it less often than that. Strict: a form has many values.
SETTLING_CHANCE = 1e-6
# Columns with more different words than this are free text or ids.
FREE_TEXT = 200
COLUMNS = ("column", "feature", "rows", "balanced_accuracy", "auc", "malignant_auc", "settles", "verdict")


def proxies(rows: AuditedRows, samples: int, seed: int) -> tuple[pd.DataFrame, list[Finding]]:
    """Examine every metadata field and every other published column.

    Returns:
        Table `column`, `feature` (whether models see it), `rows` (recorded), `balanced_accuracy`, `auc`, `malignant_auc` with `_low` and
        `_high`, `settles` (how many rows hold a value that settles malignancy or class) and `verdict`; the strongest first.
        And the findings: one for each column that isn't PASS, and one for the rest.
    """
    told, findings = [], []
    for name, column, feature in _columns(rows):
        row, finding = _examine(name, column, feature, rows, samples, seed)
        if row is not None:
            told.append(row)
        if finding is not None:
            findings.append(finding)
    table = pd.DataFrame(told, columns=None if told else list(COLUMNS))
    if len(table):
        table = table.sort_values("auc", ascending=False, ignore_index=True)
    quiet = int((table["verdict"] == "PASS").sum()) if len(table) else 0
    if quiet:
        strongest = table[table["verdict"] == "PASS"].iloc[0]
        message = (
            f"{quiet} columns tell no more than an honest finding does; the strongest: {strongest['column']} (AUC {strongest['auc']:.3f})"
        )
        findings.append(Finding("PASS", "proxy", message, count=quiet))
    elif not findings:
        findings.append(Finding("PASS", "proxy", "there is no column beside the label"))
    return table, findings


def column_codes(values: pd.Series) -> NDArray[np.float64] | None:
    """Return a recorded column as numbers, (N,): numbers as they are, words by how frequent they are; None for free text."""
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.notna().all():
        return np.asarray(numbers, dtype=float)
    if values.nunique() > FREE_TEXT:
        return None
    codes = {value: code for code, value in enumerate(values.value_counts().index)}
    return np.asarray(values.map(codes), dtype=float)


def _columns(rows: AuditedRows) -> list[tuple[str, pd.Series, bool]]:
    fields = [(field.name, rows.table[field.name], True) for field in rows.schema.fields]
    return fields + [(str(name), rows.others[name], False) for name in rows.others.columns]


def _tree() -> DecisionTreeClassifier:
    # Leaves of 10 rows: a tree that isolates single patients learns nothing that holds for others.
    return DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=10, class_weight="balanced", random_state=0)


def _examine(
    name: str, column: pd.Series, feature: bool, rows: AuditedRows, samples: int, seed: int
) -> tuple[dict[str, Any] | None, Finding | None]:
    known = column.notna().to_numpy()
    codes = column_codes(column[known]) if known.any() else None
    if codes is None:
        if known.any() and feature:
            return None, Finding(
                "WARN", "proxy", f"{name} has {column.nunique():,} different words: free text or an id, which wasn't examined"
            )
        return None, None
    present = np.unique(rows.labels[known])
    groups = rows.groups[known]
    if not enough_for_folds(rows.labels[known], groups):
        return None, None
    classes = tuple(rows.classes[index] for index in present)
    labels = np.searchsorted(present, rows.labels[known])
    malignant = tuple(label for label in classes if label in rows.malignant)
    malignant = malignant if len(malignant) < len(classes) else ()
    probabilities = predict_in_folds(_tree, codes[:, None], labels, groups, len(classes), seed)
    measured = measure(labels, probabilities, groups, classes, malignant, samples, seed)
    settled, count = _settles(column[known], known, rows)
    row: dict[str, Any] = {"column": name, "feature": feature, "rows": int(known.sum())}
    for key, value in measured.items():
        row |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
    chance = 1 / len(classes)
    knowledge = (measured["balanced_accuracy"].low - chance) / (1 - chance)
    auc = float(np.nanmax([measured["auc"].low, measured["malignant_auc"].low]))
    level, said = _verdict(feature, knowledge, auc, bool(settled))
    row |= {"settles": count, "verdict": level}
    if level == "PASS":
        return row, None
    numbers = f"alone it gives a balanced accuracy of {row['balanced_accuracy']:.3f} (chance {chance:.3f}), a macro AUC of {row['auc']:.3f}"
    if np.isfinite(row["malignant_auc"]):
        numbers += f" and an AUC of malignancy of {row['malignant_auc']:.3f}"
    return row, Finding(level, "proxy", f"{name} {said}: {numbers}{''.join(f'; {words}' for words in settled)}", count=count)


def _verdict(feature: bool, knowledge: float, auc: float, settles: bool) -> tuple[Level, str]:
    answer = knowledge >= ANSWER_KNOWLEDGE or auc >= ANSWER_AUC or (settles and auc >= STRONG_AUC)
    if feature and answer:
        return "FAIL", "is a metadata field and nearly the answer; take it out"
    if not feature and (answer or settles or auc >= STRONG_AUC):
        return "WARN", "is a proxy of the label; it isn't used as a feature: keep it so"
    if settles or auc >= STRONG_AUC:
        return "WARN", "is a metadata field that tells much of the answer; ask when it was recorded and why"
    return "PASS", ""


def _settles(values: pd.Series, known: NDArray[np.bool_], rows: AuditedRows) -> tuple[list[str], int]:
    """Say which values always or never go with a malignant class, or always with one class, where chance can't explain it.

    Patients are counted, not rows: photographs of one patient share the value and often the class.
    """
    cancer, labels, groups = rows.is_malignant[known], rows.labels[known], rows.groups[known]
    said, count = [], 0
    for value, held in values.value_counts().items():
        if held < SETTLING_SHARE * len(rows.table):
            break
        mine = (values == value).to_numpy()
        patients = len(set(groups[mine]))
        # How the class is distributed where the column is recorded: what a value that tells nothing would show.
        share = float(cancer.mean())
        what = ""
        if rows.malignant and not cancer[mine].any() and (1 - share) ** patients < SETTLING_CHANCE:
            what = "none is malignant"
        elif rows.malignant and cancer[mine].all() and share**patients < SETTLING_CHANCE:
            what = "all are malignant"
        elif len(set(labels[mine])) == 1 and float((labels == labels[mine][0]).mean()) ** patients < SETTLING_CHANCE:
            what = f"all are {rows.classes[labels[mine][0]]}"
        if what:
            count += int(held)
            said.append(f"of the {held:,} rows with {_shown(value)} {what}")
    return said, count


def _shown(value: object) -> str:
    """Return a value that many patients share, but never a number or a long text, which might be about one of them."""
    word = str(value)
    return f"the value {word}" if len(word) <= 20 and not any(character.isdigit() for character in word) else "one value"
