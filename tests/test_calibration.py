import doctest
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss, roc_curve

import dualrefnet.evaluation.calibration
import dualrefnet.runtime.calibration
from dualrefnet.evaluation.bootstrap import Bootstrap
from dualrefnet.evaluation.calibration import (
    ERRORS,
    HIGHEST,
    LOWEST,
    Calibration,
    can_guarantee,
    class_thresholds,
    compare_errors,
    conformal_threshold,
    fit_calibration,
    fit_temperature,
    measure_calibrated,
    measure_sets,
    referral_threshold,
    temperature_interval,
    threshold_interval,
)
from dualrefnet.run import Run
from dualrefnet.runtime.calibration import apply_temperature, prediction_sets
from resampling import Floats, adaptive_ece, brier, ece, lay_out, truthful

CLASSES = ["A", "B", "MEL"]


def overconfident(seed: int, images: int) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64]]:
    """Labels and probabilities whose temperature is 2, and two images a patient."""
    return *truthful(seed, images, overconfidence=2), np.arange(images) // 2


def test_the_examples_in_the_docstrings_are_true() -> None:
    for module, count in ((dualrefnet.evaluation.calibration, 3), (dualrefnet.runtime.calibration, 1)):
        result = doctest.testmod(module)
        assert (result.failed, result.attempted) == (0, count)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), images=st.integers(20, 60), count=st.integers(2, 8))
def test_the_temperature_is_the_minimum_that_scipy_finds_and_keeps_the_top_class(
    seed: int, images: int, count: int
) -> None:
    labels, scores = truthful(seed, images, count)
    found = fit_temperature(labels, scores)
    assert (apply_temperature(scores, found).argmax(axis=1) == scores.argmax(axis=1)).all()

    def loss(logarithm: float) -> float:
        return float(log_loss(labels, apply_temperature(scores, np.exp(logarithm)), labels=range(count)))

    if (scores.argmax(axis=1) == labels).all():
        assert found == 1
        return
    best = minimize_scalar(loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded", options={"xatol": 1e-8})
    assert loss(np.log(found)) <= best.fun + 1e-9


def test_a_planted_temperature_is_found_again() -> None:
    for planted in (0.5, 1.0, 2.5):
        assert fit_temperature(*truthful(0, 20_000, 5, planted)) == pytest.approx(planted, rel=0.03)
    with pytest.raises(ValueError, match="above 0"):
        apply_temperature([[0.5, 0.5]], 0)


def test_the_intervals_of_both_fits_are_those_of_refitting_every_laid_out_resample() -> None:
    labels, scores, _ = overconfident(3, 120)
    groups = np.arange(120) // 3
    malignant, score = labels == 2, scores[:, 2].round(2)
    draws, bootstrap = lay_out(groups, 100, 5), Bootstrap(groups, 100, 5)
    fitted = [fit_temperature(labels[rows], scores[rows]) for rows in draws]
    found = temperature_interval(labels, scores, bootstrap)
    assert found == pytest.approx(np.quantile(fitted, [0.025, 0.975]), rel=1e-3)
    chosen = np.array([referral_threshold(malignant[rows], score[rows], 0.9) for rows in draws], dtype=float)
    found = threshold_interval(malignant, score, 0.9, bootstrap)
    assert found == pytest.approx(np.quantile(chosen, [0.025, 0.975]))
    assert temperature_interval([0, 1], [[0.9, 0.1], [0.2, 0.8]], Bootstrap([0, 1], 5)) is None
    assert threshold_interval(malignant & False, score, 0.9, bootstrap) is None


def test_the_conformal_threshold_is_the_textbook_quantile_of_the_scores() -> None:
    values = np.random.default_rng(0).random(99)
    for coverage in (0.5, 0.8, 0.9, 0.95):
        # Angelopoulos and Bates 2023, section 1: the ceil((n + 1)(1 - alpha)) / n quantile of 1 - p.
        quantile = np.quantile(1 - values, np.ceil(100 * coverage - 1e-9) / 99, method="inverted_cdf")
        assert 1 - conformal_threshold(values, coverage) == pytest.approx(quantile)
    assert conformal_threshold(np.arange(1, 10) / 10, 0.9) == 0.1
    assert conformal_threshold(np.arange(1, 9) / 10, 0.9) == conformal_threshold([], 0.9) == 0
    enough = [can_guarantee(*pair) for pair in ((9, 0.9), (8, 0.9), (19, 0.95), (18, 0.95))]
    assert enough == [True, False, True, False]
    for wrong in (0, 1, 1.2):
        with pytest.raises(ValueError, match="coverage"):
            conformal_threshold([0.5], wrong)


def test_exchangeable_images_are_covered_as_often_as_guaranteed_and_hardly_more() -> None:
    """The coverage over draws of calibration and test images lies between the wanted one and 1 / (n + 1) above it."""
    generator = np.random.default_rng(1)
    draws = generator.beta(2, 1, (4000, 31))
    held = [values[-1] >= conformal_threshold(values[:-1], 0.9) for values in draws]
    error = 3 * np.sqrt(0.9 * 0.1 / 4000)
    assert 0.9 - error <= np.mean(held) <= 0.9 + 1 / 31 + error


def test_thresholds_by_class_cover_a_rare_hard_class_where_one_threshold_does_not() -> None:
    generator = np.random.default_rng(2)

    def draw(images: int) -> tuple[NDArray[np.int64], Floats]:
        labels = (generator.random(images) < 0.1).astype(np.int64)
        # The rare class 1 is given little probability.
        mine = np.where(labels == 1, generator.beta(1, 4, images), generator.beta(8, 1, images))
        return labels, np.where(np.eye(2)[labels] == 1, mine[:, None], 1 - mine[:, None])

    labels, scores = draw(5000)
    one = conformal_threshold(scores[np.arange(5000), labels], 0.9)
    each = class_thresholds(labels, scores, 0.9)
    truth, test = draw(20_000)
    for thresholds, expected in ((one, False), (each, True)):
        held = prediction_sets(test, thresholds)[np.arange(20_000), truth]
        assert (abs(held[truth == 1].mean() - 0.9) < 0.03) == expected


def test_the_measures_of_sets_by_hand() -> None:
    scores = np.array([[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [0.34, 0.33, 0.33], [0.1, 0.6, 0.3]])
    sets = prediction_sets(scores, 0.35)
    result = measure_sets(np.array([0, 1, 2, 2]), sets, 1, Bootstrap(np.arange(4), 0), CLASSES, 0.9)
    per_class = result.pop("per_class")
    # Sets {A}, {A, B}, {} -> {A}, {B}: the first two hold the right class.
    expected = {"coverage": 0.5, "mean_size": 1.25, "singletons": 0.75, "filled": 1, "promise": None}
    assert result == {**expected, "sizes": [3, 1, 0]}
    assert per_class["MEL"] == {"coverage": 0, "mean_size": 1, "images": 2}


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), images=st.integers(2, 60), wanted=st.sampled_from([0.5, 0.8, 0.9, 0.95, 1.0]))
def test_the_referral_threshold_is_the_largest_that_reaches_the_sensitivity(
    seed: int, images: int, wanted: float
) -> None:
    generator = np.random.default_rng(seed)
    malignant, score = generator.random(images) < 0.5, generator.random(images).round(2)
    malignant[0], malignant[1] = True, False
    # scikit-learn's thresholds fall, its sensitivities rise: the first that reaches.
    _, sensitivity, thresholds = roc_curve(malignant, score, drop_intermediate=False)
    assert referral_threshold(malignant, score, wanted) == thresholds[np.argmax(sensitivity >= wanted - 1e-12)]
    assert referral_threshold(malignant & False, score, wanted) is None
    for wrong in (0, 1.1):
        with pytest.raises(ValueError, match="sensitivity"):
            referral_threshold(malignant, score, wrong)


def test_a_fitted_calibration_survives_its_json_and_keeps_its_guarantees() -> None:
    labels, scores, groups = overconfident(0, 4000)
    calibration = fit_calibration(labels, scores, Bootstrap(groups, 50), CLASSES, ["MEL"])
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json(), allow_nan=False))) == calibration
    assert calibration.temperature == pytest.approx(2, rel=0.1)
    low, high = calibration.temperature_interval or (0, 0)
    assert 1 < low < calibration.temperature < high
    assert (calibration.images, calibration.groups) == (4000, 2000)
    # On the images of the fit the guarantees hold by construction.
    rows = np.arange(4000)
    calibrated = calibration.probabilities(scores)
    assert prediction_sets(calibrated, calibration.threshold)[rows, labels].mean() >= 0.9
    by_class = prediction_sets(calibrated, calibration.thresholds(by_class=True))
    assert all(by_class[labels == index, index].mean() >= 0.9 for index in range(3))
    referred = calibration.refer(scores)
    assert referred is not None
    assert referred[labels == 2].mean() >= 0.95
    assert (referred == (apply_temperature(scores, calibration.temperature)[:, 2] >= calibration.referral)).all()
    without = fit_calibration(labels, scores, Bootstrap(groups, 0), CLASSES, ["MEL"])
    assert replace(calibration, temperature_interval=None, referral_interval=None) == without
    assert Calibration.from_json(json.loads(json.dumps(without.to_json()))) == without
    text = json.dumps(measure_calibrated(without, labels, scores, Bootstrap(groups, 0)), allow_nan=False)
    assert "ci95" not in text
    assert "chance" not in text


def test_weaknesses_of_a_fit_are_noted() -> None:
    labels, scores, groups = np.repeat([0, 1], 12), np.tile([0.5, 0.3, 0.2], (24, 1)), np.arange(24)
    none = fit_calibration(labels, scores, Bootstrap(groups, 0), CLASSES, [])
    assert (none.referral, none.refer(scores), none.class_thresholds["MEL"]) == (None, None, 0)
    assert Calibration.from_json(none.to_json()) == none
    unseen = fit_calibration(labels, scores, Bootstrap(groups, 10), CLASSES, ["MEL"])
    assert unseen.referral is None
    assert measure_calibrated(unseen, labels, scores, Bootstrap(groups, 10))["referral"] is None
    right = fit_calibration([0, 1], [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]], Bootstrap([0, 1], 10), CLASSES, ["B"])
    assert right.temperature == 1
    wrong = [[0.1, 0.8, 0.1]] * 2 + [[0.8, 0.1, 0.1]] * 2
    useless = fit_calibration([0, 0, 1, 2], wrong, Bootstrap(range(4), 0), CLASSES, [])
    for calibration, text in (
        (none, "MEL (0)"),
        (none, "no malignant class"),
        (unseen, "no validation image is malignant"),
        (right, "every validation image is right"),
        (useless, "end of its range"),
    ):
        assert any(text in remark for remark in calibration.remarks)


def test_a_file_that_is_no_calibration_is_refused() -> None:
    for values in ({}, {"classes": ["A"]}, {"fitted_on": None, "conformal": {}, "referral": None}):
        with pytest.raises(ValueError, match="isn't a calibration"):
            Calibration.from_json(values)


def test_the_errors_before_and_after_and_their_intervals_are_those_of_laid_out_resamples() -> None:
    labels, scores, groups = overconfident(4, 90)
    # Two decimals, so that confidences are tied.
    scores = np.maximum(scores, 0.01).round(2)
    scores /= scores.sum(axis=1, keepdims=True)
    warm = apply_temperature(scores, 1.7)

    def measure(rows: NDArray[np.int64]) -> list[list[float]]:
        functions = (ece, adaptive_ece, brier)
        both = [
            [
                *(function(labels[rows], one[rows]) for function in functions),
                log_loss(labels[rows], one[rows], labels=range(3)),
            ]
            for one in (scores, warm)
        ]
        return [*both, np.subtract(both[1], both[0]).tolist()]

    found = compare_errors(labels, scores, warm, Bootstrap(groups, 60, 8))
    bounds = np.quantile([measure(rows) for rows in lay_out(groups, 60, 8)], [0.025, 0.975], axis=0)
    points = measure(np.arange(90))
    for row, name in enumerate(("before", "after", "difference")):
        for column, key in enumerate(ERRORS):
            assert found[name][key] == pytest.approx(points[row][column], abs=1e-12)
            assert found[name][f"{key}_ci95"] == pytest.approx(bounds[:, row, column].tolist()), (name, key)


def test_a_run_holds_what_its_validation_predictions_give(tiny_run: Run) -> None:
    calibration, classes = tiny_run.calibration, tiny_run.model["classes"]
    rows = tiny_run.predictions.query("split == 'val'")
    labels = rows["label"].map(classes.index).to_numpy()
    scores = rows[[f"prob_{name}" for name in classes]].to_numpy()
    groups = tiny_run.split.set_index("image_id")["patient_id"].loc[rows["image_id"]].to_numpy()
    malignant, seed = tiny_run.model["malignant"], tiny_run.recipe.seed
    again = fit_calibration(labels, scores, Bootstrap(groups, 50, seed), classes, malignant)
    # Reading a CSV may change the last digit of a number.
    for key in ("temperature", "temperature_interval", "threshold", "class_thresholds", "referral", "sensitivity"):
        assert getattr(again, key) == pytest.approx(getattr(calibration, key), rel=1e-6), key
    for key in ("per_class", "groups", "remarks"):
        assert getattr(again, key) == getattr(calibration, key)
    values = tiny_run.metrics["calibrated"]
    assert values["temperature"] == calibration.temperature
    for key in ("ece", "log_loss"):
        assert values["before"][key] == pytest.approx(tiny_run.metrics[key])
    assert values["conformal"]["promised"] == tiny_run.recipe.evaluation.coverage == 0.9
    assert values["selective"]["table"][0]["accuracy"] == pytest.approx(tiny_run.metrics["accuracy"])
