import doctest
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

import dualrefnet.evaluation.metrics
from dualrefnet.evaluation.comparison import flat_measures
from dualrefnet.evaluation.metrics import (
    CLASS_MEASURES,
    HEADLINE_MEASURES,
    CalibrationErrors,
    WeightedMetrics,
    compute_metrics,
    equal_width_bins,
    metrics_from_confusion,
)
from resampling import CLASSES, Floats, adaptive_ece, ece, predictions


def names(count: int) -> list[str]:
    return [f"C{index}" for index in range(count)]


def two_class(confidence: list[float]) -> Floats:
    return np.array([[value, 1 - value] for value in confidence])


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(dualrefnet.evaluation.metrics)
    assert (result.failed, result.attempted) == (0, 2)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 6), images=st.integers(12, 80))
def test_every_metric_agrees_with_scikit_learn(seed: int, count: int, images: int) -> None:
    labels, scores = predictions(seed, images, count)
    predicted, measured = scores.argmax(axis=1), compute_metrics(labels, scores, names(count))
    binary = [((labels == index).astype(int), predicted == index) for index in range(count)]
    aucs = [sk.roc_auc_score(target, scores[:, index]) for index, (target, _) in enumerate(binary)]
    specificity = [sk.recall_score(target, called, pos_label=0) for target, called in binary]
    npv = [sk.precision_score(target, called, pos_label=0, zero_division=0) for target, called in binary]
    f1 = [sk.f1_score(target, called, zero_division=0) for target, called in binary]
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "auc_macro_ovr": np.mean(aucs),
        "auc_weighted_ovr": np.average(aucs, weights=np.bincount(labels)),
        "specificity_macro": np.mean(specificity),
        "npv_macro": np.mean(npv),
        "kappa": sk.cohen_kappa_score(labels, predicted),
        "brier": sk.brier_score_loss(labels, scores, labels=range(count), scale_by_half=False),
        "log_loss": sk.log_loss(labels, scores, labels=range(count)),
        "support": images,
    }
    for average in ("macro", "weighted"):
        for name, score in (("f1", sk.f1_score), ("precision", sk.precision_score), ("recall", sk.recall_score)):
            expected[f"{name}_{average}"] = score(labels, predicted, average=average, zero_division=0)
    if len(set(predicted)) > 1:
        expected["mcc"] = sk.matthews_corrcoef(labels, predicted)
    assert {key: measured[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert [values["auc"] for values in measured["per_class"].values()] == pytest.approx(aucs, abs=1e-12)
    assert [values["f1"] for values in measured["per_class"].values()] == pytest.approx(f1, abs=1e-12)
    assert measured["confusion_matrix"] == sk.confusion_matrix(labels, predicted, labels=range(count)).tolist()


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), images=st.integers(2, 40), patients=st.integers(2, 8))
def test_a_weighted_resample_measures_what_the_laid_out_resample_measures(
    seed: int, images: int, patients: int
) -> None:
    labels, scores = predictions(seed, images)
    generator = np.random.default_rng(seed)
    groups = np.concatenate([np.arange(patients), generator.integers(patients, size=images)])[:images]
    weights = generator.integers(0, 4, size=groups.max() + 1)
    weights[0] += 1
    rows = np.repeat(np.arange(images), weights[groups])
    expected = flat_measures(compute_metrics(labels[rows], scores[rows], CLASSES, malignant=["C"]))
    measured = WeightedMetrics(labels, scores, groups, CLASSES, ["C"]).measure(weights[None].astype(float))
    assert {key: column[0] for key, column in measured.items()} == pytest.approx(
        {key: expected[key] for key in measured}, nan_ok=True
    )
    errors = CalibrationErrors(labels, scores, groups, groups.max() + 1).measure(weights[None].astype(float))
    assert errors["adaptive_ece"][0] == pytest.approx(adaptive_ece(labels[rows], scores[rows]))
    for key in ("ece", "brier", "log_loss"):
        assert errors[key][0] == pytest.approx(expected[key])


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 6), images=st.integers(1, 40))
def test_identities_hold_and_the_result_is_strict_json_whatever_classes_are_missing(
    seed: int, count: int, images: int
) -> None:
    labels, scores = (values[count:] for values in predictions(seed, images + count, count))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = compute_metrics(labels, scores, names(count), malignant=["C0"])
    assert measured["recall_weighted"] == pytest.approx(measured["accuracy"])
    assert measured["recall_macro"] == measured["balanced_accuracy"]
    assert list(measured)[: len(HEADLINE_MEASURES)] == list(HEADLINE_MEASURES)
    assert all(list(values) == list(CLASS_MEASURES) for values in measured["per_class"].values())
    for key in ("support", "predicted"):
        assert sum(values[key] for values in measured["per_class"].values()) == images
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    undefined = [key for key in HEADLINE_MEASURES if measured[key] is None]
    undefined += [key for values in measured["per_class"].values() for key in CLASS_MEASURES if values[key] is None]
    assert not undefined or measured["remarks"]


def test_malignant_versus_benign_is_scikit_learns_binary_problem() -> None:
    labels, scores = predictions(3, 200, 5)
    measured = compute_metrics(labels, scores, names(5), malignant=["C1", "C4"])
    target, predicted = np.isin(labels, [1, 4]), np.isin(scores.argmax(axis=1), [1, 4])
    expected = {
        "sensitivity": sk.recall_score(target, predicted),
        "specificity": sk.recall_score(target, predicted, pos_label=0),
        "ppv": sk.precision_score(target, predicted),
        "npv": sk.precision_score(target, predicted, pos_label=0),
        "auc": sk.roc_auc_score(target, scores[:, [1, 4]].sum(axis=1)),
        "support": int(target.sum()),
    }
    assert measured["malignant"] == pytest.approx(expected)
    assert measured["remarks"] == []
    assert "malignant" not in compute_metrics(labels, scores, names(5))


def test_a_class_absent_from_the_test_set_is_none_and_leaves_the_averages() -> None:
    # B is absent, but predicted once; C is present, but never predicted.
    measured = metrics_from_confusion([[3, 1, 0], [0, 0, 0], [2, 0, 0]], CLASSES)
    assert measured["per_class"]["B"]["sensitivity"] is None
    assert measured["per_class"]["B"]["ppv"] == 0
    assert measured["per_class"]["C"]["ppv"] is None
    assert measured["balanced_accuracy"] == pytest.approx((3 / 4 + 0) / 2)
    assert measured["precision_macro"] == pytest.approx((3 / 5 + 0) / 2)
    assert len(measured["remarks"]) == 2


def test_calibration_errors_by_hand() -> None:
    # Bins of .25: (.5, .75] holds .6 right and .7 wrong: |.5 - .65| = .15; (.75, 1] holds .8 right, .9 right, 1 wrong:
    # |2/3 - .9|.
    scores = two_class([0.6, 0.7, 0.8, 0.9, 1.0])
    expected = 2 / 5 * 0.15 + 3 / 5 * (0.9 - 2 / 3)
    assert ece([0, 1, 0, 0, 1], scores, bins=4) == pytest.approx(expected)
    # Three bins of equal mass: (.6 right, .7 wrong), (.8 right, .85 right), (.9 right, .95 wrong).
    scores = two_class([0.95, 0.6, 0.85, 0.7, 0.8, 0.9])
    expected = 2 / 6 * (abs(0.5 - 0.65) + abs(1 - 0.825) + abs(0.5 - 0.925))
    assert adaptive_ece([1, 0, 0, 1, 0, 0], scores, bins=3) == pytest.approx(expected)
    # Equal confidences share a bin of equal mass, whatever their order.
    labels = np.array([0] * 8 + [1] * 2)
    for ordered in (labels, labels[::-1]):
        assert adaptive_ece(ordered, two_class([0.8] * 10), bins=5) == pytest.approx(0)
    assert equal_width_bins(np.array([0.0, 0.1, 0.5, 0.5000001, 1.0]), 10).tolist() == [0, 0, 4, 5, 9]
    for measure in (ece, adaptive_ece):
        with pytest.raises(ValueError, match="bins must be at least 1"):
            measure([0, 1], two_class([0.9, 0.8]), bins=0)


GOOD = np.array([[0.9, 0.1], [0.2, 0.8]])


@pytest.mark.parametrize(
    ("labels", "probabilities", "classes", "message"),
    [
        ([0], GOOD, "AB", "one for each row"),
        ([0, 1], GOOD[0], "AB", "shape"),
        ([0, 1], GOOD, "ABC", "2 columns for 3 classes"),
        ([0, 2], GOOD, "AB", r"lie in 0\.\.1"),
        ([-1, 1], GOOD, "AB", r"lie in 0\.\.1"),
        ([0.0, 1.0], GOOD, "AB", "whole numbers"),
        ([0, 1], GOOD * [[np.nan], [1]], "AB", "1 rows of probabilities hold NaN"),
        ([0, 1], [[2.0, -1.0], [0.5, 0.5]], "AB", "softmax"),
        ([0, 1], [[0.5, 0.5], [0.5, 0.4]], "AB", "row 1"),
        (np.zeros(0, int), np.zeros((0, 2)), "AB", "no rows"),
        ([0, 1], GOOD, "AA", "named twice"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(
    labels: object, probabilities: object, classes: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compute_metrics(labels, probabilities, list(classes))  # type: ignore[arg-type]


def test_an_unknown_malignant_class_and_a_wrong_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match="malignant names no class: X"):
        compute_metrics([0, 1], GOOD, ["A", "B"], malignant=["X"])
    wrong = {
        "shape": [[1, 2]],
        "at least 0": [[1, -1], [0, 1]],
        "whole": [[0.5, 1], [0, 1]],
        "no rows": [[0, 0], [0, 0]],
    }
    for message, matrix in wrong.items():
        with pytest.raises(ValueError, match=message):
            metrics_from_confusion(matrix, ["A", "B"])
