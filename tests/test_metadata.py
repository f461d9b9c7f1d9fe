import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import RandomForestClassifier

from dualrefnet.data import metadata as metadata_module
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.loader import split_rows
from dualrefnet.data.metadata import MetadataEncoder, fit_imputer
from dualrefnet.data.protocols import split_dataset
from dualrefnet.data.schema import DatasetSchema, MetadataField
from dualrefnet.errors import DataError
from dualrefnet.recipe import MetadataSection
from dualrefnet.runtime.metadata import Span

AGE = MetadataField(name="age", kind="numeric", tier="M1", minimum=0, maximum=120)
ITCH = MetadataField(name="itch", kind="boolean", tier="M1", missing_codes=("UNK",))
COUNTRIES = {"categories": ("ITALY", "BRAZIL", "BRASIL"), "missing_codes": ("UNK",), "aliases": {"BRASIL": "BRAZIL"}}
LAND = MetadataField(name="land", kind="categorical", **COUNTRIES)
SITE = MetadataField(name="site", kind="categorical")
SIZE = MetadataField(name="size", kind="numeric", minimum=0)
SCHEMA = DatasetSchema(name="t", title="T", classes=("A", "B"), fields=(AGE, ITCH, LAND, SITE, SIZE))
NAMES = [
    *("age", "itch_False", "itch_True", "itch_UNK", "land_ITALY", "land_BRAZIL", "land_UNK"),
    *("site_arm", "site_leg", "size", "missing_land", "missing_site", "missing_size"),
]
ROWS = pd.DataFrame(
    {
        "age": [40.0, 60.0, 40.0, 60.0],
        "itch": ["True", "False", "UNK", "True"],
        "land": ["ITALY", "BRASIL", "UNK", np.nan],
        "site": ["leg", "arm", "leg", np.nan],
        "size": [2.0, 4.0, 6.0, np.nan],
        "label": ["A", "B", "A", "B"],
    }
)
SD = np.sqrt(8 / 3)


@pytest.fixture(autouse=True)
def _short_imputer(monkeypatch):
    # What the imputer learns is tested with the full number of steps below; elsewhere it only has to be there.
    monkeypatch.setattr("dualrefnet.data.metadata.STEPS", 10)


def fit(rows=ROWS, schema=SCHEMA, **section):
    return MetadataEncoder.fit(rows, schema, MetadataSection(**{"tier": "M3", **section}))


def same(one, other):
    return json.dumps(one.to_json()) == json.dumps(other.to_json())


def test_two_rows_by_hand():
    encoder = fit(tier="M3", imputation="zero")
    assert encoder.names == NAMES
    assert encoder.width == 13
    encoded = encoder.encode(ROWS.iloc[[1, 3]])
    wanted = [[1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]]
    np.testing.assert_allclose(encoded.values, wanted, atol=1e-6)
    assert encoded.values.dtype == np.float32
    assert encoded.missing.tolist() == [[False] * 5, [False, False, True, True, True]]
    assert not encoded.invalid.any()
    assert encoded.warnings == []
    np.testing.assert_allclose(encoder.encode(ROWS).values[:3, 9], [-2 / SD, 0, 2 / SD], atol=1e-6)


def test_unk_is_a_category_or_missing():
    level = fit(imputation="zero", unknown="level").encode(ROWS)
    assert level.values[2, 3] == level.values[2, 6] == 1
    assert not level.missing[2].any()
    encoder = fit(imputation="zero", unknown="missing")
    missing = encoder.encode(ROWS)
    assert "itch_UNK" not in encoder.names
    assert "missing_itch" in encoder.names
    assert missing.missing[2].tolist() == [False, True, True, False, False]
    assert not missing.invalid.any()


def test_an_unknown_category_and_an_implausible_number_are_missing_invalid_and_warned_of_without_the_value():
    rows = pd.DataFrame({"age": [300], "itch": ["maybe"], "land": ["ATLANTIS"], "site": ["UNK"], "size": [None]})
    encoded = fit(imputation="zero").encode(rows)
    assert encoded.missing.tolist() == [[True] * 5]
    assert encoded.invalid.tolist() == [[True, True, True, True, False]]
    assert len(encoded.warnings) == 4
    said = " ".join(encoded.warnings)
    assert not any(value in said for value in ("300", "maybe", "ATLANTIS"))


def test_the_order_of_rows_columns_and_the_index_do_not_matter():
    encoder = fit()
    together = encoder.encode(ROWS).values
    for row in range(len(ROWS)):
        alone = ROWS.iloc[[row], ::-1].set_index(pd.Index([7]))
        np.testing.assert_array_equal(encoder.encode(alone).values[0], together[row])
    doubled = pd.concat([ROWS, ROWS])
    np.testing.assert_array_equal(encoder.encode(doubled).values, np.concatenate([together, together]))


@pytest.mark.parametrize(
    "section", [{}, {"imputation": "zero"}, {"scale": "raw", "unknown": "missing"}, {"tier": "M0"}, {"tier": "M2"}]
)
def test_plain_json_gives_the_same_encoder_to_the_bit(section):
    encoder = fit(**section)
    rebuilt = MetadataEncoder.from_json(json.loads(json.dumps(encoder.to_json(), allow_nan=False)))
    np.testing.assert_array_equal(rebuilt.encode(ROWS).values, encoder.encode(ROWS).values)
    assert same(rebuilt, encoder)


@settings(max_examples=5)
@given(labels=st.permutations(["A", "B", "A", "B"]))
def test_the_label_is_never_looked_at(labels):
    assert same(fit(ROWS.assign(label=labels)), fit())
    assert same(fit(ROWS.drop(columns="label")), fit())


values = {
    "age": st.none() | st.floats(0, 120) | st.sampled_from(["", "50", "-3", "1e9"]),
    "itch": st.none() | st.booleans() | st.sampled_from(["yes", "UNK", "0", "what"]),
    "land": st.none() | st.sampled_from(["ITALY", "BRASIL", "UNK", "", "MARS"]),
    "site": st.none() | st.text(max_size=3) | st.integers(0, 3),
}


@settings(max_examples=60)
@given(rows=st.lists(st.fixed_dictionaries({}, optional=values), min_size=1, max_size=5))
def test_any_record_is_encoded_to_finite_numbers_that_say_what_was_missing(rows):
    encoder = fit(imputation="zero")
    encoded = encoder.encode(pd.DataFrame(rows, index=range(len(rows)), dtype=object))
    assert encoded.values.shape == (len(rows), encoder.width)
    assert np.isfinite(encoded.values).all()
    assert (encoded.missing | ~encoded.invalid).all()
    filled = encoded.values[:, encoder.names.index("itch_False") : encoder.names.index("itch_UNK") + 1].sum(axis=1)
    np.testing.assert_array_equal(filled, ~encoded.missing[:, 1])


def test_fit_sees_the_training_rows_alone(sample_root):
    dataset = load_dataset("sample", sample_root)
    train, rest = dataset.table.iloc[:80], dataset.table.iloc[80:].copy()
    rest["age"], rest["region"] = 119.0, "LIP"
    changed = pd.concat([train, rest])
    assert same(fit(train, dataset.schema), fit(changed.iloc[:80], dataset.schema))
    assert not same(fit(train, dataset.schema), fit(changed, dataset.schema))


@pytest.mark.parametrize(
    ("section", "width"),
    [
        ({"tier": "M2", "imputation": "zero", "scale": "raw", "merge_aliases": False}, 81),
        ({"tier": "M2", "unknown": "missing", "merge_aliases": False}, 73),
        ({"tier": "M1"}, 33),
        ({"tier": "M3"}, 80 + 13),
    ],
)
def test_the_encodings_of_pad_have_the_widths_of_the_literature(real_pad, section, width):
    dataset = load_dataset("pad_ufes_20", real_pad)
    encoder = fit(dataset.table, dataset.schema, **section)
    assert encoder.width == len(set(encoder.names)) == width
    encoded = encoder.encode(dataset.table)
    assert encoded.values.shape == (2298, width)
    assert not encoded.invalid.any()
    assert encoded.warnings == []
    if section.get("imputation") == "zero":
        # Rows without the 13 columns are zero there, as in the literature's encoding.
        values, gap = pd.DataFrame(encoded.values, columns=encoder.names), dataset.table["smoke"].isna()
        assert (values.loc[gap, ["smoke_True", "diameter_1", "gender_MALE"]] == 0).all(axis=None)
        np.testing.assert_allclose(values["age"], dataset.table["age"], rtol=1e-5)


def test_the_label_leaking_imputation_reads_the_diagnosis_and_is_useless_without_it():
    encoder = fit(tier="M2", imputation="label_leaking")
    assert encoder.leaked_classes == ("A", "B")
    assert not any("A" in name.split("_") for name in encoder.names), "the diagnosis itself is no column"
    assert encoder.encode(ROWS).values.shape == (4, encoder.width)
    again = MetadataEncoder.from_json(json.loads(json.dumps(encoder.to_json())))
    np.testing.assert_array_equal(again.encode(ROWS).values, encoder.encode(ROWS).values)
    with pytest.raises(DataError, match="demonstration of a leak"):
        encoder.encode(ROWS.drop(columns="label"))
    assert fit(tier="M2").leaked_classes == ()


SPANS = [Span(0, 4, False), Span(4, 5, True), Span(5, 7, False), Span(7, 8, True)]


def linked_rows(count, seed):
    """Four fields: a category, a number that follows from it, a boolean that follows from both, and noise."""
    rng = np.random.default_rng(seed)
    category = rng.integers(4, size=count)
    number = np.array([-1.5, 0.5, 2.0, -0.5])[category] + rng.choice([-0.1, 0.0, 0.1], count)
    truth = (number > 0).astype(int)
    noise = rng.normal(size=count).round(2)
    columns = np.concatenate([np.eye(4)[category], number[:, None], np.eye(2)[truth], noise[:, None]], axis=1)
    return columns.astype(np.float32)


def hide(columns, missing):
    hidden = columns.copy()
    for index, span in enumerate(SPANS):
        hidden[missing[:, index], span.start : span.stop] = 0
    return hidden


@pytest.fixture(scope="module")
def training():
    columns = linked_rows(600, 0)
    missing = np.random.default_rng(1).random((600, 4)) < 0.25
    return hide(columns, missing), missing


@pytest.fixture(scope="module")
def imputer(training):
    return fit_imputer(*training, SPANS, seed=0)


def one_missing(field, count=300):
    missing = np.zeros((count, 4), bool)
    missing[:, field] = True
    return missing


def test_what_follows_from_another_field_is_found_on_rows_never_seen(imputer, training):
    truth = linked_rows(300, 9)
    filled = [imputer.fill(hide(truth, one_missing(field)), one_missing(field)) for field in range(3)]
    mean = training[0][~training[1][:, 1], 4].mean()
    assert np.abs(filled[1][:, 4] - truth[:, 4]).mean() < 0.25 * np.abs(mean - truth[:, 4]).mean()
    for field, start, stop in ((0, 0, 4), (2, 5, 7)):
        right = (filled[field][:, start:stop] == truth[:, start:stop]).all(axis=1).mean()
        assert right > truth[:, start:stop].mean(axis=0).max() + 0.3


def test_observed_cells_are_never_changed_and_the_input_neither(imputer):
    missing = np.random.default_rng(4).random((200, 4)) < 0.5
    given = hide(linked_rows(200, 5), missing)
    before = given.copy()
    filled = imputer.fill(given, missing)
    np.testing.assert_array_equal(given, before)
    for index, span in enumerate(SPANS):
        known = ~missing[:, index]
        np.testing.assert_array_equal(filled[known, span.start : span.stop], given[known, span.start : span.stop])


def test_the_same_seed_gives_the_same_imputer_whatever_the_threads_and_leaves_the_global_state(monkeypatch, training):
    monkeypatch.setattr("dualrefnet.data.metadata.STEPS", 20)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    fits = []
    for count, seed in ((1, 5), (2, 5), (2, 6)):
        torch.set_num_threads(count)
        metadata_module._cache.clear()
        fits.append(fit_imputer(*training, SPANS, seed))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(fits[0].weights, fits[1].weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (fits[0].weights[0] != fits[2].weights[0]).any()


def test_the_same_rows_give_the_cached_imputer_and_the_cache_is_bounded(monkeypatch, training):
    monkeypatch.setattr("dualrefnet.data.metadata.STEPS", 1)
    monkeypatch.setattr("dualrefnet.data.metadata.CACHE_SIZE", 2)
    metadata_module._cache.clear()
    columns, missing = training
    first = fit_imputer(columns, missing, SPANS, 0)
    assert fit_imputer(columns.copy(), missing.copy(), SPANS, 0) is first
    assert fit_imputer(columns + 1, missing, SPANS, 0) is not first
    assert fit_imputer(columns, missing, SPANS, 1) is not first
    assert len(metadata_module._cache) == 2
    assert fit_imputer(columns, missing, SPANS, 0) is not first, "the oldest was dropped"


def test_filling_gaps_from_the_diagnosis_gives_the_diagnosis_away(real_pad):
    """Why `label_leaking` is only a demonstration: the class of rows with gaps, which are in the test fold, becomes
    readable.
    """
    dataset = load_dataset("pad_ufes_20", real_pad)
    split = split_dataset(dataset, "grouped")
    train, test = (split_rows(dataset, split, name) for name in ("train", "test"))
    gap = test["smoke"].isna().to_numpy()
    right = {}
    for imputer in ("neural", "label_leaking"):
        encoder = MetadataEncoder.fit(train, dataset.schema, MetadataSection(tier="M2", imputation=imputer))
        forest = RandomForestClassifier(100, random_state=0).fit(encoder.encode(train).values, train["label"])
        right[imputer] = (forest.predict(encoder.encode(test).values)[gap] == test["label"].to_numpy()[gap]).mean()
    assert right["label_leaking"] > 0.85
    assert right["label_leaking"] > right["neural"] + 0.1
