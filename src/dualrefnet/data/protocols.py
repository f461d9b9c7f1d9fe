"""Protocols: how the rows of a lesion table become train, validation and test split.

`paper` rebuilds Table 1 of the paper to the row, leaks included. `grouped` and `grouped-cv` keep all rows of one unit
(`DatasetSchema.unit`: a patient; a lesion where no patients are named; else a single image) within one split.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import pandas as pd

from dualrefnet.data.schema import Dataset, groups
from dualrefnet.errors import SplitError

PROTOCOLS = ("paper", "grouped", "grouped-cv")
SPLITS = ("train", "val", "test")
# SHA-256 of the lines `image_id label` as published: the paper's split is of row numbers, so a table in another order
# would silently give another split.
PUBLISHED_ROWS = {
    "pad_ufes_20": "9d794e1efe9000f9664be0983c8a554d6195f94b631629b97ad4081b1c18d2d0",
    "isic_2019": "fa3757a4bc3bd7d3616c4ae195e12def7d14c1b71a35900436fa15f212658df4",
}
SPLIT_COLUMNS = ("image_id", "patient_id", "label", "split")


def split_dataset(
    dataset: Dataset, protocol: str = "grouped", fold: int = 0, folds: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Split a data set.

    All rows of the table are split, those without an image included, so that a patient is in the same split on every
    machine, whichever images lie there.

    Args:
        dataset: the data set.
        protocol: `paper`, `grouped` (fold 0 of the folds) or `grouped-cv`.
        fold: which fold is the test split (`grouped-cv`).
        folds: number of folds; the next one is the validation split.
        seed: shuffles the grouped protocols; the paper's have the paper's seeds.

    Returns:
        Table `image_id, patient_id, label, split` in the order of the lesion table, without the rows that the protocol
        drops; `patient_id` holds the group that is kept together (see `dualrefnet.data.schema.groups`).

    Raises:
        SplitError: the protocol doesn't exist for the data set, or a class has too few groups to be in every split.
    """
    if protocol == "paper":
        splits = _paper_split(dataset)
    elif protocol in ("grouped", "grouped-cv"):
        if not 0 <= fold < folds:
            raise SplitError(f"fold {fold} doesn't exist: there are {folds} folds, counted from 0")
        splits = _grouped_split(dataset, fold if protocol == "grouped-cv" else 0, folds, seed)
    else:
        raise SplitError(f"no protocol is called {protocol!r}; there are: {', '.join(PROTOCOLS)}")
    table = dataset.table.assign(patient_id=groups(dataset.table, dataset.schema), split=splits)
    result = table.loc[splits.notna(), list(SPLIT_COLUMNS)].reset_index(drop=True)
    if protocol != "paper":
        refuse_crossing(result)
    return result


def _paper_split(dataset: Dataset) -> pd.Series:
    """Return train / val / test as in Table 1; None for rows that the paper dropped."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    table, name, title = dataset.table, dataset.schema.name, dataset.schema.title
    if name not in PUBLISHED_ROWS:
        raise SplitError(f"the paper has no split of {title}; use the protocol grouped or grouped-cv")
    if len(table) != dataset.schema.official_rows:
        raise SplitError(
            f"the paper's split needs all {dataset.schema.official_rows} rows of {title} in the published order; "
            f"this table has {len(table)}"
        )
    rows = (table["image_id"] + " " + table["label"]).str.cat(sep="\n")
    if hashlib.sha256(rows.encode()).hexdigest() != PUBLISHED_ROWS[name]:
        raise SplitError(
            f"the rows of {title} aren't in the published order, or ids or labels were changed, and the paper's split "
            "is of row numbers; take the CSV as it was released, or the protocol grouped"
        )
    splits = pd.Series("train", index=table.index, dtype=object)
    if name == "pad_ufes_20":
        # The split published with MetaBlock: the sixth of six folds is test; of the rest, the first of five is
        # validation.
        rest, test = list(StratifiedKFold(6, shuffle=True, random_state=8).split(table, table["label"]))[5]
        inner = StratifiedKFold(5, shuffle=True, random_state=8).split(rest, table["label"].iloc[rest])
        splits.iloc[test], splits.iloc[rest[next(inner)[1]]] = "test", "val"
        return splits
    # ISIC-2019: rows with missing metadata are dropped, the rest is split without stratification.
    complete = table.index[table[["age_approx", "anatom_site_general", "sex"]].notna().all(axis=1)]
    splits[table.index.difference(complete)] = None
    rest, test = train_test_split(complete, test_size=0.2, random_state=42)
    _, val = train_test_split(rest, test_size=0.1, random_state=42)
    splits[test], splits[val] = "test", "val"
    return splits


def _grouped_split(dataset: Dataset, fold: int, folds: int, seed: int) -> pd.Series:
    """Return splits that no group crosses; classes are as even as the groups allow."""
    from sklearn.model_selection import StratifiedGroupKFold

    table, group, unit = dataset.table, groups(dataset.table, dataset.schema), dataset.schema.unit
    for label, count in group.groupby(table["label"]).nunique().items():
        if count < 3:
            raise SplitError(
                f"class {label} has {count} {unit}s; train, validation and test that share no {unit} need at least 3: "
                "add data of this class, or leave the class out of the table"
            )
    if min(group.nunique(), table["label"].value_counts().max()) < folds:
        raise SplitError(f"there are too few {unit}s, or images of any class, for {folds} folds; try fewer folds")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # Classes with fewer images than folds; `missing_classes` tells the user.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        parts = [test for _, test in splitter.split(table, table["label"], group)]
    splits = pd.Series("train", index=table.index, dtype=object)
    splits.iloc[parts[fold]] = "test"
    splits.iloc[parts[(fold + 1) % folds]] = "val"
    lost = sorted(set(table["label"]) - set(table["label"][splits == "train"]))
    if lost:
        raise SplitError(
            f"no training row is left of class {', '.join(lost)}: it has too few {unit}s for {folds} folds; "
            "try fewer folds or another split_seed"
        )
    return splits


def refuse_crossing(split: pd.DataFrame) -> None:
    """Raise a SplitError if a group (column `patient_id`) is in several splits."""
    crossing = int((split.groupby("patient_id")["split"].nunique() > 1).sum())
    if crossing:
        raise SplitError(
            f"{crossing} groups (patients or lesions) are in more than one split; "
            "every number measured on it would be too good. Only the protocol `paper` may do this"
        )


def split_counts(split: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    """Count images: one row a class (and `total`), columns train, val, test."""
    counts = pd.crosstab(split["label"], split["split"])
    counts = counts.reindex(index=list(classes), columns=list(SPLITS), fill_value=0)
    counts.loc["total"] = counts.sum()
    return counts


def missing_classes(split: pd.DataFrame, classes: tuple[str, ...]) -> list[str]:
    """Say which classes have no image in the validation or test split: their metrics will be undefined."""
    counts = split_counts(split, classes).drop(index="total")
    missing = [(label, name) for name in ("val", "test") for label in counts.index[counts[name] == 0]]
    return [f"class {label} has no image in {name}" for label, name in missing]


def leakage(dataset: Dataset, split: pd.DataFrame) -> dict[str, Any]:
    """Measure which share of the test images shows a patient, and which a lesion, that is also in train.

    `{"patient": {"train": .493, "train_or_val": .554, "per_class": {"MEL": .78, ...}}, "lesion": ...}`, with validation
    counted as seen in the second; None for what the data set doesn't name.
    """
    table = split[["image_id", "split"]].merge(dataset.table, on="image_id", how="left", validate="one_to_one")
    in_test, in_train = table["split"] == "test", table["split"] == "train"
    result: dict[str, Any] = {}
    for name in ("patient", "lesion"):
        ids = table[f"{name}_id"]
        if ids.isna().all():
            result[name] = None
            continue
        seen = ids.isin(ids[in_train].dropna())[in_test]
        seen_or_val = ids.isin(ids[~in_test].dropna())[in_test]
        total = max(len(seen), 1)
        result[name] = {
            "train": float(seen.sum() / total),
            "train_or_val": float(seen_or_val.sum() / total),
            "per_class": {label: float(rows.mean()) for label, rows in seen.groupby(table["label"])},
        }
    return result
