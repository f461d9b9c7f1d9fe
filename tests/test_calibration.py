import doctest
import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from dualrefnet.evaluation.metrics import (
    adaptive_calibration_error,
    brier_score,
    equal_width_bins,
    expected_calibration_error,
    reliability_curve,
)


@pytest.mark.parametrize("module", ["inputs", "metrics", "calibration", "resampling", "intervals", "tables"])
def test_the_examples_in_the_docstrings_are_true(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"dualrefnet.evaluation.{module}"))
    assert result.failed == 0
    assert result.attempted > 0 or module not in ("calibration", "intervals")


def two_class(confidence: list[float]) -> np.ndarray:
    return np.array([[value, 1 - value] for value in confidence])


def test_expected_calibration_error_by_hand() -> None:
    # Bins of .25: (.5, .75] holds .6 right and .7 wrong: |.5 - .65| = .15; (.75, 1] holds .8 right, .9 right, 1 wrong:
    # |2/3 - .9|.
    scores = two_class([0.6, 0.7, 0.8, 0.9, 1.0])
    assert expected_calibration_error([0, 1, 0, 0, 1], scores, bins=4) == pytest.approx(
        2 / 5 * 0.15 + 3 / 5 * (0.9 - 2 / 3)
    )
    # One bin: |3/5 - .8|.
    assert expected_calibration_error([0, 1, 0, 0, 1], scores, bins=1) == pytest.approx(0.2)


def test_adaptive_calibration_error_by_hand() -> None:
    # Three bins of two: (.6 right, .7 wrong), (.8 right, .85 right), (.9 right, .95 wrong).
    scores = two_class([0.95, 0.6, 0.85, 0.7, 0.8, 0.9])
    expected = 2 / 6 * (abs(0.5 - 0.65) + abs(1 - 0.825) + abs(0.5 - 0.925))
    assert adaptive_calibration_error([1, 0, 0, 1, 0, 0], scores, bins=3) == pytest.approx(expected)


def test_equal_confidences_share_an_adaptive_bin_whatever_their_order() -> None:
    scores = two_class([0.8] * 10)
    labels = np.array([0] * 8 + [1] * 2)
    assert adaptive_calibration_error(labels, scores, bins=5) == pytest.approx(0)
    assert adaptive_calibration_error(labels[::-1], scores, bins=5) == pytest.approx(0)


def test_a_confident_model_that_is_always_right_is_perfect_and_always_wrong_is_worst() -> None:
    sure = np.eye(3)[[0, 1, 2, 0]]
    assert expected_calibration_error([0, 1, 2, 0], sure) == 0
    assert expected_calibration_error([1, 2, 0, 1], sure) == 1
    assert brier_score([0, 1, 2, 0], sure) == 0
    assert brier_score([1, 2, 0, 1], sure) == 2


def test_a_bin_holds_its_upper_edge_but_not_its_lower() -> None:
    assert equal_width_bins(np.array([0.0, 0.1, 0.5, 0.5000001, 1.0]), 10).tolist() == [0, 0, 4, 5, 9]


def test_the_reliability_curve_by_hand() -> None:
    curve = reliability_curve([0, 1, 0, 0, 1], two_class([0.6, 0.7, 0.8, 0.9, 1.0]), bins=4)
    assert curve["low"].tolist() == [0, 0.25, 0.5, 0.75]
    assert curve["high"].tolist() == [0.25, 0.5, 0.75, 1]
    assert curve["count"].tolist() == [0, 0, 2, 3]
    assert curve["confidence"].to_numpy() == pytest.approx([np.nan, np.nan, 0.65, 0.9], nan_ok=True)
    assert curve["accuracy"].to_numpy() == pytest.approx([np.nan, np.nan, 0.5, 2 / 3], nan_ok=True)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), bins=st.integers(1, 30))
def test_the_curve_the_error_and_scikit_learns_brier_score_agree(seed: int, bins: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.dirichlet(np.ones(4), size=50)
    labels = generator.integers(4, size=50)
    curve = reliability_curve(labels, scores, bins).query("count > 0")
    gaps = (curve["count"] * (curve["accuracy"] - curve["confidence"]).abs()).sum() / 50
    assert expected_calibration_error(labels, scores, bins) == pytest.approx(gaps)
    assert curve["count"].sum() == 50
    assert ((curve["low"] < curve["confidence"]) & (curve["confidence"] <= curve["high"])).all()
    assert brier_score(labels, scores) == pytest.approx(
        brier_score_loss(labels, scores, labels=range(4), scale_by_half=False)
    )


def test_probabilities_that_speak_the_truth_have_a_small_error() -> None:
    generator = np.random.default_rng(0)
    scores = generator.dirichlet(np.ones(3), size=20_000)
    labels = (generator.random(20_000)[:, None] > scores.cumsum(axis=1)[:, :2]).sum(axis=1)
    assert expected_calibration_error(labels, scores) < 0.02
    assert adaptive_calibration_error(labels, scores) < 0.02
    overconfident = scores**4 / (scores**4).sum(axis=1, keepdims=True)
    assert expected_calibration_error(labels, overconfident) > 0.15


def test_no_bins_are_refused() -> None:
    for measure in (expected_calibration_error, adaptive_calibration_error, reliability_curve):
        with pytest.raises(ValueError, match="bins must be at least 1"):
            measure([0, 1], two_class([0.9, 0.8]), bins=0)
