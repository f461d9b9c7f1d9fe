import json

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier

from dualrefnet.data import metadata as imputation
from dualrefnet.data.adapters import load_dataset
from dualrefnet.data.loader import split_rows
from dualrefnet.data.metadata import MOST_VALUES, MetadataEncoder, fit_imputer
from dualrefnet.data.protocols import split_dataset
from dualrefnet.recipe import MetadataSection
from dualrefnet.runtime.metadata import NeuralImputer, Span

SPANS = [Span(0, 4, False), Span(4, 5, True), Span(5, 7, False), Span(7, 8, True)]


def rows(count, seed):
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
    columns = rows(600, 0)
    missing = np.random.default_rng(1).random((600, 4)) < 0.25
    return hide(columns, missing), missing


@pytest.fixture(scope="module")
def imputer(training):
    return fit_imputer(*training, SPANS, seed=0)


def one_missing(field, count=300):
    missing = np.zeros((count, 4), bool)
    missing[:, field] = True
    return missing


def test_a_number_that_follows_from_another_field_is_found_on_rows_never_seen(imputer, training):
    truth, missing = rows(300, 9), one_missing(1)
    filled = imputer.fill(hide(truth, missing), missing)
    error = np.abs(filled[:, 4] - truth[:, 4]).mean()
    mean = training[0][~training[1][:, 1], 4].mean()
    assert error < 0.25 * np.abs(mean - truth[:, 4]).mean()


def test_a_category_that_follows_from_another_field_is_found_on_rows_never_seen(imputer):
    truth = rows(300, 9)
    for field, start, stop in ((0, 0, 4), (2, 5, 7)):
        missing = one_missing(field)
        right = (imputer.fill(hide(truth, missing), missing)[:, start:stop] == truth[:, start:stop]).all(axis=1).mean()
        assert right > truth[:, start:stop].mean(axis=0).max() + 0.3


def test_a_filled_number_is_one_that_was_observed(imputer, training):
    missing = np.random.default_rng(3).random((300, 4)) < 0.5
    filled = imputer.fill(hide(rows(300, 9), missing), missing)
    for field, column in ((1, 4), (3, 7)):
        observed = training[0][~training[1][:, field], column]
        assert np.isin(filled[missing[:, field], column], observed).all()


def test_a_filled_category_is_one_category(imputer):
    missing = np.ones((5, 4), bool)
    filled = imputer.fill(np.zeros((5, 8), np.float32), missing)
    for start, stop in ((0, 4), (5, 7)):
        assert (np.sort(filled[:, start:stop], axis=1)[:, -1] == 1).all()
        assert (filled[:, start:stop].sum(axis=1) == 1).all()


def test_observed_cells_are_never_changed_and_the_input_neither(imputer):
    missing = np.random.default_rng(4).random((200, 4)) < 0.5
    given = hide(rows(200, 5), missing)
    before = given.copy()
    filled = imputer.fill(given, missing)
    np.testing.assert_array_equal(given, before)
    for index, span in enumerate(SPANS):
        known = ~missing[:, index]
        np.testing.assert_array_equal(filled[known, span.start : span.stop], given[known, span.start : span.stop])


def test_a_row_is_filled_alike_alone_and_among_others(imputer):
    missing = np.random.default_rng(6).random((40, 4)) < 0.5
    given = hide(rows(40, 5), missing)
    together = imputer.fill(given, missing)
    for row in range(40):
        np.testing.assert_array_equal(imputer.fill(given[row : row + 1], missing[row : row + 1])[0], together[row])


def test_plain_json_gives_the_same_imputer_to_the_bit(imputer):
    rebuilt = NeuralImputer.from_json(json.loads(json.dumps(imputer.to_json(), allow_nan=False)))
    assert rebuilt.spans == imputer.spans
    missing = np.random.default_rng(7).random((100, 4)) < 0.5
    given = hide(rows(100, 8), missing)
    np.testing.assert_array_equal(rebuilt.fill(given, missing), imputer.fill(given, missing))


def test_the_same_seed_gives_the_same_imputer_whatever_the_threads_and_leaves_the_global_state(monkeypatch, training):
    monkeypatch.setattr("dualrefnet.data.metadata.STEPS", 20)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    fits = []
    for count, seed in ((1, 5), (2, 5), (2, 6)):
        torch.set_num_threads(count)
        imputation._remembered.clear()
        fits.append(fit_imputer(*training, SPANS, seed))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(fits[0].weights, fits[1].weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (fits[0].weights[0] != fits[2].weights[0]).any()


def test_many_observed_numbers_are_thinned_to_quantiles_that_were_observed(monkeypatch):
    monkeypatch.setattr("dualrefnet.data.metadata.STEPS", 1)
    columns = np.random.default_rng(0).normal(size=(900, 1)).astype(np.float32)
    imputer = fit_imputer(columns, np.zeros((900, 1), bool), [Span(0, 1, True)], 0)
    values = imputer.values[0]
    assert len(values) == MOST_VALUES
    assert np.isin(values, columns).all()
    assert (values.min(), values.max()) == (columns.min(), columns.max())


@pytest.mark.parametrize("answered", [0, 1])
def test_rows_with_hardly_an_answer_can_be_fitted_and_filled(monkeypatch, answered):
    monkeypatch.setattr("dualrefnet.data.metadata.STEPS", 30)
    missing = np.ones((20, 4), bool)
    missing[:answered] = False
    imputer = fit_imputer(hide(rows(20, 0), missing), missing, SPANS, 0)
    assert np.isfinite(imputer.fill(np.zeros((3, 8), np.float32), np.ones((3, 4), bool))).all()


def test_a_field_that_was_never_answered_is_left_at_zero_or_has_no_column():
    spans = [Span(0, 1, True), Span(1, 1, False), Span(1, 2, True)]
    columns = np.array([[0, 1], [0, 2]] * 10, np.float32)
    missing = np.tile([True, True, False], (20, 1))
    filled = fit_imputer(columns, missing, spans, 0).fill(columns, missing)
    np.testing.assert_array_equal(filled, columns)


def test_the_same_question_is_answered_from_memory_and_the_memory_is_bounded(monkeypatch, training):
    monkeypatch.setattr("dualrefnet.data.metadata.STEPS", 1)
    monkeypatch.setattr("dualrefnet.data.metadata.REMEMBERED", 2)
    imputation._remembered.clear()
    columns, missing = training
    first = fit_imputer(columns, missing, SPANS, 0)
    assert fit_imputer(columns.copy(), missing.copy(), SPANS, 0) is first
    assert fit_imputer(columns + 1, missing, SPANS, 0) is not first
    assert fit_imputer(columns, missing, SPANS, 1) is not first
    assert len(imputation._remembered) == 2
    assert fit_imputer(columns, missing, SPANS, 0) is not first, "the oldest was forgotten"


def test_filling_gaps_from_the_diagnosis_gives_the_diagnosis_away(real_pad):
    """Why `label_leaking` is only a demonstration: the class of rows with gaps, which are in the test fold, becomes
    readable.
    """
    dataset = load_dataset("pad_ufes_20", real_pad)
    split = split_dataset(dataset, "grouped")
    train, test = (split_rows(dataset, split, side) for side in ("train", "test"))
    gap = test["smoke"].isna().to_numpy()
    right = {}
    for imputer in ("neural", "label_leaking"):
        encoder = MetadataEncoder.fit(train, dataset.schema, MetadataSection(tier="M2", imputation=imputer))
        forest = RandomForestClassifier(100, random_state=0).fit(encoder.encode(train).values, train["label"])
        right[imputer] = (forest.predict(encoder.encode(test).values)[gap] == test["label"].to_numpy()[gap]).mean()
    assert right["label_leaking"] > 0.85
    assert right["label_leaking"] > right["neural"] + 0.1
