import contextlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
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
SIZE = MetadataField(name="size", kind="numeric")
ITCH = MetadataField(name="itch", kind="boolean", missing_codes=("UNK",))
SITE = MetadataField(name="site", kind="categorical")
SCHEMA = DatasetSchema(name="t", title="Test", classes=("MEL", "NEV"), malignant=("MEL",), fields=(AGE, ITCH, SITE))
# Any case, space around it, and what Excel, R, pandas and SQL write.
BLANKS = [
    None,
    np.nan,
    pd.NA,
    pd.NaT,
    "",
    "  ",
    "nan",
    "NaN",
    "NA",
    "N/A",
    "n/a",
    "NULL",
    "None",
    "-",
    " NA ",
    "\ufeffNA",
]


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
    table, notes = normalise(raw(extra=1).iloc[::-1], SCHEMA)
    assert list(table.columns) == ["image_id", "image_path", "label", "patient_id", "lesion_id", "age", "itch", "site"]
    assert list(table.index) == [0, 1, 2]
    assert list(table["image_id"]) == ["c", "b", "a"]
    assert notes == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (raw(image_id=["a", "b", "a"]), "1 image ids are in more than one row, the first: a"),
        (raw(image_path=["/x/a.png", None, "/x/a.png"]), "1 image files are in more than one row, the first: /x/a.png"),
        (raw(label=["MEL", "WHAT", "NEV"]), "unknown labels: WHAT; the classes of Test are MEL, NEV"),
        (raw(label=["MEL", " N/A", "NEV"]), "1 rows of Test have no label, the first is row 2"),
        (raw(image_id=["a", None, None]), "2 rows of Test have no image_id"),
        (raw().iloc[:0], "has no rows"),
        (raw().drop(columns=["age", "lesion_id"]), "the table of Test has no column lesion_id, age; it has: image_id"),
        (raw().rename(columns={"age": "AGE"}), "has no column age; .*; did you mean 'AGE'"),
        (pd.concat([raw(), raw()[["age"]]], axis=1), "several columns called age"),
        (raw(age=["12", "old", "tall"]), "age must be a number, and 2 rows hold text"),
        (raw(age=["12", "1,234", "3 mm"]), "age must be a number, and 2 rows hold text"),
    ],
)
def test_a_table_that_is_not_what_it_must_be_is_refused(table, message):
    with pytest.raises(DataError, match=message):
        normalise(table, SCHEMA)


@pytest.mark.parametrize("blank", BLANKS)
def test_what_says_nothing_is_missing_in_every_column_and_no_patient_no_category(blank):
    assert column(AGE, [1.0, blank]) == ([1.0, None], [])
    assert column(ITCH, [True, blank])[0] == ["True", None]
    assert column(SITE, ["arm", blank])[0] == ["arm", None]
    table, _ = normalise(raw(patient_id=[blank, blank, "P"], lesion_id=[blank, blank, blank]), SCHEMA)
    assert list(groups(table, SCHEMA)) == ["image:a", "image:b", "P"]


def test_a_word_for_nothing_counts_where_it_is_declared():
    site = MetadataField(name="site", kind="categorical", categories=("NA", "arm"), missing_codes=("-",))
    assert column(site, ["NA", "-", "N/A"])[0] == ["NA", "-", None]
    schema = SCHEMA.model_copy(update={"classes": ("NA", "MEL"), "malignant": ()})
    assert list(normalise(raw(label=["NA", "MEL", "NA "]), schema)[0]["label"]) == ["NA", "MEL", "NA"]


@pytest.mark.parametrize("spelling", ["melanoma ", " Melanoma", "MELANOMA", "mela\u200bnoma", "melanoma\u00a0"])
def test_a_class_is_one_however_it_is_spelt_and_that_is_said(spelling):
    schema = SCHEMA.model_copy(update={"classes": ("melanoma", "nevus"), "malignant": ()})
    table, notes = normalise(raw(label=["melanoma", spelling, "nevus"]), schema)
    assert list(table["label"]) == ["melanoma", "melanoma", "nevus"]
    assert [check for check, _ in notes] == ["labels"]
    assert "1 labels" in notes[0][1]


def test_numbers_that_are_implausible_become_missing_and_give_warnings():
    values, warnings = column(AGE, [55, "60.5", -1, 121, 0, 120, np.inf, "-inf", "1e999"])
    assert values == [55, 60.5, None, None, 0, 120, None, None, None]
    assert [warning.split(" are ")[0] for warning in warnings] == [
        "age: 3 infinite or absurdly large values",
        "age: 2 values outside 0..120",
    ]
    assert column(SIZE, ["1e39", "1e300", -1e300, 10**400, 7])[0] == [None, None, None, None, 7]


def test_decimal_commas_are_read_where_they_can_be_nothing_else():
    assert column(SIZE, ["4,5", "-0,125", "12,25", "1,5000"]) == ([4.5, -0.125, 12.25, 1.5], [])


@given(st.lists(st.none() | st.floats(width=32) | st.text(max_size=6) | st.integers(), max_size=8))
def test_a_numeric_column_of_anything_gives_plausible_numbers_or_an_error(values):
    with contextlib.suppress(DataError):
        result, _ = normalise_field(pd.Series(values, dtype=object), AGE)
        assert result.dtype == float
        assert result.dropna().between(0, 120).all()


YES = [True, np.True_, 1, 1.0, "true", "TRUE", "yes", "Yes", "Y", "1", "1.0", " true "]
NO = [False, np.False_, 0, 0.0, "false", "FALSE", "no", "No", "N", "0", "0.0", " no "]


@pytest.mark.parametrize(("value", "word"), [(yes, "True") for yes in YES] + [(no, "False") for no in NO])
def test_every_spelling_of_yes_and_no_is_understood(value, word):
    assert column(ITCH, [value, "UNK", "maybe"])[0] == [word, "UNK", "maybe"]


@given(
    st.lists(st.none() | st.booleans() | st.integers(0, 9) | st.floats() | st.text(max_size=5), max_size=8),
    st.sampled_from([ITCH, SITE]),
)
def test_normalising_twice_changes_nothing_more(values, field):
    once, _ = normalise_field(pd.Series(values, dtype=object), field)
    twice, _ = normalise_field(once, field)
    pd.testing.assert_series_equal(once, twice)


def test_other_spellings_of_a_category_are_the_category_and_two_that_differ_in_case_stay_apart():
    words = {"categories": ("UPPER ARM", "a", "A"), "aliases": {"LIMB": "UPPER ARM"}, "missing_codes": ("UNK",)}
    site = MetadataField(name="site", kind="categorical", **words)
    given = ["upper_arm", " Upper Arm", "limb", "unk ", "a", "A", "moon"]
    assert column(site, given)[0] == ["UPPER ARM", "UPPER ARM", "LIMB", "UNK", "a", "A", "moon"]
    # Without categories of its own a field learns what the training rows hold, in the most frequent spelling.
    assert column(SITE, ["Arm", "arm", "arm ", "leg"])[0] == ["arm", "arm", "arm", "leg"]


@pytest.mark.parametrize(
    "name", ["biopsed", "Biopsied", "diagnostic", "DX-Type", "dx type", "Benign/Malignant", " target "]
)
def test_a_field_that_holds_the_label_is_refused(name):
    with pytest.raises(DataError, match="holds the diagnosis"):
        MetadataField(name=name, kind="categorical")


@pytest.mark.parametrize("name", ["patient_id", "Patient ID", "img_id", "image", "ID", "image_path"])
def test_a_field_that_identifies_is_refused(name):
    with pytest.raises(DataError, match="identifies"):
        refuse_forbidden_features(["age", name])


@pytest.mark.parametrize(
    ("patients", "lesions", "wanted"),
    [
        (["P1", None, ""], [None, None, None], ["P1", "image:b", "image:c"]),
        (["P1", "P1 ", " p1"], [None, None, None], ["P1", "P1", "P1"]),
        ([None, None, None], ["L", "NA", "L"], ["lesion:L", "image:b", "lesion:L"]),
        ([None, "P1", None], ["L", "L", None], ["P1", "P1", "image:c"]),
        # Two patients are one group where a lesion joins them.
        (["P2", "P1", "P2"], ["L", "L", "M"], ["P2", "P2", "P2"]),
    ],
)
def test_a_group_is_all_that_a_patient_or_a_lesion_joins(patients, lesions, wanted):
    table, _ = normalise(raw(patient_id=patients, lesion_id=lesions), SCHEMA)
    assert list(groups(table, SCHEMA)) == wanted


@given(st.lists(st.tuples(*[st.none() | st.sampled_from("abcdef")] * 2), min_size=1, max_size=12))
def test_no_patient_and_no_lesion_is_in_two_groups_and_no_group_could_be_parted(rows):
    table = pd.DataFrame(rows, columns=["patient_id", "lesion_id"], dtype=object)
    table["image_id"] = [f"i{number}" for number in range(len(rows))]
    names = groups(table, SCHEMA)
    for one in ("patient_id", "lesion_id"):
        assert (names.groupby(table[one]).nunique() == 1).all()
    for _, rows_of_group in table.groupby(names):
        reached, seen = {rows_of_group.index[0]}, 0
        while len(reached) > seen:
            seen = len(reached)
            inside = rows_of_group.loc[sorted(reached)]
            linked = [rows_of_group[one].isin(inside[one].dropna()) for one in ("patient_id", "lesion_id")]
            reached |= set(rows_of_group.index[linked[0] | linked[1]])
        assert reached == set(rows_of_group.index)
