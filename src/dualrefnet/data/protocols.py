"""Protocols: how the rows of a lesion table become train, validation and test split.

`paper` rebuilds Table 1 of the paper to the row, leaks included. `grouped` and `grouped-cv` keep all rows of one unit
(`DatasetSchema.unit`: a patient; a lesion where no patients are named; else a single image) within one split.
`cross-fitted` divides all rows into folds, each of which is the test split of one model; `all` has one fold for
validation, and no test split. `own` is what the user says.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualrefnet.data.csv_table import read_csv
from dualrefnet.data.images import IMAGE_COLUMNS, ImageIndex
from dualrefnet.data.schema import Dataset, groups, require_columns
from dualrefnet.errors import SplitError
from dualrefnet.progress import note
from dualrefnet.runtime.metadata import read_cell

if TYPE_CHECKING:
    import pandas as pd

PROTOCOLS = ("paper", "grouped", "grouped-cv", "cross-fitted", "all", "own")
SPLITS = ("train", "val", "test")
# SHA-256 of the lines `image_id label` as published: the paper's split is of row numbers, so a table in another order
# would silently give another split.
PUBLISHED_ROWS = {
    "pad_ufes_20": "9d794e1efe9000f9664be0983c8a554d6195f94b631629b97ad4081b1c18d2d0",
    "isic_2019": "fa3757a4bc3bd7d3616c4ae195e12def7d14c1b71a35900436fa15f212658df4",
}
SPLIT_COLUMNS = ("image_id", "patient_id", "label", "split")
# A further column of cross-fitted runs.
FOLD = "fold"


def split_dataset(
    dataset: Dataset,
    protocol: str = "grouped",
    fold: int = 0,
    folds: int = 5,
    seed: int = 0,
    split_file: Path | str | None = None,
    allow_leak: bool = False,
) -> pd.DataFrame:
    """Split a data set.

    All rows of the table are split, those without an image included, so that a patient is in the same split on every
    machine, whichever images lie there.

    Args:
        dataset: the data set.
        protocol: `paper`, `grouped` (fold 0 of the folds), `grouped-cv`, `cross-fitted`, `all` or `own`.
        fold: which fold is the test split (`grouped-cv`).
        folds: number of folds; the next one is the validation split.
        seed: shuffles the grouped protocols; the paper's have the paper's seeds.
        split_file: of `own`, a CSV with the columns `image_id` and `split`; None: the split that the data set names.
        allow_leak: of `own`, let a patient be in several splits.

    Returns:
        Table `image_id, patient_id, label, split` in the order of the lesion table, without the rows that the protocol
        drops; `patient_id` holds the group that is kept together (see `dualrefnet.data.schema.groups`). Of
        `cross-fitted` all rows are `test`, and the column `fold` says of which model (see `member_split`).

    Raises:
        SplitError: the protocol doesn't exist for the data set, a class has too few groups to be in every split, or
            `own` names an unknown image or split, or has a patient in several.
    """
    import pandas as pd

    check_protocol(dataset, protocol, fold, folds, split_file, allow_leak)
    columns = list(SPLIT_COLUMNS)
    fold_of = pd.Series(0, index=dataset.table.index)
    if protocol == "paper":
        splits = _paper_split(dataset)
    elif protocol == "cross-fitted":
        splits = pd.Series("test", index=dataset.table.index)
        fold_of, columns = _folds(dataset, folds, seed), [*columns, FOLD]
    elif protocol == "all":
        splits = pd.Series("train", index=dataset.table.index).mask(_folds(dataset, folds, seed) == 0, "val")
    elif protocol == "own":
        splits = _own_split(dataset, split_file, allow_leak)
        if splits.isna().any():
            note(f"{int(splits.isna().sum()):,} of {len(splits):,} rows are in no split and are left out")
    else:
        splits = _grouped_split(dataset, fold if protocol == "grouped-cv" else 0, folds, seed)
    table = dataset.table.assign(patient_id=groups(dataset.table, dataset.schema), split=splits, fold=fold_of)
    result = table.loc[splits.notna(), columns].reset_index(drop=True)
    if protocol not in ("paper", "own"):
        refuse_crossing(result)
    return result


def check_protocol(
    dataset: Dataset,
    protocol: str = "grouped",
    fold: int = 0,
    folds: int = 5,
    split_file: Path | str | None = None,
    allow_leak: bool = False,
) -> None:
    """Refuse a data set that a protocol can't divide; SplitError says why. Takes no time: nothing is divided."""
    if protocol not in PROTOCOLS:
        raise SplitError(f"no protocol is called {protocol!r}; there are: {', '.join(PROTOCOLS)}")
    if protocol == "own":
        _own_split(dataset, split_file, allow_leak)
        return
    if protocol == "paper":
        _check_published(dataset)
        return
    if not 0 <= fold < folds:
        raise SplitError(f"fold {fold} doesn't exist: there are {folds} folds, counted from 0")
    table, group, unit = dataset.table, groups(dataset.table, dataset.schema), dataset.schema.unit
    for label, count in group.groupby(table["label"]).nunique().items():
        if count < 3:
            raise SplitError(
                f"class {label} has {count} {unit}s; train, validation and test that share no {unit} need at least 3: "
                "add data of this class, or leave the class out of the table"
            )
    if min(group.nunique(), table["label"].value_counts().max()) < folds:
        raise SplitError(f"there are too few {unit}s, or images of any class, for {folds} folds; try fewer folds")


def _own_split(dataset: Dataset, file: Path | str | None, allow_leak: bool) -> pd.Series:
    """Return the splits that the user names; None for rows that are in none."""
    import pandas as pd

    ids, title = dataset.table["image_id"], dataset.schema.title
    if file is not None:
        table = read_csv(Path(file))
        column = next((name for name in IMAGE_COLUMNS if name in table), "image_id")
        require_columns(table, [column, "split"], str(file))
        index = ImageIndex((image_id, image_id) for image_id in ids)
        found = pd.Series([index.find(read_cell(name) or "") for name in table[column]], dtype=object)
        for wrong, what in ((found.isna(), f"are not in {title}"), (found.duplicated(), "stand there twice")):
            if wrong.any():
                first = table[column][wrong].iloc[0]
                raise SplitError(f"{int(wrong.sum())} images of {file} {what}, the first: {first}; correct the file")
        named = ids.map(dict(zip(found, table["split"], strict=True)))
    elif dataset.own_split is not None:
        named = dataset.own_split
    else:
        raise SplitError(
            f"{title} names no split: give data.split_file=CSV (columns image_id and split), or for a csv_table "
            "`split: COLUMN` in its description"
        )
    splits = named.map(read_cell).str.casefold().astype(object)
    others = splits.notna() & ~splits.isin(SPLITS)
    if others.any():
        raise SplitError(
            f"the split of image {ids[others].iloc[0]} is {named[others].iloc[0]!r}, and a split is train, val or "
            f"test; {int(others.sum())} rows have another word"
        )
    lost = [name for name in SPLITS if not (splits == name).any()]
    if lost:
        raise SplitError(
            f"no row is in {' or '.join(lost)}: training needs train, val (it chooses the epoch and calibrates) and "
            "test; make one of a part of train"
        )
    if not allow_leak:
        refuse_crossing(pd.DataFrame({"patient_id": groups(dataset.table, dataset.schema), "split": splits}))
    return splits


def _check_published(dataset: Dataset) -> None:
    """Refuse whatever isn't the table that the paper divided."""
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


def _paper_split(dataset: Dataset) -> pd.Series:
    """Return train / val / test as in Table 1; None for rows that the paper dropped."""
    import pandas as pd
    from sklearn.model_selection import StratifiedKFold, train_test_split

    table = dataset.table
    splits = pd.Series("train", index=table.index, dtype=object)
    if dataset.schema.name == "pad_ufes_20":
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


def member_split(split: pd.DataFrame, fold: int, chooses: bool) -> pd.DataFrame:
    """Return the split of the model that is tested on a fold, from the split of a `cross-fitted` run.

    It is watched on its own fold (`val`). One that `chooses` by validation does so on the next fold, and its own stays
    unseen.
    """
    import pandas as pd

    folds = int(split[FOLD].max()) + 1
    names = pd.Series("train", index=split.index)
    names[split[FOLD] == fold] = "test" if chooses else "val"
    if chooses:
        names[split[FOLD] == (fold + 1) % folds] = "val"
    return split.assign(split=names)[list(SPLIT_COLUMNS)]


def _grouped_split(dataset: Dataset, fold: int, folds: int, seed: int) -> pd.Series:
    """Return splits that no group crosses; classes are as even as the groups allow."""
    import pandas as pd

    fold_of = _folds(dataset, folds, seed)
    splits = pd.Series("train", index=fold_of.index, dtype=object)
    splits[fold_of == fold] = "test"
    splits[fold_of == (fold + 1) % folds] = "val"
    lost = sorted(set(dataset.table["label"]) - set(dataset.table["label"][splits == "train"]))
    if lost:
        raise SplitError(
            f"no training row is left of class {', '.join(lost)}: it has too few {dataset.schema.unit}s for {folds} "
            "folds; try fewer folds or another split_seed"
        )
    return splits


def _folds(dataset: Dataset, folds: int, seed: int) -> pd.Series:
    """Return the fold of every row; no group is in two, and classes are as even as the groups allow."""
    import pandas as pd
    from sklearn.model_selection import StratifiedGroupKFold

    table, group = dataset.table, groups(dataset.table, dataset.schema)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # Classes with fewer images than folds; `missing_classes` tells the user.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        parts = [test for _, test in splitter.split(table, table["label"], group)]
    fold_of = pd.Series(0, index=table.index)
    for fold, part in enumerate(parts):
        fold_of.iloc[part] = fold
    return fold_of


def refuse_crossing(split: pd.DataFrame) -> None:
    """Raise a SplitError if a group (column `patient_id`) is in several splits or folds."""
    crossing = crossing_groups(split)
    if crossing:
        raise SplitError(
            f"{len(crossing)} groups (patients or lesions) are in more than one {FOLD if FOLD in split else 'split'}, "
            f"the first: {crossing[0]}; every number measured on it would be too good. Only the protocol `paper` may "
            "do this, and `own` with data.allow_leak=true"
        )


def crossing_groups(split: pd.DataFrame) -> list[str]:
    """Return the groups (column `patient_id`) that are in several splits or folds."""
    counts = split.groupby("patient_id")[FOLD if FOLD in split else "split"].nunique()
    return list(counts.index[counts > 1])


def leak_remarks(split: pd.DataFrame, unit: str) -> list[str]:
    """Say that groups are in several splits; nothing if none is."""
    crossing = len(crossing_groups(split))
    said = f"{crossing} {unit}s are in more than one split (data.allow_leak): the numbers are too high for new {unit}s"
    return [said] if crossing else []


def split_parts(split: pd.DataFrame) -> dict[str, pd.Series]:
    """Return which rows are in train, val and, if there is one, test; or in each fold."""
    if FOLD not in split:
        # A run that has been trained on all has no test split.
        names = SPLITS if (split["split"] == "test").any() or split.empty else SPLITS[:2]
        return {name: split["split"] == name for name in names}
    return {f"fold {fold}": split[FOLD] == fold for fold in range(int(split[FOLD].max()) + 1)}


def split_counts(split: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    """Count images: one row a class (and `total`), columns train, val, test, or the folds."""
    import pandas as pd

    counts = pd.DataFrame({name: split.loc[rows, "label"].value_counts() for name, rows in split_parts(split).items()})
    counts = counts.reindex(index=list(classes)).fillna(0).astype(int)
    counts.loc["total"] = counts.sum()
    return counts


def missing_classes(split: pd.DataFrame, classes: tuple[str, ...]) -> list[str]:
    """Say which classes have no image in the validation or test split, or a fold: their metrics will be undefined."""
    counts = split_counts(split, classes).drop(index="total")
    sides = [name for name in counts if name != "train"]
    missing = [(label, name) for name in sides for label in counts.index[counts[name] == 0]]
    return [f"class {label} has no image in {name}" for label, name in missing]


def leakage(dataset: Dataset, split: pd.DataFrame) -> dict[str, Any]:
    """Measure which share of the test images shows a patient, and which a lesion, that is also in train.

    `train_or_val` counts validation as seen; None stands for what the data set doesn't name.
    """
    table = split.drop(columns=["patient_id", "label"])
    table = table.merge(dataset.table, on="image_id", how="left", validate="one_to_one")
    in_test, in_train = table["split"] == "test", table["split"] == "train"
    result: dict[str, Any] = {}
    for name in ("patient", "lesion"):
        ids = table[f"{name}_id"]
        if ids.isna().all():
            result[name] = None
            continue
        if FOLD in table:
            # The model of a fold has been trained on all others.
            seen = seen_or_val = table.groupby(f"{name}_id")[FOLD].transform("nunique") > 1
        else:
            seen = ids.isin(ids[in_train].dropna())[in_test]
            seen_or_val = ids.isin(ids[~in_test].dropna())[in_test]
        total = max(len(seen), 1)
        result[name] = {
            "train": float(seen.sum() / total),
            "train_or_val": float(seen_or_val.sum() / total),
            "per_class": {label: float(rows.mean()) for label, rows in seen.groupby(table["label"])},
        }
    return result
