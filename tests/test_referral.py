import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

import dualrefnet.evaluation.referral
from dualrefnet.evaluation.referral import measure_referral, referral_curve, referral_threshold, threshold_interval
from dualrefnet.runtime.calibration import malignancy


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(dualrefnet.evaluation.referral)
    assert (result.failed, result.attempted) == (0, 1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(2, 60), wanted=st.sampled_from([0.5, 0.8, 0.9, 0.95, 1.0]))
def test_it_is_the_largest_threshold_that_reaches_the_sensitivity(seed: int, images: int, wanted: float) -> None:
    generator = np.random.default_rng(seed)
    malignant, score = generator.random(images) < 0.5, generator.random(images).round(2)
    malignant[0], malignant[1] = True, False
    found = referral_threshold(malignant, score, wanted)
    assert found is not None
    # scikit-learn's thresholds fall, its sensitivities rise: the first that reaches.
    _, sensitivity, thresholds = roc_curve(malignant, score, drop_intermediate=False)
    assert found == thresholds[np.argmax(sensitivity >= wanted - 1e-12)]


def test_without_a_malignant_image_there_is_no_threshold() -> None:
    nothing, score = np.zeros(4, dtype=bool), np.linspace(0, 1, 4)
    assert referral_threshold(nothing, score, 0.95) is None
    assert threshold_interval(nothing, score, 0.95, np.arange(4), 10, 0, 0.95) is None
    for wrong in (0, 1.1):
        with pytest.raises(ValueError, match="sensitivity"):
            referral_threshold(~nothing, score, wrong)


def test_the_interval_of_the_threshold_agrees_with_choosing_it_on_every_laid_out_resample() -> None:
    generator = np.random.default_rng(4)
    groups = np.arange(60) // 2
    malignant, score = generator.random(60) < 0.4, generator.random(60).round(2)
    found = threshold_interval(malignant, score, 0.9, groups, 80, 6, 0.95)
    draws, chosen = np.random.default_rng(6), []
    for _ in range(80):
        rows = np.concatenate([np.flatnonzero(groups == group) for group in draws.integers(30, size=30)])
        chosen.append(referral_threshold(malignant[rows], score[rows], 0.9))
    assert found == pytest.approx(tuple(np.quantile(np.array(chosen, dtype=float), [0.025, 0.975])))


def test_what_referral_finds_by_hand() -> None:
    malignant = np.array([True, True, True, True, False, False, False, False, False, False])
    referred = np.array([True, True, True, False, True, False, False, False, False, True])
    result = measure_referral(malignant, referred, np.arange(10), 0.75, 0, 0, 0.95)
    assert result == {
        "sensitivity": 0.75,
        "specificity": pytest.approx(4 / 6),
        "referred": 0.5,
        "malignant": 4,
        "benign": 6,
        "missed": 1,
        "spared": 4,
        "reached": True,
    }
    assert measure_referral(malignant, referred, np.arange(10), 0.8, 0, 0, 0.95)["reached"] is False
    low, high = measure_referral(malignant, referred, np.arange(10), 0.8, 200, 0, 0.95)["sensitivity_ci95"]
    assert low < 0.75 < high
    nobody = measure_referral(np.zeros(10, dtype=bool), referred, np.arange(10), 0.8, 20, 0, 0.95)
    assert (nobody["sensitivity"], nobody["reached"]) == (None, None)
    assert "sensitivity_ci95" not in nobody


def test_a_threshold_chosen_on_some_patients_falls_short_on_others_about_half_of_the_time() -> None:
    generator, short = np.random.default_rng(0), []
    for _ in range(600):
        first, others = generator.beta(3, 1, 100), generator.beta(3, 1, 1000)
        threshold = referral_threshold(np.ones(100, dtype=bool), first, 0.9)
        short.append((others >= threshold).mean() < 0.9)
    assert 0.35 < np.mean(short) < 0.65


def test_the_curve_holds_what_each_threshold_gives() -> None:
    generator = np.random.default_rng(2)
    scores = generator.dirichlet(np.ones(4), 50)
    cancer = np.array([True, False, True, False])
    score, malignant = malignancy(scores, cancer), generator.random(50) < 0.4
    assert score == pytest.approx(scores[:, 0] + scores[:, 2])
    curve = referral_curve(malignant, score, np.arange(50), 0.4, 0.9, samples=30)
    row = curve.table.iloc[40]
    assert row["threshold"] == 0.4
    assert (row["sensitivity"], row["specificity"]) == (curve.sensitivity, curve.specificity)
    assert curve.sensitivity == pytest.approx((score[malignant] >= 0.4).mean())
    assert curve.specificity == pytest.approx((score[~malignant] < 0.4).mean())
    assert row["referred"] == pytest.approx((score >= 0.4).mean())
    assert (curve.table["sensitivity"].diff().dropna() <= 0).all()
    assert len(curve.table) == 101
    with pytest.raises(ValueError, match="nothing to draw"):
        referral_curve(np.zeros(50, dtype=bool), score, np.arange(50), 0.4, 0.9)
