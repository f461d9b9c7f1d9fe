import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dualrefnet.evaluation.calibration
from dualrefnet.evaluation.calibration import can_promise, class_thresholds, conformal_threshold, measure_sets
from dualrefnet.runtime.calibration import prediction_sets


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(dualrefnet.evaluation.calibration)
    assert (result.failed, result.attempted) == (0, 2)


def test_the_threshold_is_the_textbook_quantile_of_the_scores() -> None:
    values = np.random.default_rng(0).random(99)
    for coverage in (0.5, 0.8, 0.9, 0.95):
        # Angelopoulos and Bates 2023, section 1: the ceil((n + 1)(1 - alpha)) / n quantile of 1 - p.
        quantile = np.quantile(1 - values, np.ceil(100 * coverage - 1e-9) / 99, method="inverted_cdf")
        assert 1 - conformal_threshold(values, coverage) == pytest.approx(quantile)


def test_nine_images_can_promise_ninety_percent_and_eight_cannot() -> None:
    assert can_promise(9, 0.9)
    assert conformal_threshold(np.arange(1, 10) / 10, 0.9) == 0.1
    assert not can_promise(8, 0.9)
    assert conformal_threshold(np.arange(1, 9) / 10, 0.9) == 0
    assert conformal_threshold([], 0.9) == 0
    assert can_promise(19, 0.95)
    assert not can_promise(18, 0.95)
    for wrong in (0, 1, 1.2):
        with pytest.raises(ValueError, match="coverage"):
            conformal_threshold([0.5], wrong)


def test_exchangeable_images_are_covered_as_often_as_promised_and_hardly_more() -> None:
    """The coverage over draws of calibration and test images lies between the promise and 1 / (n + 1) above it."""
    generator = np.random.default_rng(1)
    calibration_images, held, rounds = 30, [], 4000
    for _ in range(rounds):
        values = generator.beta(2, 1, calibration_images + 1)
        held.append(values[-1] >= conformal_threshold(values[:-1], 0.9))
    error = 3 * np.sqrt(0.9 * 0.1 / rounds)
    assert 0.9 - error <= np.mean(held) <= 0.9 + 1 / (calibration_images + 1) + error


def test_thresholds_by_class_keep_the_promise_within_a_rare_hard_class_where_one_threshold_does_not() -> None:
    generator = np.random.default_rng(2)

    def draw(images: int) -> tuple[np.ndarray, np.ndarray]:
        labels = (generator.random(images) < 0.1).astype(np.int64)
        # The rare class 1 is given little probability.
        mine = np.where(labels == 1, generator.beta(1, 4, images), generator.beta(8, 1, images))
        return labels, np.where(np.eye(2)[labels] == 1, mine[:, None], 1 - mine[:, None])

    labels, scores = draw(5000)
    one = conformal_threshold(scores[np.arange(5000), labels], 0.9)
    each = class_thresholds(labels, scores, 0.9)
    assert each == tuple(conformal_threshold(scores[labels == name, name], 0.9) for name in (0, 1))
    truth, test = draw(20_000)
    rare = truth == 1
    for thresholds, expected in ((one, False), (each, True)):
        held = prediction_sets(test, thresholds)[np.arange(20_000), truth]
        assert (abs(held[rare].mean() - 0.9) < 0.03) == expected


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.floats(0, 1))
def test_a_set_is_never_empty_and_grows_as_the_threshold_falls(seed: int, threshold: float) -> None:
    scores = np.random.default_rng(seed).dirichlet(np.ones(4), 20)
    sets = prediction_sets(scores, threshold)
    assert sets.any(axis=1).all()
    assert sets[np.arange(20), scores.argmax(axis=1)].all()
    assert (prediction_sets(scores, threshold / 2) >= sets).all()
    assert (sets == prediction_sets(scores, [threshold] * 4)).all()
    assert prediction_sets(scores, 0.0).all()


def test_the_measures_of_sets_by_hand() -> None:
    scores = np.array([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.34, 0.33, 0.33], [0.1, 0.6, 0.3]])
    labels, groups = np.array([0, 1, 2, 2]), np.arange(4)
    result = measure_sets(labels, scores, 0.35, groups, ["A", "B", "C"], 0.9, 0, 0, 0.95)
    # Sets {A}, {A, B}, {} -> {A}, {B}: the first two hold the truth.
    assert result["coverage"] == 0.5
    assert result["mean_size"] == 1.25
    assert result["singletons"] == 0.75
    assert result["filled"] == 1
    assert result["sizes"] == [3, 1, 0]
    assert result["promise"] is None
    assert "coverage_ci95" not in result
    assert result["per_class"]["C"] == {"coverage": 0, "mean_size": 1, "images": 2}


def test_the_promise_is_judged_by_the_interval_over_patients() -> None:
    generator = np.random.default_rng(0)
    groups, labels = np.arange(300) // 2, np.zeros(300, dtype=np.int64)

    def promise(share: float) -> object:
        mine = np.where(generator.random(300) < share, 0.8, 0.2)
        return measure_sets(labels, np.column_stack([mine, 1 - mine]), 0.5, groups, ["A", "B"], 0.9, 200, 0, 0.95)[
            "promise"
        ]

    assert [promise(share) for share in (0.9, 0.75, 0.99)] == ["within", "missed", "exceeded"]
    everything = measure_sets(labels, np.tile([0.8, 0.2], (300, 1)), 0.5, groups, ["A", "B"], 0.9, 50, 0, 0.95)
    # All are covered: Wilson's interval of 150 of 150 patients, z² / (n + z²).
    assert everything["coverage_ci95"] == pytest.approx([150 / (150 + 1.959964**2), 1])
    assert everything["per_class"]["B"] == {"coverage": None, "mean_size": None, "images": 0}
