import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score

from dualrefnet.evaluation.referral import TABLE, measure_selective


def example(
    seed: int, images: int = 80, count: int = 3
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(count, size=images)
    # Two decimals, so that confidences are tied.
    scores = generator.dirichlet(np.ones(count), images).round(2)
    scores[:, -1] = 1 - scores[:, :-1].sum(axis=1)
    scores = np.abs(scores)
    return labels, scores / scores.sum(axis=1, keepdims=True), np.arange(images) // 2


def test_the_curve_and_its_area_by_hand() -> None:
    # From the surest down: right, wrong, right, right.
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    result = measure_selective([0, 1, 1, 0], scores, np.arange(4), ["A", "B"], [25, 50, 75, 100], samples=0)
    assert result.table["images"].tolist() == [1, 2, 3, 4]
    assert result.table["accuracy"].tolist() == pytest.approx([1, 0.5, 2 / 3, 0.75])
    assert result.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert result.table["threshold"].tolist() == [0.9, 0.8, 0.7, 0.6]
    # At 25% no image of B is answered; at 50% A 1/1, B 0/1; then B 1/2.
    assert result.table["balanced_accuracy"].tolist() == pytest.approx([np.nan, 0.5, 0.75, 0.75], nan_ok=True)
    assert result.table["answered:B"].tolist() == [0, 1, 2, 2]
    assert result.aurc_interval is None
    assert result.table["accuracy_low"].isna().all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_share_equals_measuring_the_answered_images_alone(seed: int) -> None:
    labels, scores, groups = example(seed)
    result = measure_selective(labels, scores, groups, list("ABC"), TABLE, samples=0)
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    for row in result.table.to_dict("records"):
        chosen = confidence >= row["threshold"]
        assert chosen.sum() == row["images"]
        assert row["share"] >= row["percent"] / 100
        # One threshold higher wouldn't be enough.
        assert (confidence > row["threshold"]).sum() * 100 < row["percent"] * len(labels)
        assert row["accuracy"] == pytest.approx(right[chosen].mean())
        if set(labels[chosen]) == set(labels):
            assert row["balanced_accuracy"] == pytest.approx(
                balanced_accuracy_score(labels[chosen], scores[chosen].argmax(axis=1))
            )
        else:
            assert np.isnan(row["balanced_accuracy"])


def test_the_bands_agree_with_measuring_every_laid_out_resample() -> None:
    labels, scores, groups = example(7)
    result = measure_selective(labels, scores, groups, list("ABC"), [100, 60], samples=70, seed=3)
    generator, drawn = np.random.default_rng(3), []
    for _ in range(70):
        rows = np.concatenate([np.flatnonzero(groups == group) for group in generator.integers(40, size=40)])
        one = measure_selective(labels[rows], scores[rows], np.arange(len(rows)), list("ABC"), [100, 60], samples=0)
        drawn.append([*one.table["accuracy"], *one.table["balanced_accuracy"], one.aurc])
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    table = result.table
    assert [*table["accuracy_low"], *table["balanced_accuracy_low"]] == pytest.approx(low[:4])
    assert [*table["accuracy_high"], *table["balanced_accuracy_high"]] == pytest.approx(high[:4])
    assert result.aurc_interval == pytest.approx((low[4], high[4]))


def test_confidence_that_says_nothing_gives_the_error_rate_everywhere() -> None:
    labels = np.array([0, 1] * 50)
    result = measure_selective(labels, np.tile([0.6, 0.4], (100, 1)), np.arange(100), ["A", "B"], samples=0)
    assert (result.table["images"] == 100).all()
    assert (result.table["accuracy"] == 0.5).all()
    assert result.aurc == 0.5


def test_the_json_is_strict_and_wrong_shares_are_refused() -> None:
    labels, scores, groups = example(1)
    values = json.loads(
        json.dumps(measure_selective(labels, scores, groups, list("ABC"), TABLE, samples=20).to_json(), allow_nan=False)
    )
    assert [row["percent"] for row in values["table"]] == [100, 90, 80, 70, 50]
    assert values["table"][0]["answered"] == dict(zip("ABC", np.bincount(labels).tolist(), strict=True))
    low, high = values["table"][0]["accuracy_ci95"]
    assert low <= values["table"][0]["accuracy"] <= high
    for wrong in ([0], [101], []):
        with pytest.raises(ValueError, match="1 to 100"):
            measure_selective(labels, scores, groups, list("ABC"), wrong)
