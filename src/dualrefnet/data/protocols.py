"""Protocols: how the rows of a lesion table become train, validation and test.

`paper` rebuilds Table 1 of the paper to the row, leaks included. `grouped` and `grouped-cv` never put one patient (for
ISIC-2019: one lesion) on two sides.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

from dualrefnet.data.adapters import Dataset
from dualrefnet.data.schema import groups
from dualrefnet.errors import SplitError

PROTOCOLS = ("paper", "grouped", "grouped-cv")
SPLITS = ("train", "val", "test")
# SHA-256 of the lines `image_id label` as published: the paper's split is of row numbers, so a table in another order
# would give another split without a word.
PUBLISHED_ROWS = {
    "pad_ufes_20": "9d794e1efe9000f9664be0983c8a554d6195f94b631629b97ad4081b1c18d2d0",
    "isic_2019": "fa3757a4bc3bd7d3616c4ae195e12def7d14c1b71a35900436fa15f212658df4",
}
SPLIT_COLUMNS = ("image_id", "patient_id", "label", "split")


def split_dataset(
    dataset: Dataset, protocol: str = "grouped", fold: int = 0, folds: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Divide a data set.

    The division is made over all rows of the table, those without an image included, so that a person is on the same
    side on every machine, whichever images lie there.

    Args:
        dataset: the data set.
        protocol: `paper`, `grouped` (fold 0 of the folds) or `grouped-cv`.
        fold: which fold is the test set (`grouped-cv`).
        folds: number of folds; the next one is the validation set.
        seed: shuffles the grouped protocols; the paper's have the paper's seeds.

    Returns:
        Table with the columns `image_id, patient_id, label, split`, in the order of the lesion table; `patient_id`
        holds
        the group that the protocol keeps together (for ISIC-2019 the lesion). Rows that the protocol leaves out are
        left out.

    Raises:
        SplitError: the protocol doesn't exist for the data set, or a class has too few groups to be on every side.
    """
    if protocol == "paper":
        sides = _paper_sides(dataset)
    elif protocol in ("grouped", "grouped-cv"):
        if not 0 <= fold < folds:
            raise SplitError(f"fold {fold} doesn't exist: there are {folds} folds and they count from 0")
        sides = _grouped_sides(dataset, fold if protocol == "grouped-cv" else 0, folds, seed)
    else:
        raise SplitError(f"no protocol is called {protocol!r}; there are: {', '.join(PROTOCOLS)}")
    split = pd.DataFrame(
        {
            "image_id": dataset.table["image_id"],
            "patient_id": groups(dataset.table, dataset.schema),
            "label": dataset.table["label"],
            "split": sides,
        }
    )
    split = split[split["split"].notna()].reset_index(drop=True)
    if protocol != "paper":
        refuse_crossing(split)
    return split


def _paper_sides(dataset: Dataset) -> pd.Series:
    """Return train / val / test as in Table 1; None for rows that the paper dropped."""
    table, name = dataset.table, dataset.schema.name
    if name not in PUBLISHED_ROWS:
        raise SplitError(f"the paper has no split of {dataset.schema.title}; use the protocol grouped or grouped-cv")
    if len(table) != dataset.schema.official_rows:
        raise SplitError(
            f"the paper's split needs all {dataset.schema.official_rows} rows of {dataset.schema.title} in the published order; "
            f"this table has {len(table)}"
        )
    rows = (table["image_id"] + " " + table["label"]).str.cat(sep="\n")
    if hashlib.sha256(rows.encode()).hexdigest() != PUBLISHED_ROWS[name]:
        raise SplitError(
            f"the rows of {dataset.schema.title} aren't in the published order, or ids or labels were changed, and the paper's split "
            "is of row numbers; take the CSV as it was released, or the protocol grouped"
        )
    sides = pd.Series("train", index=table.index, dtype=object)
    if name == "pad_ufes_20":
        # The split published with MetaBlock: the sixth of six folds is test; of the rest, the first of five is
        # validation.
        rest, test = list(StratifiedKFold(6, shuffle=True, random_state=8).split(table, table["label"]))[5]
        inner = StratifiedKFold(5, shuffle=True, random_state=8).split(rest, table["label"].iloc[rest])
        val = rest[next(inner)[1]]
        sides.iloc[test], sides.iloc[val] = "test", "val"
        return sides
    # ISIC-2019: rows with a gap are dropped, the rest is divided without stratification.
    complete = table.index[table[["age_approx", "anatom_site_general", "sex"]].notna().all(axis=1)]
    sides[table.index.difference(complete)] = None
    rest, test = train_test_split(complete, test_size=0.2, random_state=42)
    _, val = train_test_split(rest, test_size=0.1, random_state=42)
    sides[test], sides[val] = "test", "val"
    return sides


def _grouped_sides(dataset: Dataset, fold: int, folds: int, seed: int) -> pd.Series:
    """Return sides such that no group crosses; classes are as even as the groups allow."""
    table, group = dataset.table, groups(dataset.table, dataset.schema)
    per_class = group.groupby(table["label"]).nunique()
    kind = f"{dataset.schema.unit}s"
    for label, count in per_class.items():
        if count < 3:
            raise SplitError(
                f"class {label} has {count} {kind}; train, validation and test that share no {kind[:-1]} need at least 3: "
                "add data of this class, or leave the class out of the table"
            )
    if group.nunique() < folds:
        raise SplitError(f"{group.nunique()} {kind} can't make {folds} folds")
    if table["label"].value_counts().max() < folds:
        raise SplitError(f"no class has {folds} images, so there can't be {folds} folds; try fewer folds")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # Classes with fewer images than folds; `missing_sides` says it in the user's words.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        parts = [test for _, test in splitter.split(table, table["label"], group)]
    sides = pd.Series("train", index=table.index, dtype=object)
    sides.iloc[parts[fold]] = "test"
    sides.iloc[parts[(fold + 1) % folds]] = "val"
    lost = sorted(set(table["label"]) - set(table["label"][sides == "train"]))
    if lost:
        raise SplitError(
            f"no training row is left of class {', '.join(lost)}: it has too few {kind} for {folds} folds; "
            "try fewer folds or another split_seed"
        )
    return sides


def refuse_crossing(split: pd.DataFrame) -> None:
    """Refuse a split in which a group is on two sides.

    Raises:
        SplitError: naming how many groups cross.
    """
    sides = split.groupby("patient_id")["split"].nunique()
    crossing = sides[sides > 1]
    if len(crossing):
        raise SplitError(
            f"{len(crossing)} patients (groups) are on more than one side of the split; "
            "every number measured on it would be too good. Only the protocol `paper` may do this"
        )


def split_counts(split: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    """Count images: one row a class (and `total`), columns train, val, test."""
    counts = pd.crosstab(split["label"], split["split"]).reindex(
        index=list(classes), columns=list(SPLITS), fill_value=0
    )
    counts.loc["total"] = counts.sum()
    return counts


def missing_sides(split: pd.DataFrame, classes: tuple[str, ...]) -> list[str]:
    """Say which classes have no image in validation or test: measures of them will be undefined."""
    counts = split_counts(split, classes).drop(index="total")
    return [
        f"class {label} has no image in {side}" for side in ("val", "test") for label in counts.index[counts[side] == 0]
    ]


def leakage(dataset: Dataset, split: pd.DataFrame) -> dict[str, Any]:
    """Measure what the training side gives away about the test side.

    Returns:
        `patient` and `lesion`, each None if the data set doesn't name them, else the share of test images whose patient
        or lesion is also in train, overall, with validation counted as seen, and by class:
        `{"train": .493, "train_or_val": .554, "per_class": {"MEL": .78, ...}}`.
    """
    table = split[["image_id", "split"]].merge(dataset.table, on="image_id", how="left", validate="one_to_one")
    result: dict[str, Any] = {}
    for name in ("patient", "lesion"):
        ids = table[f"{name}_id"]
        if ids.isna().all():
            result[name] = None
            continue
        test = table["split"] == "test"
        seen = test & ids.isin(ids[table["split"] == "train"].dropna())
        seen_or_val = test & ids.isin(ids[~test].dropna())
        per_class = {
            label: float(seen[rows].sum() / len(rows)) for label, rows in table[test].groupby("label").groups.items()
        }
        total = max(int(test.sum()), 1)
        result[name] = {
            "train": float(seen.sum() / total),
            "train_or_val": float(seen_or_val.sum() / total),
            "per_class": per_class,
        }
    return result
