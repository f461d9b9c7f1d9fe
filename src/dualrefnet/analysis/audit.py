"""The data-leakage audit of a data set and its split: everything that could make a result too good.

Patients, lesions and near-duplicates that cross the split are counted here; what metadata reveal of the label is
measured in `dualrefnet.analysis.label_leakage`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualrefnet.analysis.duplicates import Fingerprints, fingerprint_files, group_pairs, near_pairs
from dualrefnet.analysis.label_leakage import (
    IMAGES,
    MEASURES,
    AuditedRows,
    group_folds,
    label_leaking_columns,
    metadata_alone,
    missingness,
    reidentification,
)
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.check import MAX_EXAMPLES, Finding, Level, crossing_ids, identical_images
from dualrefnet.data.protocols import leakage, split_dataset
from dualrefnet.data.schema import Dataset
from dualrefnet.display.format import Cell, PrintedTable, number

# Bootstrap samples of patients for the intervals.
SAMPLES = 200
# A near-duplicate in training can raise a measure by no more than its share: one in a hundred is less than what any
# interval here spans. ISIC-2019 split by its lesion ids has .5%, lesions published twice under two ids.
TOLERATED_SHARE = 0.01


@dataclass(frozen=True)
class Audit:
    """The result of an audit; each of its tidy tables is described where it is made."""

    dataset: str  # its title
    protocol: str  # how it was split; empty if the split was given
    group: str  # what the data set keeps together: patient or lesion
    images: dict[str, int]  # split -> number
    findings: list[Finding]  # in the order of the examinations
    tables: dict[str, pd.DataFrame]  # what wasn't examined is missing

    @property
    def failed(self) -> bool:
        return self.verdict == "FAIL"

    @property
    def verdict(self) -> Level:
        levels = {finding.level for finding in self.findings}
        return "FAIL" if "FAIL" in levels else "WARN" if "WARN" in levels else "PASS"

    def to_json(self) -> dict[str, Any]:
        """Return the audit as values of strict JSON; what is undefined is null."""
        return {
            "dataset": self.dataset,
            "protocol": self.protocol,
            "group": self.group,
            "images": self.images,
            "verdict": self.verdict,
            "failed": self.failed,
            "findings": [finding.to_json() for finding in self.findings],
            "tables": {
                name: table.astype(object).where(table.notna(), None).to_dict("records")
                for name, table in self.tables.items()
            },
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
    split_file: Path | None = None,
) -> Audit:
    """Split a data set by a protocol and audit it; without `images` none is read, without `forests` none is fitted."""
    dataset = load_dataset(name, root, description)
    split = split_dataset(dataset, protocol, fold, folds, seed, split_file, allow_leak=True)
    fingerprints = None
    if images:
        used = dataset.with_image[dataset.with_image["image_id"].isin(split["image_id"])]
        fingerprints = fingerprint_files(used, workers)
    return audit_split(dataset, split, fingerprints, forests=forests, workers=workers, protocol=protocol)


def audit_split(
    dataset: Dataset,
    split: pd.DataFrame,
    fingerprints: Fingerprints | None = None,
    *,
    forests: bool = True,
    samples: int = SAMPLES,
    workers: int | None = None,
    protocol: str = "",
) -> Audit:
    """Audit any division (`image_id`, `split`) of a data set; images are compared only if there are `fingerprints`."""
    rows = AuditedRows.of(dataset, split, samples)
    tables: dict[str, pd.DataFrame] = {}
    tables["shared"], findings = shared_ids(dataset, split)
    if fingerprints is not None:
        label = dict(zip(rows.table["image_id"], rows.table["label"], strict=True))
        pairs = near_pairs(fingerprints, workers)
        tables["near_duplicate_pairs"], tables["near_duplicates"], found = near_duplicate_findings(
            rows, pairs, fingerprints.image_ids
        )
        hashed = zip(fingerprints.image_ids, fingerprints.sha256, strict=True)
        same = identical_images((image_id, label[image_id], sha256) for image_id, sha256 in hashed if image_id in label)
        findings += [_compared(rows, fingerprints), *found, *same]
    tables["missing_blocks"], tables["missing_models"], masks = missingness(rows)
    tables["proxies"], columns = label_leaking_columns(rows)
    tables["reidentification"], nearest = reidentification(rows)
    tables["form_alone"], alone = metadata_alone(rows, forests)
    counts = {name: int((rows.splits == name).sum()) for name in ("train", "val", "test")}
    examined = {name: table for name, table in tables.items() if len(table)}
    findings += [*masks, *columns, *nearest, *alone]
    return Audit(dataset.schema.title, protocol, rows.schema.unit, counts, findings, examined)


def shared_ids(dataset: Dataset, split: pd.DataFrame) -> tuple[pd.DataFrame, list[Finding]]:
    """Count, overall and by class, the test images whose patient or lesion is also in train, or train or validation."""
    strict = leakage(dataset, split)
    # Validation counted as seen: then the shares by class count it too.
    wide = leakage(dataset, split.assign(split=split["split"].replace("val", "train")))
    tested = split.loc[split["split"] == "test", "label"]
    counted = []
    for what, leak in strict.items():
        if leak is None:
            continue
        counted.append((what, "all", len(tested), leak["train"], leak["train_or_val"]))
        for label in dataset.schema.classes:
            if label in leak["per_class"]:
                shares = (leak["per_class"][label], wide[what]["per_class"][label])
                counted.append((what, label, int((tested == label).sum()), *shares))
    table = pd.DataFrame(counted, columns=["what", "class", "images", "train", "train_or_val"])
    return table, list(crossing_ids(dataset, split))


def near_duplicate_findings(
    rows: AuditedRows, pairs: pd.DataFrame, compared: Sequence[str]
) -> tuple[pd.DataFrame, pd.DataFrame, list[Finding]]:
    """Find near-duplicates that cross the split, or show one image as two patients or lesions.

    Returns the pairs with `group`, `sides`, `labels` and `other` (what differs by the ids); a table by class; the
    findings.
    """
    table = rows.table.assign(side=rows.splits, unit=rows.groups).set_index("image_id")
    pairs = pairs[pairs["first"].isin(table.index) & pairs["second"].isin(table.index)].reset_index(drop=True)
    one, two = (table.loc[pairs[name]].reset_index() for name in ("first", "second"))
    group = {image_id: index for index, members in enumerate(group_pairs(pairs)) for image_id in members}

    def differ(column: str) -> pd.Series:
        # A missing id differs from none.
        return one[column].notna() & two[column].notna() & (one[column] != two[column])

    kinds = [differ("patient_id"), differ("lesion_id"), one["unit"] != two["unit"]]
    described = pairs.assign(
        group=pairs["first"].map(group).astype(int),
        sides=one["side"] + "/" + two["side"],
        labels=one["label"] + "/" + two["label"],
        other=np.select(kinds, ["patient", "lesion", "unnamed"], ""),
    )
    crossing = (one["side"] == "test") != (two["side"] == "test")
    copied = pd.concat([part.loc[crossing & (part["side"] == "test"), "image_id"] for part in (one, two)])
    test = table[(table["side"] == "test") & table.index.isin(compared)]
    copies = test.index.isin(copied)
    counted = [("all", len(test), int(copies.sum()))]
    for label in rows.classes:
        mine = test["label"] == label
        counted.append((label, int(mine.sum()), int(copies[mine].sum())))
    by_class = pd.DataFrame(counted, columns=["class", "images", "copies"])
    by_class["share"] = by_class["copies"] / by_class["images"].where(by_class["images"] > 0)
    other = described[described["other"] != ""]
    differing = int((one["label"] != two["label"])[other.index].sum())
    findings = [_crossing(described[crossing.to_numpy()], by_class), _other(other, len(pairs), differing)]
    return described, by_class, findings


def _crossing(pairs: pd.DataFrame, by_class: pd.DataFrame) -> Finding:
    copies, share = int(by_class["copies"][0]), float(by_class["share"][0])
    if not copies:
        return Finding("PASS", "near_duplicates", "no test image has a near-duplicate in train or validation")
    classes = ", ".join(f"{row['class']} {row['copies']}" for _, row in by_class[1:].iterrows() if row["copies"])
    message = f"{copies:,} test images ({share:.1%}) have a near-duplicate in train or validation: {classes}"
    return Finding("FAIL" if share > TOLERATED_SHARE else "WARN", "near_duplicates", message, _examples(pairs), copies)


def _other(pairs: pd.DataFrame, total: int, differing: int) -> Finding:
    if not len(pairs):
        message = (
            f"near-duplicates, {total:,} pairs, are all of one patient and lesion" if total else "no near-duplicates"
        )
        return Finding("PASS", "near_duplicates_other", message)
    kinds = {
        "patient": "of different patients",
        "lesion": "of different lesions",
        "unnamed": "of which an image names neither",
    }
    counts = {kind: int((pairs["other"] == kind).sum()) for kind in kinds}
    listed = ", ".join(f"{count:,} {kinds[kind]}" for kind, count in counts.items() if count)
    message = f"{total:,} pairs of near-duplicates, of these {listed} (one image published twice?)"
    message += f", {differing:,} of them under different labels" if differing else ""
    return Finding("WARN", "near_duplicates_other", message, _examples(pairs), len(pairs))


def _examples(pairs: pd.DataFrame) -> tuple[str, ...]:
    return tuple(f"{row.first} ~ {row.second} ({row.sides})" for row in pairs.head(MAX_EXAMPLES).itertuples())


def _compared(rows: AuditedRows, fingerprints: Fingerprints) -> Finding:
    compared, broken = int(rows.table["image_id"].isin(fingerprints.image_ids).sum()), tuple(fingerprints.unreadable)
    missing = len(rows.table) - compared - len(broken)
    message = f"{compared:,} of {len(rows.table):,} images were compared with each other"
    message += f"; {len(broken):,} can't be read" if broken else ""
    message += f"; {missing:,} aren't on this disk, and duplicates among them aren't found" if missing else ""
    level: Level = "WARN" if missing or broken else "PASS"
    return Finding(level, "images_compared", message, broken[:MAX_EXAMPLES], compared)


# Single columns that are printed.
COLUMNS = 8
MEASURE_HEAD = ("Balanced accuracy", "AUC", "AUC, malignant")


def printed_tables(audit: Audit) -> dict[str, PrintedTable]:
    """Return the tables of an audit for the command line and the report, under their names in `Audit.tables`."""
    makers: dict[str, Callable[[pd.DataFrame], PrintedTable]] = {
        "shared": _print_shared,
        "near_duplicates": _print_near_duplicates,
        "missing_blocks": _print_blocks,
        "missing_models": _print_models,
        "proxies": _print_columns,
        "reidentification": _print_nearest,
        "form_alone": lambda table: _print_metadata_alone(table, audit.group),
    }
    return {name: make(audit.tables[name]) for name, make in makers.items() if name in audit.tables}


def _print_shared(table: pd.DataFrame) -> PrintedTable:
    # By class only where there is a leak.
    table = table if table["train_or_val"].any() else table[table["class"] == "all"]
    head = ("Shared", "Class", "Test images", "In train", "In train or validation")
    return PrintedTable("Test images whose patient or lesion crosses the split", head, _cells(table, 2), left=2)


def _print_near_duplicates(table: pd.DataFrame) -> PrintedTable:
    table = table if table["copies"].any() else table[table["class"] == "all"]
    head = ("Class", "Test images", "With a near-duplicate", "Share")
    return PrintedTable("Test images with a near-duplicate in train or validation", head, _cells(table))


def _print_blocks(table: pd.DataFrame) -> PrintedTable:
    # Columns: block, rows, share, the classes, and two of malignancy.
    head = ("Missing together", "Rows", "Share", *table.columns[3:-2], "Malignant if missing", "If not")
    return PrintedTable("Missingness by class", head, _cells(table))


def _print_models(table: pd.DataFrame) -> PrintedTable:
    rows = [[Cell(row["mask"]), Cell(f"{row['rows']:,}"), *_measures(row)] for row in table.to_dict("records")]
    note = (
        "A model that sees only which metadata are missing or unknown, cross-validated. What exceeds an AUC of .5 "
        "comes from how the metadata were collected, not from the patient."
    )
    return PrintedTable("Missingness alone", ("Missing", "Rows", *MEASURE_HEAD), rows, (note,))


def _print_columns(table: pd.DataFrame) -> PrintedTable:
    rows = []
    for row in table.head(COLUMNS).to_dict("records"):
        column, feature = Cell(row["column"], bold=row["verdict"] != "PASS"), Cell("yes" if row["feature"] else "no")
        rows.append([column, feature, Cell(row["verdict"]), *_measures(row)])
    note = (
        f"The {min(COLUMNS, len(table))} strongest of {len(table)} columns, each alone, where it is recorded. A column "
        "that follows from the diagnosis, such as whether a biopsy was taken, must not be a feature."
    )
    return PrintedTable("Single columns", ("Column", "Feature", "Verdict", *MEASURE_HEAD), rows, (note,), left=3)


def _print_nearest(table: pd.DataFrame) -> PrintedTable:
    rows = [[Cell(row["question"]), _interval(row, "value")] for row in table.to_dict("records")]
    return PrintedTable("Nearest metadata", ("Measure", "Value"), rows)


def _print_metadata_alone(table: pd.DataFrame, unit: str) -> PrintedTable:
    ways, rows = list(dict.fromkeys(table["measured"])), []
    for (features, learner), part in table.groupby(["features", "learner"], sort=False):
        cells = {row["measured"]: _interval(row, "balanced_accuracy") for row in part.to_dict("records")}
        rows.append([Cell(str(features)), Cell(str(learner)), *(cells.get(way, Cell("–")) for way in ways)])
    note = "Balanced accuracy of models without the image."
    if unit != "image":
        note += (
            f" “{IMAGES}” puts images of one {unit} into several folds, “{group_folds(unit)}” into one: the difference "
            f"is due to identifying {unit}s by their metadata."
        )
    head = ("Columns", "Learner", *(way.capitalize() for way in ways))
    return PrintedTable("Metadata alone", head, rows, (note,), left=2)


def _cells(table: pd.DataFrame, left: int = 1) -> list[list[Cell]]:
    """Return a row's cells: `left` columns of text, whole numbers, and shares in percent."""
    return [
        [
            Cell(str(value) if place < left else number(value, "," if isinstance(value, int) else ".1%"))
            for place, value in enumerate(row)
        ]
        for row in table.itertuples(index=False, name=None)
    ]


def _interval(row: dict[Any, Any], key: str, prefix: str = "") -> Cell:
    return Cell.estimate(row[key], row[f"{prefix}low"], row[f"{prefix}high"], bounds=".3f")


def _measures(row: dict[Any, Any]) -> list[Cell]:
    return [_interval(row, key, f"{key}_") for key in MEASURES]
