from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dualrefnet.data import isic_2019, pad_ufes_20
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.protocols import leakage, refuse_crossing, split_counts, split_dataset
from dualrefnet.data.schema import Dataset, DatasetSchema, groups, normalise
from dualrefnet.data.synthetic import MISSING_TOGETHER
from dualrefnet.errors import SplitError

pytestmark = pytest.mark.filterwarnings("ignore:The least populated class:UserWarning")


some_tables = settings(max_examples=25, suppress_health_check=[HealthCheck.filter_too_much])


def dataset(rows, group_by="patient_id"):
    """Make a data set of (label, group) pairs."""
    table = pd.DataFrame(rows, columns=["label", group_by]).assign(image_path=None)
    table["image_id"] = [f"i{number}" for number in range(len(table))]
    table["lesion_id" if group_by == "patient_id" else "patient_id"] = None
    schema = DatasetSchema(name="t", title="T", classes=tuple(sorted(set(table["label"]))), group_by=group_by)
    return Dataset(normalise(table, schema)[0], schema, Path())


def even(classes="ABC", patients=12, images=2):
    return dataset(
        [(label, f"{label}{person}") for label in classes for person in range(patients) for _ in range(images)]
    )


@st.composite
def tables(draw):
    """Tables in which patients have several images, some of several classes, and some rows name no patient."""
    classes = "ABCD"[: draw(st.integers(2, 4))]
    rows = [(label, f"{label}{person}") for label in classes for person in range(draw(st.integers(3, 10)))]
    people = [person for _, person in rows]
    extra = st.tuples(st.sampled_from(classes), st.sampled_from([*people, None]))
    return draw(st.permutations(rows + draw(st.lists(extra, max_size=40))))


def split_or_reject(data, *arguments, **options):
    """Split, or reject a table that can't be split for a reason that the user is told."""
    try:
        return split_dataset(data, *arguments, **options)
    except SplitError as error:
        said = str(error)
    assert "folds" in said
    assume(False)


@some_tables
@given(rows=tables(), folds=st.integers(3, 6), seed=st.integers(0, 1000))
def test_a_grouped_split_has_every_row_once_no_group_in_two_splits_and_leaks_nothing(rows, folds, seed):
    data = dataset(rows)
    split = split_or_reject(data, "grouped", folds=folds, seed=seed)
    assert list(split["image_id"]) == list(data.table["image_id"])
    assert set(split["split"]) == {"train", "val", "test"}
    assert (split["split"].groupby(groups(data.table, data.schema)).nunique() == 1).all()
    assert set(split["label"][split["split"] == "train"]) == set(data.schema.classes)
    shares = leakage(data, split)["patient"]
    assert shares["train"] == shares["train_or_val"] == max(shares["per_class"].values()) == 0


@some_tables
@given(rows=tables(), folds=st.integers(3, 5), seed=st.integers(0, 1000))
def test_over_the_folds_each_row_is_test_once_and_validation_once(rows, folds, seed):
    data = dataset(rows)
    splits = [split_or_reject(data, "grouped-cv", fold, folds, seed) for fold in range(folds)]
    for name in ("test", "val"):
        counts = Counter(image for split in splits for image in split["image_id"][split["split"] == name])
        assert counts == dict.fromkeys(data.table["image_id"], 1)


def test_classes_are_even_over_the_splits():
    counts = split_counts(split_dataset(even(patients=20, images=1)), ("A", "B", "C"))
    assert counts.loc[["A", "B", "C"]].to_numpy().tolist() == [[12, 4, 4]] * 3
    assert counts.loc["total"].tolist() == [36, 12, 12]


def test_lesions_stay_together_and_rows_without_one_stand_alone():
    rows = [(label, f"{label}{number}") for label in "AB" for number in range(10) for _ in range(3)]
    split = split_dataset(dataset([*rows, *[("A", None)] * 20], "lesion_id"))
    assert split["patient_id"].nunique() == 40
    assert split.groupby("patient_id")["split"].nunique().max() == 1
    assert split["split"][60:].nunique() > 1


def test_images_of_one_lesion_stay_together_where_the_patient_is_not_known():
    data = dataset([(label, None) for label in "AB" for _ in range(30)])
    lesions = data.table.assign(lesion_id=[f"L{row // 3}" for row in range(60)])
    split = split_dataset(Dataset(lesions, data.schema, Path()))
    assert (split["split"].groupby(lesions["lesion_id"]).nunique() == 1).all()
    assert leakage(Dataset(lesions, data.schema, Path()), split)["lesion"]["train_or_val"] == 0


def test_rows_without_an_image_are_split_too_so_that_a_patient_is_in_one_split_everywhere():
    data = even()
    here = data.table.assign(image_path=["/x.png" if row % 3 else None for row in range(len(data.table))])
    pd.testing.assert_frame_equal(split_dataset(data), split_dataset(Dataset(here, data.schema, Path())))


def test_a_class_that_the_folds_leave_without_training_rows_is_named():
    # One of the three patients of B has most of its images; under this seed the folds put all three aside.
    counts = {("B", "b0"): 4, ("B", "b1"): 1, ("B", "b2"): 1, ("A", "b1"): 3, ("A", "b2"): 3}
    counts |= {("A", f"a{number}"): size for number, size in enumerate([1, 1, 1, 2, 2, 1])}
    rows = [row for row, images in counts.items() for _ in range(images)]
    said = set()
    for seed in range(20):
        try:
            split = split_dataset(dataset(rows), folds=3, seed=seed)
            assert "B" in set(split["label"][split["split"] == "train"])
        except SplitError as error:
            said.add(str(error))
    assert len(said) == 1
    assert "no training row is left of class B: it has too few patients for 3 folds" in said.pop()


def test_the_papers_split_is_refused_for_other_data_and_for_a_table_that_is_not_whole():
    with pytest.raises(SplitError, match="the paper has no split of T; use the protocol grouped"):
        split_dataset(even(), "paper")
    for adapter, rows in ((pad_ufes_20, 2298), (isic_2019, 25331)):
        data = Dataset(even().table, adapter.SCHEMA, Path())
        with pytest.raises(SplitError, match=f"needs all {rows} rows of .* in the published order; this table has 72"):
            split_dataset(data, "paper")


def by_hand():
    splits = {"a": "train", "b": "train", "c": "val", "d": "test", "e": "test", "f": "test", "g": "test"}
    table = pd.DataFrame(
        {
            "image_id": list(splits),
            "image_path": None,
            "label": ["A", "B", "A", "A", "A", "B", "B"],
            "patient_id": ["P1", "P2", "P3", "P1", "P3", "P4", None],
            "lesion_id": ["L1", None, "L3", "L1", "L9", None, None],
        }
    )
    schema = DatasetSchema(name="t", title="T", classes=("A", "B"))
    data = Dataset(normalise(table, schema)[0], schema, Path())
    split = pd.DataFrame(
        {"image_id": list(splits), "patient_id": table["patient_id"], "label": table["label"], "split": splits.values()}
    )
    return data, split


def test_leakage_of_a_table_by_hand():
    data, split = by_hand()
    assert leakage(data, split) == {
        "patient": {"train": 0.25, "train_or_val": 0.5, "per_class": {"A": 0.5, "B": 0.0}},
        "lesion": {"train": 0.25, "train_or_val": 0.25, "per_class": {"A": 0.5, "B": 0.0}},
    }


def test_a_crossing_group_is_refused():
    _, split = by_hand()
    with pytest.raises(SplitError, match=r"2 groups .* in more than one split"):
        refuse_crossing(split)
    refuse_crossing(split[split["split"] == "test"])


# Rows of train, val and test.
# fmt: off
TABLE_1_PAD = {
    "BCC": (563, 141, 141), "SEK": (157, 39, 39), "ACK": (486, 122, 122), "SCC": (128, 32, 32), "NEV": (163, 41, 40),
    "MEL": (35, 8, 9), "total": (1532, 383, 383),
}
TABLE_1_ISIC = {
    "BCC": (2337, 262, 646), "AK": (591, 72, 182), "SCC": (458, 43, 121), "NV": (7642, 871, 2119),
    "MEL": (3171, 343, 832), "BKL": (1667, 177, 489), "DF": (168, 20, 47), "VASC": (151, 11, 60),
    "total": (16185, 1799, 4496),
}
LEAKED_ISIC = {
    "AK": 0.857, "MEL": 0.804, "BCC": 0.779, "SCC": 0.727, "DF": 0.723, "BKL": 0.669, "VASC": 0.667, "NV": 0.495,
}
# fmt: on


# Against the published CSVs; the numbers of Table 1 are the paper's own.


@pytest.fixture(scope="module")
def pad(real_pad):
    return load_dataset("pad_ufes_20", real_pad)


@pytest.fixture(scope="module")
def isic(real_isic):
    return load_dataset("isic_2019", real_isic)


@pytest.mark.parametrize(("name", "table_1"), [("pad", TABLE_1_PAD), ("isic", TABLE_1_ISIC)])
def test_table_1_to_the_row(name, table_1, request):
    data = request.getfixturevalue(name)
    counts = split_counts(split_dataset(data, "paper"), data.schema.classes)[["train", "val", "test"]]
    assert {label: tuple(row) for label, *row in counts.itertuples()} == table_1


def test_half_of_the_papers_pad_test_images_show_a_patient_of_training(pad):
    shares = leakage(pad, split_dataset(pad, "paper"))
    assert [round(shares["patient"][seen], 3) for seen in ("train", "train_or_val")] == [0.493, 0.554]
    assert [round(shares["lesion"][seen], 3) for seen in ("train", "train_or_val")] == [0.227, 0.292]
    per_class = pd.DataFrame({name: shares[name]["per_class"] for name in shares}).mul(100).round().astype(int)
    assert per_class["patient"].to_dict() == {"ACK": 41, "BCC": 56, "MEL": 78, "NEV": 42, "SCC": 56, "SEK": 46}
    assert per_class["lesion"].to_dict() == {"ACK": 18, "BCC": 25, "MEL": 56, "NEV": 15, "SCC": 28, "SEK": 26}


def test_two_thirds_of_the_papers_isic_test_images_show_a_lesion_of_training(isic):
    shares = leakage(isic, split_dataset(isic, "paper"))
    assert shares["patient"] is None
    assert [round(shares["lesion"][seen], 3) for seen in ("train", "train_or_val")] == [0.637, 0.661]
    assert shares["lesion"]["per_class"] == pytest.approx(LEAKED_ISIC, abs=5e-4)


def test_thirteen_columns_of_pad_are_missing_together_and_never_for_a_cancer(pad):
    missing = pad.table[list(MISSING_TOGETHER)].isna()
    gap = missing["smoke"]
    assert gap.sum() == 804
    # Where the father's or mother's family came from is missing for some others too.
    assert missing[gap].all(axis=None)
    assert not missing[~gap].drop(columns=["background_father", "background_mother"]).any(axis=None)
    shares = gap.groupby(pad.table["label"]).mean().mul(100).round(1)
    assert shares.to_dict() == {"ACK": 61.2, "BCC": 0, "MEL": 0, "NEV": 69.3, "SCC": 0, "SEK": 80.0}
    assert pad.table["label"][~gap].isin(pad.schema.malignant).mean() == pytest.approx(0.729, abs=5e-4)
