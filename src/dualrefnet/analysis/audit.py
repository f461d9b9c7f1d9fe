"""Patients and lesions of the test side that training has seen: the plainest leak, counted from the ids."""

# also: The audit of a data set and its split: everything that could make a number look better than it is.
# also: The tables of an audit, printed: for the command line and for a run's page.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualrefnet.analysis.duplicates import Fingerprints, fingerprint_files, near_duplicate_findings, near_pairs
from dualrefnet.analysis.label_leakage import (
    IMAGES,
    AuditedRows,
    apart,
    form_alone,
    missingness,
    proxies,
    reidentification,
)
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.check import MAX_EXAMPLES, Finding, Level, identical_images
from dualrefnet.data.protocols import leakage, split_dataset
from dualrefnet.data.schema import Dataset
from dualrefnet.display.format import Cell, PrintedTable


def shared_ids(dataset: Dataset, split: pd.DataFrame) -> tuple[pd.DataFrame, list[Finding]]:
    """Count the test images whose patient or lesion is also in train, or in train or validation.

    Returns:
        Table `what` (patient, lesion), `class` (`all` or a label), `images` (of the test side), `train` and
        `train_or_val` (shares);
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
            findings.append(
                Finding(
                    "WARN", check, f"the data set names no {what}: a {what} on two sides of the split can't be seen"
                )
            )
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


# Bootstrap samples of patients for the intervals.
SAMPLES = 200


# What is being done, and how far it is: (step, done, in all).
StepProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        dataset: title of the data set.
        protocol: how it was divided; empty if the split was given.
        group: what the data set keeps together: patient or lesion.
        images: number of images on each side.
        findings: in the order of the examinations.
        tables: `shared`, `near_duplicates`, `near_duplicate_pairs`, `missing_blocks`, `missing_models`, `proxies`,
            `reidentification`, `form_alone`: tidy, each described where it is made; what wasn't examined is missing.
    """

    dataset: str
    protocol: str
    group: str
    images: dict[str, int]
    findings: list[Finding]
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether a finding is FAIL."""
        return self.verdict == "FAIL"

    @property
    def verdict(self) -> Level:
        """The worst of the findings."""
        levels = {finding.level for finding in self.findings}
        return "FAIL" if "FAIL" in levels else "WARN" if "WARN" in levels else "PASS"

    def to_json(self) -> dict[str, Any]:
        """Return the audit as values that strict JSON knows; what is undefined is null."""
        tables = {name: [_plain(row) for row in table.to_dict("records")] for name, table in self.tables.items()}
        findings = [finding.to_json() for finding in self.findings]
        return {
            "dataset": self.dataset,
            "protocol": self.protocol,
            "group": self.group,
            "images": self.images,
            "verdict": self.verdict,
            "failed": self.failed,
            "findings": findings,
            "tables": tables,
        }


def audit_dataset(
    name: str,
    root: Path | None,
    description: Path | None = None,
    protocol: str = "grouped",
    fold: int = 0,
    folds: int = 5,
    seed: int = 0,
    images: bool = True,
    forests: bool = True,
    workers: int | None = None,
    progress: StepProgress | None = None,
) -> Audit:
    """Divide a data set by a protocol and audit it.

    Args:
        name: the adapter's name.
        root: the data set's folder; None: the folder of that name under `$DUALREFNET_DATA`.
        description: for `csv_table`, the YAML file that describes the columns.
        protocol: paper, grouped or grouped-cv.
        fold: grouped-cv: which fold is the test set.
        folds: number of folds.
        seed: shuffles the grouped protocols.
        images: whether the images are read and compared.
        forests: whether trees are grown on the form.
        workers: threads that read images; None: one a core, at most 16.
        progress: called with (step, done, in all).

    Raises:
        DataError: the table can't be read; see `dualrefnet.data.adapters.load_dataset`.
        SplitError: see `dualrefnet.data.protocols.split_dataset`.
    """
    dataset = load_dataset(name, root, description)
    split = split_dataset(dataset, protocol, fold, folds, seed)
    fingerprints = None
    if images:
        used = dataset.with_image[dataset.with_image["image_id"].isin(split["image_id"])]
        fingerprints = fingerprint_files(used, workers, _step(progress, "reading images"))
    return audit_split(
        dataset, split, fingerprints, forests=forests, workers=workers, progress=progress, protocol=protocol
    )


def audit_split(
    dataset: Dataset,
    split: pd.DataFrame,
    fingerprints: Fingerprints | None = None,
    *,
    forests: bool = True,
    samples: int = SAMPLES,
    seed: int = 0,
    workers: int | None = None,
    progress: StepProgress | None = None,
    protocol: str = "",
) -> Audit:
    """Audit any division of a data set into train, val and test.

    Args:
        dataset: the data set; labels and patients are taken from it.
        split: `image_id` and `split`; only its rows are looked at.
        fingerprints: of the images; None: images aren't compared.
        forests: whether trees are grown on the form; they take most of the time.
        samples: bootstrap samples of patients for the intervals.
        seed: of folds and draws.
        workers: threads that compare images.
        progress: called with (step, done, in all).
        protocol: what the split is called.
    """
    rows = AuditedRows.of(dataset, split)
    tables: dict[str, pd.DataFrame] = {}
    tables["shared"], findings = shared_ids(dataset, split)
    if fingerprints is not None:
        label = dict(zip(rows.table["image_id"], rows.table["label"], strict=True))
        pairs = near_pairs(fingerprints, workers, _step(progress, "comparing images"))
        tables["near_duplicate_pairs"], tables["near_duplicates"], found = near_duplicate_findings(
            rows, pairs, fingerprints.image_ids
        )
        hashed = zip(fingerprints.image_ids, fingerprints.sha256, strict=True)
        same = identical_images((image_id, label[image_id], sha256) for image_id, sha256 in hashed if image_id in label)
        findings += [_examined(rows, fingerprints), *found, *same]
    tables["missing_blocks"], tables["missing_models"], found = missingness(rows, samples, seed)
    findings += found
    tables["proxies"], found = proxies(rows, samples, seed)
    findings += found
    tables["reidentification"], found = reidentification(rows, samples, seed)
    findings += found
    tables["form_alone"], found = form_alone(rows, forests, samples, seed, _step(progress, "the form alone"))
    findings += found
    sides = pd.Series(rows.sides).value_counts()
    counts = {side: int(sides.get(side, 0)) for side in ("train", "val", "test")}
    return Audit(
        dataset.schema.title,
        protocol,
        rows.schema.unit,
        counts,
        findings,
        {name: table for name, table in tables.items() if len(table)},
    )


def _examined(rows: AuditedRows, fingerprints: Fingerprints) -> Finding:
    compared = int(rows.table["image_id"].isin(fingerprints.image_ids).sum())
    absent, broken = len(rows.table) - compared - len(fingerprints.unreadable), tuple(fingerprints.unreadable)
    message = f"{compared:,} of {len(rows.table):,} images were compared with each other"
    if broken:
        message += f"; {len(broken):,} can't be read"
    if absent:
        message += f"; {absent:,} aren't on this disk, and copies among them aren't found"
    return Finding("WARN" if absent or broken else "PASS", "images_compared", message, broken[:10], compared)


def _step(progress: StepProgress | None, step: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(step, done, total)


def _plain(row: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): _value(value) for key, value in row.items()}


def _value(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


# Single columns that are worth a line.
COLUMNS = 8


MEASURES = ("balanced_accuracy", "auc", "malignant_auc")


MEASURE_HEAD = ("Balanced accuracy", "AUC", "AUC, malignant")


def printed_tables(audit: Audit) -> dict[str, PrintedTable]:
    """Return the tables that the audit has, under the names that they have there."""
    makers: dict[str, Callable[[pd.DataFrame], PrintedTable]] = {
        "shared": _shared,
        "near_duplicates": _copies,
        "missing_blocks": _missing,
        "missing_models": _models,
        "proxies": _columns,
        "reidentification": _forms,
        "form_alone": lambda table: _form_alone(table, audit.group),
    }
    return {name: make(audit.tables[name]) for name, make in makers.items() if name in audit.tables}


def _shared(table: pd.DataFrame) -> PrintedTable:
    # By class only where there is something to tell.
    table = table if table["train_or_val"].any() else table[table["class"] == "all"]
    rows = [
        [
            Cell(row["what"]),
            Cell(row["class"]),
            Cell(f"{row['images']:,}"),
            _share(row["train"]),
            _share(row["train_or_val"]),
        ]
        for row in table.to_dict("records")
    ]
    head = ("Seen", "Class", "Test images", "In train", "In train or validation")
    return PrintedTable("Test images whose patient or lesion is on another side", head, rows, left=2)


def _copies(table: pd.DataFrame) -> PrintedTable:
    table = table if table["copies"].any() else table[table["class"] == "all"]
    rows = [
        [Cell(row["class"]), *_counts(row, "images", "copies"), _share(row["share"])]
        for row in table.to_dict("records")
    ]
    return PrintedTable(
        "Test images with a near-duplicate in train or validation",
        ("Class", "Test images", "With a copy", "Share"),
        rows,
    )


def _missing(table: pd.DataFrame) -> PrintedTable:
    classes = [
        name
        for name in table.columns
        if name not in ("block", "rows", "share", "malignant_missing", "malignant_present")
    ]
    keys = ("share", *classes, "malignant_missing", "malignant_present")
    rows = [
        [Cell(row["block"]), *_counts(row, "rows"), *(_share(row[key]) for key in keys)]
        for row in table.to_dict("records")
    ]
    head = ("Missing together", "Rows", "Share", *classes, "Malignant if missing", "If not")
    return PrintedTable("What is missing, by class", head, rows)


def _models(table: pd.DataFrame) -> PrintedTable:
    rows = [[Cell(row["mask"]), *_counts(row, "rows"), *_measures(row)] for row in table.to_dict("records")]
    note = (
        "A model that sees only which cells of the form are empty or unknown, measured on patients it hasn't learned from. Guessing gives "
        "an AUC of .5; what is above it is known from how the form was filled in, not from the patient."
    )
    return PrintedTable(
        "What a model learns from the gaps of the form alone", ("What is missing", "Rows", *MEASURE_HEAD), rows, (note,)
    )


def _columns(table: pd.DataFrame) -> PrintedTable:
    rows = [
        [
            Cell(row["column"], bold=row["verdict"] != "PASS"),
            Cell("yes" if row["feature"] else "no"),
            Cell(row["verdict"]),
            *_measures(row),
        ]
        for row in table.head(COLUMNS).to_dict("records")
    ]
    note = (
        f"The {min(COLUMNS, len(table))} strongest of {len(table)} columns, each alone, where it is recorded. A column that was filled in "
        "because of the diagnosis, such as whether a biopsy was taken, must not be a feature."
    )
    return PrintedTable(
        "What single columns tell", ("Column", "A feature", "Verdict", *MEASURE_HEAD), rows, (note,), left=3
    )


def _forms(table: pd.DataFrame) -> PrintedTable:
    rows = [
        [Cell(row["question"]), _interval(row["value"], row["low"], row["high"])] for row in table.to_dict("records")
    ]
    return PrintedTable("The nearest form", ("Question", "Value"), rows)


def _form_alone(table: pd.DataFrame, group: str) -> PrintedTable:
    ways = list(dict.fromkeys(table["measured"]))
    rows = []
    for (features, learner), part in table.groupby(["features", "learner"], sort=False):
        cells = {
            row["measured"]: _interval(row["balanced_accuracy"], row["low"], row["high"])
            for row in part.to_dict("records")
        }
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
