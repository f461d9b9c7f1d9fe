import contextlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualrefnet.data.schema import (
    DatasetSchema,
    MetadataField,
    groups,
    normalise,
    normalise_field,
    refuse_forbidden_features,
)
from dualrefnet.errors import DataError

AGE = MetadataField(name="age", kind="numeric", minimum=0, maximum=120, missing_codes=("UNK",))


ITCH = MetadataField(name="itch", kind="boolean", missing_codes=("UNK",))


SITE = MetadataField(name="site", kind="categorical")


SCHEMA = DatasetSchema(name="t", title="Test", classes=("MEL", "NEV"), malignant=("MEL",), fields=(AGE, ITCH, SITE))


def raw(**columns):
    table = {
        "image_id": ["a", "b", "c"],
        "image_path": [None, "/b.png", None],
        "label": ["MEL", "NEV", "NEV"],
        "patient_id": ["P1", "P1", None],
        "lesion_id": None,
        "age": [1, 2, 3],
        "itch": [True, False, None],
        "site": ["x", "y", None],
    }
    return pd.DataFrame(table | columns)


def column(field, values, dtype=object):
    values, warnings = normalise_field(pd.Series(values, dtype=dtype), field)
    return [None if pd.isna(value) else value for value in values], warnings


def test_a_table_gets_the_schemas_columns_and_a_plain_index():
    table, warnings = normalise(raw(extra=1).iloc[::-1], SCHEMA)
    assert list(table.columns) == ["image_id", "image_path", "label", "patient_id", "lesion_id", "age", "itch", "site"]
    assert list(table.index) == [0, 1, 2]
    assert list(table["image_id"]) == ["c", "b", "a"]
    assert warnings == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (raw(image_id=["a", "b", "a"]), "1 image ids are in more than one row, the first: a"),
        (raw(label=["MEL", "WHAT", "NEV"]), "unknown labels: WHAT; the classes of Test are MEL, NEV"),
        (raw(label=["MEL", None, "NEV"]), "1 rows of Test have no label"),
        (raw(image_id=["a", None, None]), "2 rows of Test have no image_id"),
        (raw().iloc[:0], "has no rows"),
        (raw().drop(columns=["age", "lesion_id"]), "the table of Test has no column lesion_id, age; it has: image_id"),
        (raw(age=["12", "old", "tall"]), "age must be a number, and 2 rows hold text"),
    ],
)
def test_a_table_that_is_not_what_it_must_be_is_refused(table, message):
    with pytest.raises(DataError, match=message):
        normalise(table, SCHEMA)


def test_numbers_that_are_implausible_become_missing_and_give_warnings():
    values, warnings = column(AGE, [55, "60.5", -1, 121, 0, 120, np.inf, "-inf", "1e999"])
    assert values == [55, 60.5, None, None, 0, 120, None, None, None]
    assert warnings == [
        "age: 3 infinite values are treated as missing",
        "age: 2 values outside 0..120 are treated as missing",
    ]


@pytest.mark.parametrize("blank", [None, np.nan, pd.NA, "", "  ", "nan", "NaN", "UNK", " UNK "])
def test_a_blank_number_is_missing_without_a_warning(blank):
    assert column(AGE, [1.0, blank]) == ([1.0, None], [])


@settings(deadline=None)
@given(st.lists(st.none() | st.floats(width=32) | st.text(max_size=6) | st.integers(), max_size=8))
def test_a_numeric_column_of_anything_gives_plausible_numbers_or_an_error(values):
    with contextlib.suppress(DataError):
        result, _ = normalise_field(pd.Series(values, dtype=object), AGE)
        assert result.dtype == float
        assert result.dropna().between(0, 120).all()


@pytest.mark.parametrize(
    "value", [True, np.True_, 1, 1.0, "true", "True", "TRUE", "yes", "Yes", "y", "Y", "1", "1.0", " true "]
)
def test_every_spelling_of_yes_is_true(value):
    assert column(ITCH, [value])[0] == ["True"]


@pytest.mark.parametrize(
    "value", [False, np.False_, 0, 0.0, "false", "False", "FALSE", "no", "No", "n", "N", "0", "0.0", " no "]
)
def test_every_spelling_of_no_is_false(value):
    assert column(ITCH, [value])[0] == ["False"]


def test_a_booleans_missing_code_and_nonsense_stay_for_the_encoder_to_judge():
    assert column(ITCH, ["UNK", "maybe", None, ""])[0] == ["UNK", "maybe", None, None]


@pytest.mark.parametrize("dtype", [object, "str"])
def test_a_category_read_as_a_float_is_the_whole_number(dtype):
    assert column(SITE, ["3.0", "3", "3.5", " arm ", "", "v1.0"], dtype)[0] == ["3", "3", "3.5", "arm", None, "v1.0"]


@settings(deadline=None)
@given(
    st.lists(st.none() | st.booleans() | st.integers(0, 9) | st.floats() | st.text(max_size=5), max_size=8),
    st.sampled_from([ITCH, SITE]),
)
def test_normalising_twice_changes_nothing_more(values, field):
    once, _ = normalise_field(pd.Series(values, dtype=object), field)
    twice, _ = normalise_field(once, field)
    pd.testing.assert_series_equal(once, twice)


@pytest.mark.parametrize(
    "name",
    [
        "biopsed",
        "Biopsied",
        "diagnostic",
        "dx",
        "DX-Type",
        "dx type",
        "label",
        "malignant",
        "Benign/Malignant",
        " target ",
    ],
)
def test_a_field_that_holds_the_label_is_refused(name):
    with pytest.raises(DataError, match="holds the diagnosis"):
        MetadataField(name=name, kind="categorical")


@pytest.mark.parametrize(
    "name", ["patient_id", "Patient ID", "lesion_id", "img_id", "image", "ID", "isic_id", "image_path"]
)
def test_a_field_that_identifies_is_refused(name):
    with pytest.raises(DataError, match="identifies"):
        refuse_forbidden_features(["age", name])


def test_rows_without_a_patient_are_groups_of_their_own():
    table, _ = normalise(raw(patient_id=["P1", None, ""]), SCHEMA)
    assert list(groups(table, SCHEMA)) == ["P1", "image:b", "image:c"]


def test_a_patient_is_one_person_however_the_id_is_padded():
    table, _ = normalise(raw(patient_id=["P1", "P1 ", " P1"]), SCHEMA)
    assert set(groups(table, SCHEMA)) == {"P1"}


def test_groups_follow_the_schema():
    table, _ = normalise(raw(lesion_id=["L", None, "L"]), SCHEMA)
    by_lesion = SCHEMA.model_copy(update={"group_by": "lesion_id"})
    assert list(groups(table, by_lesion)) == ["L", "image:b", "L"]


def test_other_spellings_of_a_category_are_the_category_and_two_that_differ_in_case_stay_apart():
    site = MetadataField(
        name="site",
        kind="categorical",
        categories=("UPPER ARM", "a", "A"),
        aliases={"LIMB": "UPPER ARM"},
        missing_codes=("UNK",),
    )
    given = ["upper_arm", " Upper Arm", "limb", "unk ", "a", "A", "moon"]
    assert column(site, given)[0] == ["UPPER ARM", "UPPER ARM", "LIMB", "UNK", "a", "A", "moon"]
    # Without categories of its own a field learns what the training rows hold.
    assert column(SITE, ["Arm", "arm"])[0] == ["Arm", "arm"]
