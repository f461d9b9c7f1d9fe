from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dualrefnet.data import isic_2019, pad_ufes_20
from dualrefnet.data.protocols import leakage, missing_classes, refuse_crossing, split_counts, split_dataset
from dualrefnet.data.schema import Dataset, DatasetSchema, groups, normalise
from dualrefnet.errors import SplitError

pytestmark = pytest.mark.filterwarnings("ignore:The least populated class:UserWarning")


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


def divide(data, *arguments, **options):
    """Split, or reject a table that can't be split for a reason that the user is told."""
    try:
        return split_dataset(data, *arguments, **options)
    except SplitError as error:
        said = str(error)
    assert "folds" in said
    assume(False)


@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)
@given(rows=tables(), folds=st.integers(3, 6), seed=st.integers(0, 1000))
def test_a_grouped_split_has_every_row_once_and_no_group_on_two_sides(rows, folds, seed):
    data = dataset(rows)
    split = divide(data, "grouped", folds=folds, seed=seed)
    assert list(split["image_id"]) == list(data.table["image_id"])
    assert set(split["split"]) == {"train", "val", "test"}
    sides = {}
    for group, side in zip(groups(data.table, data.schema), split["split"], strict=True):
        assert sides.setdefault(group, side) == side
    assert set(split["label"][split["split"] == "train"]) == set(data.schema.classes)


@settings(max_examples=25, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)
@given(rows=tables(), folds=st.integers(3, 5), seed=st.integers(0, 1000))
def test_over_the_folds_each_row_is_test_once_and_validation_once(rows, folds, seed):
    data = dataset(rows)
    splits = [divide(data, "grouped-cv", fold, folds, seed) for fold in range(folds)]
    for side in ("test", "val"):
        counts = Counter(image for split in splits for image in split["image_id"][split["split"] == side])
        assert counts == dict.fromkeys(data.table["image_id"], 1)


def test_grouped_is_the_first_fold_of_grouped_cv():
    data = even()
    pd.testing.assert_frame_equal(split_dataset(data, "grouped", seed=4), split_dataset(data, "grouped-cv", 0, 5, 4))


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    data = even(patients=30)
    first, again, other = (split_dataset(data, seed=seed) for seed in (3, 3, 4))
    pd.testing.assert_frame_equal(first, again)
    assert (first["split"] != other["split"]).any()


def test_classes_are_even_over_the_sides():
    counts = split_counts(split_dataset(even(patients=20, images=1)), ("A", "B", "C"))
    assert counts.loc[["A", "B", "C"]].to_numpy().tolist() == [[12, 4, 4]] * 3
    assert counts.loc["total"].tolist() == [36, 12, 12]


def test_isic_lesions_stay_together_and_rows_without_one_stand_alone():
    rows = [(label, f"{label}{number}") for label in "AB" for number in range(10) for _ in range(3)] + [
        ("A", None)
    ] * 20
    split = split_dataset(dataset(rows, "lesion_id"))
    assert split["patient_id"].nunique() == 40
    assert split.groupby("patient_id")["split"].nunique().max() == 1
    assert split["split"][60:].nunique() > 1


def test_rows_without_an_image_are_divided_too_so_that_a_person_is_on_one_side_everywhere():
    data = even()
    here = data.table.assign(image_path=["/x.png" if row % 3 else None for row in range(len(data.table))])
    pd.testing.assert_frame_equal(split_dataset(data), split_dataset(Dataset(here, data.schema, Path())))


def test_a_class_of_too_few_patients_is_refused_by_name():
    rows = [("NEV", f"n{person}") for person in range(10)] + [("MEL", f"m{person}") for person in (0, 0, 0, 1, 1)]
    with pytest.raises(SplitError, match=r"class MEL has 2 patients; .* share no patient need at least 3"):
        split_dataset(dataset(rows))
    with pytest.raises(SplitError, match=r"class MEL has 2 lesions; .* share no lesion"):
        split_dataset(dataset(rows, "lesion_id"))


@pytest.mark.parametrize(
    ("data", "folds", "message"),
    [
        (
            dataset([(label, person) for label in "AB" for person in "xyz" for _ in range(4)]),
            5,
            "3 patients can't make 5 folds",
        ),
        (dataset([(label, f"{label}{person}") for label in "AB" for person in range(4)]), 5, "no class has 5 images"),
    ],
)
def test_more_folds_than_the_table_can_give_are_refused(data, folds, message):
    with pytest.raises(SplitError, match=message):
        split_dataset(data, folds=folds)


def test_a_class_that_the_folds_leave_without_training_rows_is_named():
    # One of the three patients of B has most of its images; under this seed the folds put all three aside.
    counts = {
        "b0": ("B", 4),
        "b1": ("B", 1),
        "b2": ("B", 1),
        "a0": ("A", 1),
        "a1": ("A", 1),
        "a2": ("A", 1),
        "a5": ("A", 1),
    }
    rows = [(label, person) for person, (label, images) in counts.items() for _ in range(images)]
    rows += [("A", "b1")] * 3 + [("A", "b2")] * 3 + [("A", "a3")] * 2 + [("A", "a4")] * 2
    said = set()
    for seed in range(20):
        try:
            split = split_dataset(dataset(rows), folds=3, seed=seed)
            assert "B" in set(split["label"][split["split"] == "train"])
        except SplitError as error:
            said.add(str(error))
    assert len(said) == 1
    assert "no training row is left of class B: it has too few patients for 3 folds" in said.pop()


@pytest.mark.parametrize(("fold", "folds"), [(5, 5), (-1, 5)])
def test_a_fold_that_is_not_there_is_refused(fold, folds):
    with pytest.raises(SplitError, match="they count from 0"):
        split_dataset(even(), "grouped-cv", fold, folds)


def test_an_unknown_protocol_is_refused():
    with pytest.raises(SplitError, match="no protocol is called 'random'; there are: paper, grouped, grouped-cv"):
        split_dataset(even(), "random")


def test_the_papers_split_is_refused_for_other_data_and_for_a_table_that_is_not_whole():
    with pytest.raises(SplitError, match="the paper has no split of T; use the protocol grouped"):
        split_dataset(even(), "paper")
    for adapter, rows in ((pad_ufes_20, 2298), (isic_2019, 25331)):
        data = Dataset(even().table, adapter.SCHEMA, Path())
        with pytest.raises(SplitError, match=f"needs all {rows} rows of .* in the published order; this table has 72"):
            split_dataset(data, "paper")


def test_the_papers_split_is_refused_for_rows_that_are_not_the_published_ones():
    data = even(patients=383, images=2)
    assert len(data.table) == 2298
    with pytest.raises(SplitError, match="aren't in the published order"):
        split_dataset(Dataset(data.table, pad_ufes_20.SCHEMA, Path()), "paper")


def by_hand():
    sides = {"a": "train", "b": "train", "c": "val", "d": "test", "e": "test", "f": "test", "g": "test"}
    table = pd.DataFrame(
        {
            "image_id": list(sides),
            "image_path": None,
            "label": ["A", "B", "A", "A", "A", "B", "B"],
            "patient_id": ["P1", "P2", "P3", "P1", "P3", "P4", None],
            "lesion_id": ["L1", None, "L3", "L1", "L9", None, None],
        }
    )
    schema = DatasetSchema(name="t", title="T", classes=("A", "B"))
    data = Dataset(normalise(table, schema)[0], schema, Path())
    split = pd.DataFrame(
        {"image_id": list(sides), "patient_id": table["patient_id"], "label": table["label"], "split": sides.values()}
    )
    return data, split


def test_leakage_of_a_table_by_hand():
    data, split = by_hand()
    assert leakage(data, split) == {
        "patient": {"train": 0.25, "train_or_val": 0.5, "per_class": {"A": 0.5, "B": 0.0}},
        "lesion": {"train": 0.25, "train_or_val": 0.25, "per_class": {"A": 0.5, "B": 0.0}},
    }


def test_leakage_does_not_hang_on_the_order_of_the_split():
    data, split = by_hand()
    assert leakage(data, split.sample(frac=1, random_state=1)) == leakage(data, split)


def test_leakage_of_ids_that_the_data_does_not_name_is_none():
    data, split = by_hand()
    unnamed = Dataset(data.table.assign(patient_id=None), data.schema, Path())
    assert leakage(unnamed, split)["patient"] is None


@settings(max_examples=20, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)
@given(rows=tables(), seed=st.integers(0, 99))
def test_a_grouped_split_leaks_nothing(rows, seed):
    data = dataset(rows)
    shares = leakage(data, divide(data, folds=3, seed=seed))["patient"]
    assert shares["train"] == shares["train_or_val"] == max(shares["per_class"].values()) == 0


def test_a_crossing_group_is_refused():
    _, split = by_hand()
    with pytest.raises(SplitError, match=r"2 patients .* on more than one side"):
        refuse_crossing(split)
    refuse_crossing(split[split["split"] == "test"])


def test_classes_without_images_in_validation_or_test_are_named():
    _, split = by_hand()
    assert missing_classes(split, ("A", "B")) == ["class B has no image in val"]
    assert split_counts(split, ("B", "A", "C")).loc["C"].tolist() == [0, 0, 0]
