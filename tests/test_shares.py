"""One prediction shared out: values known by hand or from the definition, sums, errors, seeds."""

import importlib
import sys
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dualrefnet.analysis import shap as shares
from dualrefnet.analysis.shap import FeatureGroup, attribute_prediction
from dualrefnet.errors import DependencyError

Floats = NDArray[np.float64]


def columns(*groups: tuple[int, ...]) -> tuple[FeatureGroup, ...]:
    return tuple(FeatureGroup(f"p{number}", f"p{number}", "numeric", group) for number, group in enumerate(groups))


def alone(count: int) -> tuple[FeatureGroup, ...]:
    return columns(*((number,) for number in range(count)))


def all_orders(
    classify: Callable[[Any], Floats], form: Any, background: Any, players: tuple[FeatureGroup, ...]
) -> Floats:
    """The definition: what a player's coming adds, averaged over all orders."""
    total = 0.0
    orders = list(permutations(range(len(players))))
    for order in orders:
        forms, added = background.copy(), [None] * len(players)
        before = classify(forms).mean(axis=0)
        for number in order:
            forms[:, list(players[number].columns)] = form[list(players[number].columns)]
            after = classify(forms).mean(axis=0)
            added[number] = after - before
            before = after
        total = total + np.array(added)
    return np.asarray(total / len(orders))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
def test_of_a_linear_model_each_value_is_the_weight_times_the_distance_from_the_mean(
    seed: int, width: int, classes: int, others: int
) -> None:
    generator = np.random.default_rng(seed)
    weights, form = generator.normal(size=(width, classes)), generator.normal(size=width).astype(np.float32)
    background = generator.normal(size=(others, width)).astype(np.float32)
    result = attribute_prediction(lambda forms: forms @ weights, form, background, alone(width), 1, 0)
    np.testing.assert_allclose(result.values, weights * (form - background.mean(axis=0))[:, None], atol=1e-5)
    np.testing.assert_allclose(result.base, background.mean(axis=0) @ weights, atol=1e-5)
    np.testing.assert_allclose(result.prediction, form @ weights, atol=1e-5)
    np.testing.assert_allclose(result.errors, 0, atol=1e-5)


def test_of_an_additive_model_a_field_is_worth_what_its_columns_are_worth_together() -> None:
    generator = np.random.default_rng(1)
    form, background = generator.normal(size=6).astype(np.float32), generator.normal(size=(9, 6)).astype(np.float32)
    weights = generator.normal(size=(6, 3))

    def classify(forms: Any) -> Floats:
        return np.asarray(np.sin(forms) @ weights)

    by_column = attribute_prediction(classify, form, background, alone(6), 2, 0).values
    by_field = attribute_prediction(classify, form, background, columns((0, 3), (1,), (2, 4, 5)), 2, 0).values
    np.testing.assert_allclose(
        by_field, [by_column[[0, 3]].sum(axis=0), by_column[1], by_column[[2, 4, 5]].sum(axis=0)], atol=1e-6
    )


def test_two_answers_that_multiply_share_their_product_as_computed_by_hand() -> None:
    def classify(forms: Any) -> Floats:
        return np.stack([forms[:, 0] * forms[:, 1], forms[:, 0] - forms[:, 1]], axis=1).astype(float)

    # Nobody: 1 * 2 = 2; the first alone 3 * 2 = 6; the second alone 1 * 5 = 5; both 15.
    form, background = np.array([3, 5], np.float32), np.array([[1, 2]], np.float32)
    result = attribute_prediction(classify, form, background, alone(2), 1, 0)
    np.testing.assert_allclose(result.values[:, 0], [((6 - 2) + (15 - 5)) / 2, ((5 - 2) + (15 - 6)) / 2])
    np.testing.assert_allclose(result.values[:, 1], [2, -3])
    np.testing.assert_allclose(result.base, [2, -1])


def test_one_order_is_enough_where_no_more_than_two_answers_act_on_each_other() -> None:
    generator = np.random.default_rng(2)
    form, background = generator.normal(size=7).astype(np.float32), generator.normal(size=(4, 7)).astype(np.float32)
    square = generator.normal(size=(3, 7, 7))
    players = columns((0, 1), (2,), (3, 6), (4,), (5,))

    def classify(forms: Any) -> Floats:
        return np.asarray(np.einsum("ri,cij,rj->rc", forms, square, forms))

    exact = all_orders(classify, form, background, players)
    np.testing.assert_allclose(attribute_prediction(classify, form, background, players, 1, 3).values, exact, atol=1e-5)


def test_where_more_answers_act_together_the_estimate_nears_the_definition_and_its_error_is_told() -> None:
    generator = np.random.default_rng(3)
    form, background = generator.normal(size=5).astype(np.float32), generator.normal(size=(6, 5)).astype(np.float32)
    first, second = generator.normal(size=(5, 16)) * 2, generator.normal(size=(16, 3))

    def classify(forms: Any) -> Floats:
        logits = np.tanh(forms @ first) @ second
        return np.asarray(torch.from_numpy(logits).softmax(dim=1).numpy())

    exact = all_orders(classify, form, background, alone(5))
    gaps = {}
    for count in (4, 400):
        result = attribute_prediction(classify, form, background, alone(5), count, 0)
        gaps[count] = np.abs(result.values - exact)
        assert (gaps[count] <= 4 * result.errors + 1e-9).mean() > 0.9
    assert 1e-9 < gaps[400].max() < gaps[4].max() / 3
    assert gaps[400].max() < 0.005


def test_a_player_whose_answer_is_that_of_all_others_is_worth_nothing() -> None:
    form = np.array([1, 0, 2], np.float32)
    background = np.array([[1, 0, 5], [1, 0, 7]], np.float32)
    classify = lambda forms: (forms.prod(axis=1, keepdims=True) + forms).astype(float)  # noqa: E731
    result = attribute_prediction(classify, form, background, columns((0, 1), (2,)), 2, 0)
    np.testing.assert_allclose(result.values[0], 0)
    np.testing.assert_allclose(result.values[1], [0, 0, -4])
    nothing = attribute_prediction(classify, form, np.tile(form, (3, 1)), columns((0, 1), (2,)), 2, 0)
    np.testing.assert_allclose(nothing.values, 0)
    np.testing.assert_allclose(nothing.base, nothing.prediction)


def test_a_model_that_changes_its_mind_is_refused_and_so_is_nan() -> None:
    form, background = np.ones(3, np.float32), np.zeros((2, 3), np.float32)
    generator = np.random.default_rng(0)
    with pytest.raises(ArithmeticError, match=r"away from the predicted probability, more than 0\.0001"):
        attribute_prediction(lambda forms: generator.random((len(forms), 2)), form, background, alone(3), 1, 0)
    with pytest.raises(ArithmeticError, match="nan"):
        attribute_prediction(lambda forms: np.full((len(forms), 2), np.nan), form, background, alone(3), 1, 0)


@pytest.mark.parametrize("groups", [[(0,), (1,)], [(0,), (1, 2), (2,)], [(0, 1), (2, 3)]])
def test_every_column_must_belong_to_one_player(groups: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="each of the 3 columns must belong to one player"):
        attribute_prediction(
            lambda forms: forms, np.ones(3, np.float32), np.zeros((2, 3), np.float32), columns(*groups), 1, 0
        )


def test_there_must_be_a_permutation() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        attribute_prediction(lambda forms: forms, np.ones(1, np.float32), np.zeros((2, 1), np.float32), alone(1), 0, 0)


def test_the_seed_fixes_the_orders_and_the_callers_random_numbers_stay_as_they_were() -> None:
    generator = np.random.default_rng(4)
    form, background = generator.normal(size=6).astype(np.float32), generator.normal(size=(4, 6)).astype(np.float32)
    classify = lambda forms: np.exp(forms.sum(axis=1, keepdims=True)).astype(float)  # noqa: E731
    np.random.seed(9)  # noqa: NPY002
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(9)  # noqa: NPY002
    one, other, third = (
        attribute_prediction(classify, form, background, alone(6), 1, seed).values for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(np.random.random(3), expected)  # noqa: NPY002
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - third).max() > 1e-6


def test_without_shap_the_message_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shap", None)
    monkeypatch.delitem(sys.modules, "dualrefnet.analysis.shap")
    with pytest.raises(DependencyError, match=r"pip install 'dualrefnet\[explain\]'"):
        importlib.import_module("dualrefnet.analysis.shap")
    assert shares.share_out is attribute_prediction
