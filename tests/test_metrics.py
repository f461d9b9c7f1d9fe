import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as sk

from dualrefnet.display.format import MEASURE_NAMES, metrics_tables
from dualrefnet.evaluation.bootstrap import bootstrap_intervals, with_intervals
from dualrefnet.evaluation.metrics import CLASS_MEASURES, HEADLINE_MEASURES, compute_metrics, metrics_from_confusion


def random_predictions(
    seed: int, images: int, count: int, every_class: bool = True
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(count, size=images)
    if every_class:
        labels[:count] = np.arange(count)
    # Few distinct scores: ties must be handled, too.
    scores = generator.integers(1, 6, size=(images, count)).astype(float)
    scores[np.arange(images), labels] += generator.integers(0, 6, size=images)
    return labels, scores / scores.sum(axis=1, keepdims=True)


def names(count: int) -> list[str]:
    return [f"C{index}" for index in range(count)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 6), images=st.integers(12, 80))
def test_every_measure_agrees_with_scikit_learn(seed: int, count: int, images: int) -> None:
    labels, scores = random_predictions(seed, images, count)
    predicted = scores.argmax(axis=1)
    measured = compute_metrics(labels, scores, names(count))
    f1 = {
        average: sk.f1_score(labels, predicted, average=average, zero_division=0) for average in ("macro", "weighted")
    }
    precision = {
        average: sk.precision_score(labels, predicted, average=average, zero_division=0)
        for average in ("macro", "weighted")
    }
    recall = {
        average: sk.recall_score(labels, predicted, average=average, zero_division=0)
        for average in ("macro", "weighted")
    }
    binary = [(labels == index).astype(int) for index in range(count)]
    aucs = [sk.roc_auc_score(truth, scores[:, index]) for index, truth in enumerate(binary)]
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "auc_macro_ovr": np.mean(aucs),
        "auc_weighted_ovr": np.average(aucs, weights=np.bincount(labels)),
        "f1_macro": f1["macro"],
        "f1_weighted": f1["weighted"],
        "precision_macro": precision["macro"],
        "precision_weighted": precision["weighted"],
        "recall_macro": recall["macro"],
        "recall_weighted": recall["weighted"],
        "specificity_macro": np.mean(
            [sk.recall_score(truth, predicted == c, pos_label=0) for c, truth in enumerate(binary)]
        ),
        "npv_macro": np.mean(
            [sk.precision_score(truth, predicted == c, pos_label=0, zero_division=0) for c, truth in enumerate(binary)]
        ),
        "kappa": sk.cohen_kappa_score(labels, predicted),
        "log_loss": sk.log_loss(labels, scores, labels=range(count)),
        "support": images,
    }
    assert {key: measured[key] for key in expected} == pytest.approx(expected)
    if measured["mcc"] is not None:
        assert measured["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, predicted))
    for index, name in enumerate(names(count)):
        assert measured["per_class"][name]["auc"] == pytest.approx(aucs[index])
        assert measured["per_class"][name]["f1"] == pytest.approx(
            sk.f1_score(binary[index], predicted == index, zero_division=0)
        )
    assert measured["confusion_matrix"] == sk.confusion_matrix(labels, predicted, labels=range(count)).tolist()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 6), images=st.integers(1, 40))
def test_identities_hold_and_the_result_is_strict_json_whatever_classes_are_missing(
    seed: int, count: int, images: int
) -> None:
    labels, scores = random_predictions(seed, images, count, every_class=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = compute_metrics(labels, scores, names(count), malignant=["C0"])
    assert measured["recall_weighted"] == pytest.approx(measured["accuracy"])
    assert measured["recall_macro"] == measured["balanced_accuracy"]
    assert list(measured)[: len(HEADLINE_MEASURES)] == list(HEADLINE_MEASURES)
    assert all(list(values) == list(CLASS_MEASURES) for values in measured["per_class"].values())
    assert sum(values["support"] for values in measured["per_class"].values()) == images
    assert sum(values["predicted"] for values in measured["per_class"].values()) == images
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    undefined = [key for key in HEADLINE_MEASURES if measured[key] is None]
    undefined += [key for values in measured["per_class"].values() for key in CLASS_MEASURES if values[key] is None]
    assert not undefined or measured["remarks"]


def test_malignant_versus_benign_is_scikit_learns_binary_problem() -> None:
    labels, scores = random_predictions(3, 200, 5)
    measured = compute_metrics(labels, scores, names(5), malignant=["C1", "C4"])["malignant"]
    truth, predicted = np.isin(labels, [1, 4]), np.isin(scores.argmax(axis=1), [1, 4])
    assert measured == pytest.approx(
        {
            "sensitivity": sk.recall_score(truth, predicted),
            "specificity": sk.recall_score(truth, predicted, pos_label=0),
            "ppv": sk.precision_score(truth, predicted),
            "npv": sk.precision_score(truth, predicted, pos_label=0),
            "auc": sk.roc_auc_score(truth, scores[:, [1, 4]].sum(axis=1)),
            "support": int(truth.sum()),
        }
    )
    assert "malignant" not in compute_metrics(labels, scores, names(5))


def test_a_class_absent_from_the_test_set_is_none_and_leaves_the_averages() -> None:
    # B is absent, but predicted once; C is present, but never predicted.
    matrix = [[3, 1, 0], [0, 0, 0], [2, 0, 0]]
    measured = metrics_from_confusion(matrix, ["A", "B", "C"])
    assert measured["per_class"]["B"]["sensitivity"] is None
    assert measured["per_class"]["B"]["ppv"] == 0
    assert measured["per_class"]["C"]["ppv"] is None
    assert measured["balanced_accuracy"] == pytest.approx((3 / 4 + 0) / 2)
    assert measured["precision_macro"] == pytest.approx((3 / 5 + 0) / 2)
    assert any(remark.startswith("no image of B") and "2 classes present" in remark for remark in measured["remarks"])
    assert any(remark.startswith("C never predicted") for remark in measured["remarks"])


def test_one_class_and_one_answer_make_agreement_undefined_not_perfect() -> None:
    measured = compute_metrics([0, 0], [[0.9, 0.1], [0.6, 0.4]], ["A", "B"])
    assert measured["accuracy"] == 1
    assert measured["kappa"] is None
    assert measured["mcc"] is None
    assert measured["auc_macro_ovr"] is None
    assert measured["per_class"]["A"]["npv"] is None
    assert len(measured["remarks"]) >= 4


def test_clean_results_have_no_remarks() -> None:
    assert compute_metrics(*random_predictions(0, 200, 3), names(3), malignant=["C0"])["remarks"] == []


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


def test_tables_show_the_measures_with_their_intervals() -> None:
    classes = ["[bold]A", "B|b", "malignant"]
    labels, scores = random_predictions(1, 60, 3)
    plain = compute_metrics(labels, scores, classes, malignant=["malignant"])
    drawn = bootstrap_intervals(labels, scores, np.arange(60), classes, 50, malignant=["malignant"], level=0.9)
    full = with_intervals(plain, drawn)
    low, high = full["accuracy_ci90"]
    headline, by_class = metrics_tables(full, "Run 1")
    assert headline.columns == ("measure", "value", "90% interval")
    row = next(row for row in headline.rows if row[0].text == "accuracy")
    assert [cell.text for cell in row[1:]] == [f"{full['accuracy']:.3f}", f"[{low:.3f}, {high:.3f}]"]
    assert r"| B\|b |" in by_class.markdown()
    assert not any(row[2].text for row in metrics_tables(plain)[0].rows)

    undefined = metrics_from_confusion([[3, 0], [2, 0]], ["A", "B"])
    headline, by_class = metrics_tables(undefined)
    assert "| B | 0.000 | 1.000 | – |" in by_class.markdown()
    assert any("B never predicted" in note for note in by_class.notes)
    assert "log loss" not in headline.markdown()


def test_every_headline_measure_has_a_name_for_people() -> None:
    assert set(HEADLINE_MEASURES) <= set(MEASURE_NAMES)
