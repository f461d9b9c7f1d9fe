import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score

from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.referral import TABLE, draw_referral, measure_selective, referral_curve
from dualrefnet.runtime.calibration import malignancy
from readable import assert_readable
from resampling import CLASSES, Floats, lay_out, predictions


def example(seed: int, images: int = 80, count: int = 3) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64]]:
    """Labels, probabilities with tied confidences, and two images a patient."""
    return *predictions(seed, images, count), np.arange(images) // 2


def test_the_curve_holds_what_each_threshold_gives_and_the_figure_shows_the_one_in_use() -> None:
    generator = np.random.default_rng(2)
    scores = generator.dirichlet(np.ones(4), 50)
    score, malignant = malignancy(scores, np.array([True, False, True, False])), generator.random(50) < 0.4
    assert score == pytest.approx(scores[:, 0] + scores[:, 2])
    for interval in (None, (0.1, 0.6)):
        curve = referral_curve(malignant, score, Bootstrap(np.arange(50), 30), 0.4, 0.9, interval)
        row = curve.table.iloc[40]
        assert row["threshold"] == 0.4
        assert (row["sensitivity"], row["specificity"]) == (curve.sensitivity, curve.specificity)
        assert curve.sensitivity == pytest.approx((score[malignant] >= 0.4).mean())
        assert curve.specificity == pytest.approx((score[~malignant] < 0.4).mean())
        assert row["referred"] == pytest.approx((score >= 0.4).mean())
        assert row["sensitivity_low"] < row["sensitivity"] < row["sensitivity_high"]
        assert (curve.table["sensitivity"].diff().dropna() <= 0).all()
        figure = draw_referral(curve)
        assert_readable(figure)
        axis = figure.figure.axes[0]
        dots = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line.get_marker() == "o"]
        assert dots == [(0.4, curve.sensitivity), (0.4, curve.specificity)]
        assert len(axis.patches) == (interval is not None)
    with pytest.raises(ValueError, match="nothing to draw"):
        referral_curve(malignant & False, score, Bootstrap(np.arange(50), 0), 0.4, 0.9)


def test_selective_prediction_by_hand() -> None:
    # From the most confident down: right, wrong, right, right.
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    result = measure_selective([0, 1, 1, 0], scores, Bootstrap(np.arange(4), 0), ["A", "B"], [25, 50, 75, 100])
    assert result.table["images"].tolist() == [1, 2, 3, 4]
    assert result.table["accuracy"].tolist() == pytest.approx([1, 0.5, 2 / 3, 0.75])
    assert result.aurc.value == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert result.table["threshold"].tolist() == [0.9, 0.8, 0.7, 0.6]
    # At 25% no image of B is predicted; at 50% A 1/1, B 0/1; then B 1/2.
    assert result.table["balanced_accuracy"].tolist() == pytest.approx([np.nan, 0.5, 0.75, 0.75], nan_ok=True)
    assert result.table["answered:B"].tolist() == [0, 1, 2, 2]
    assert np.isnan([result.aurc.low, *result.table["accuracy_low"]]).all()


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_every_coverage_equals_measuring_the_predicted_images_alone(seed: int) -> None:
    labels, scores, groups = example(seed)
    result = measure_selective(labels, scores, Bootstrap(groups, 0), CLASSES, TABLE)
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    for row in result.table.to_dict("records"):
        chosen = confidence >= row["threshold"]
        assert chosen.sum() == row["images"]
        assert row["share"] >= row["percent"] / 100
        # One threshold higher wouldn't be enough.
        assert (confidence > row["threshold"]).sum() * 100 < row["percent"] * len(labels)
        assert row["accuracy"] == pytest.approx(right[chosen].mean())
        recall = balanced_accuracy_score(labels[chosen], scores[chosen].argmax(axis=1))
        expected = recall if set(labels[chosen]) == set(labels) else np.nan
        assert row["balanced_accuracy"] == pytest.approx(expected, nan_ok=True)


def test_the_bands_are_those_of_measuring_every_laid_out_resample() -> None:
    labels, scores, groups = example(7)
    result = measure_selective(labels, scores, Bootstrap(groups, 70, 3), CLASSES, [100, 60])
    drawn = []
    for rows in lay_out(groups, 70, 3):
        one = measure_selective(labels[rows], scores[rows], Bootstrap(np.arange(len(rows)), 0), CLASSES, [100, 60])
        drawn.append([*one.table["accuracy"], *one.table["balanced_accuracy"], one.aurc.value])
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    table = result.table
    assert [*table["accuracy_low"], *table["balanced_accuracy_low"], result.aurc.low] == pytest.approx(low)
    assert [*table["accuracy_high"], *table["balanced_accuracy_high"], result.aurc.high] == pytest.approx(high)


def test_the_json_is_strict_and_wrong_coverages_are_refused() -> None:
    labels, scores, groups = example(1)
    result = measure_selective(labels, scores, Bootstrap(groups, 20), CLASSES, TABLE)
    values = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert [row["percent"] for row in values["table"]] == [100, 90, 80, 70, 50]
    assert values["table"][0]["answered"] == dict(zip(CLASSES, np.bincount(labels).tolist(), strict=True))
    low, high = values["table"][0]["accuracy_ci95"]
    assert low <= values["table"][0]["accuracy"] <= high
    for wrong in ([0], [101], []):
        with pytest.raises(ValueError, match="1 to 100"):
            measure_selective(labels, scores, Bootstrap(groups, 0), CLASSES, wrong)
