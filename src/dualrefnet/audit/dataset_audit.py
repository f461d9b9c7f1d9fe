"""The audit of a data set and its split: everything that could make a number look better than it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dualrefnet.audit.audited_rows import AuditedRows
from dualrefnet.audit.fingerprints import Fingerprints, fingerprint_files
from dualrefnet.audit.form_alone import form_alone
from dualrefnet.audit.leakage import shared_ids
from dualrefnet.audit.missingness import missingness
from dualrefnet.audit.near_duplicates import near_duplicate_findings, near_pairs
from dualrefnet.audit.proxies import proxies
from dualrefnet.audit.reidentification import reidentification
from dualrefnet.data.adapters import Dataset, load_dataset
from dualrefnet.data.identical import identical_images
from dualrefnet.data.protocols import split_dataset
from dualrefnet.findings import Finding, Level

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
            "dataset": self.dataset, "protocol": self.protocol, "group": self.group, "images": self.images, "verdict": self.verdict,
            "failed": self.failed, "findings": findings, "tables": tables,
        }  # fmt: skip


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
    return audit_split(dataset, split, fingerprints, forests=forests, workers=workers, progress=progress, protocol=protocol)


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
        tables["near_duplicate_pairs"], tables["near_duplicates"], found = near_duplicate_findings(rows, pairs, fingerprints.image_ids)
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
        dataset.schema.title, protocol, rows.schema.unit, counts, findings, {name: table for name, table in tables.items() if len(table)}
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
