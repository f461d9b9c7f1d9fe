"""The one audited definition of every measure: each measure's average stands in its name.

Conventions, the same for point values and bootstrap samples:

- the predicted class is the one with the largest probability (the first of them, if tied);
- a macro average runs over the classes *present in the test set*; balanced accuracy is the macro recall;
- a weighted average weighs the classes by their support, so the weighted recall equals the accuracy;
- a value that would be 0/0 is None, and `remarks` says so. The predictive value of an answer that was never given is
  None for the class, and counts 0 in the average: never naming a class must not raise a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import cohen_kappa_score, confusion_matrix, log_loss, matthews_corrcoef, precision_recall_fscore_support, roc_auc_score

from dualrefnet.evaluation.calibration import brier_score, expected_calibration_error
from dualrefnet.evaluation.inputs import check_classes, check_predictions

Floats = NDArray[np.float64]

HEADLINE_MEASURES = (
    "accuracy",
    "balanced_accuracy",
    "auc_macro_ovr",
    "auc_weighted_ovr",
    "f1_macro",
    "f1_weighted",
    "precision_macro",
    "precision_weighted",
    "recall_macro",
    "recall_weighted",
    "specificity_macro",
    "npv_macro",
    "kappa",
    "mcc",
    "ece",
    "brier",
    "log_loss",
    "support",
)
CLASS_MEASURES = ("sensitivity", "specificity", "ppv", "npv", "f1", "auc", "support", "predicted")
MALIGNANT_MEASURES = ("sensitivity", "specificity", "ppv", "npv", "auc", "support")


def compute_metrics(labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str], malignant: Sequence[str] = ()) -> dict[str, Any]:
    """Measure predictions.

    Args:
        labels: true class of every image, (N,), indices into `classes`.
        probabilities: (N, C), rows sum to 1.
        classes: names in the order of the columns.
        malignant: the classes that are cancer; empty: no `malignant` measure.

    Returns:
        `HEADLINE_MEASURES`; `per_class` (class -> `CLASS_MEASURES`, one class versus the rest); `malignant`
        (`MALIGNANT_MEASURES` of malignant versus benign: the score is the sum of the malignant classes' probabilities,
        the decision is whether the predicted class is malignant), if asked for; `confusion_matrix` (rows are the
        truth, columns the prediction); `remarks`. Ready for strict JSON.

    Raises:
        ValueError: see `check_predictions` and `check_classes`.
    """
    classes, malignant = list(classes), list(malignant)
    check_classes(classes, malignant)
    truth, scores = check_predictions(labels, probabilities, len(classes))
    matrix = confusion_matrix(truth, scores.argmax(axis=1), labels=range(len(classes)))
    metrics = metrics_from_confusion(matrix, classes, malignant)

    aucs = np.array([_auc(truth == index, scores[:, index]) for index in range(len(classes))])
    support = matrix.sum(axis=1)
    metrics["auc_macro_ovr"] = _number(_mean(aucs, support > 0))
    metrics["auc_weighted_ovr"] = _number(_mean(aucs, support > 0, support))
    metrics["ece"] = expected_calibration_error(truth, scores)
    metrics["brier"] = brier_score(truth, scores)
    metrics["log_loss"] = float(log_loss(truth, scores / scores.sum(axis=1, keepdims=True), labels=range(len(classes))))
    for name, auc in zip(classes, aucs, strict=True):
        metrics["per_class"][name]["auc"] = _number(auc)
    if malignant:
        columns = np.isin(classes, malignant)
        metrics["malignant"]["auc"] = _number(_auc(columns[truth], scores[:, columns].sum(axis=1)))
    return _in_order(metrics)


def metrics_from_confusion(matrix: ArrayLike, classes: Sequence[str], malignant: Sequence[str] = ()) -> dict[str, Any]:
    """Return those values of `compute_metrics` that need counts only.

    Args:
        matrix: (C, C) counts; rows are the truth, columns the prediction.
        classes: names in the order of rows and columns.
        malignant: the classes that are cancer.

    Raises:
        ValueError: the matrix isn't C x C whole numbers of at least 0, or is all zero; see also `check_classes`.
    """
    classes, malignant = list(classes), list(malignant)
    check_classes(classes, malignant)
    counts = np.asarray(matrix)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"the confusion matrix must have the shape {(len(classes), len(classes))}, not {counts.shape}")
    if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError("the confusion matrix must hold whole numbers of at least 0")
    if counts.sum() == 0:
        raise ValueError("there are no rows to measure: the confusion matrix is all zero")

    # Every cell is one weighted row for scikit-learn.
    truth, predicted = np.divmod(np.arange(counts.size), len(classes))
    weights = counts.ravel()
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, labels=range(len(classes)), sample_weight=weights, zero_division=np.nan
    )
    support, given, hits, total = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts), counts.sum()
    true_negatives = total - support - given + hits
    specificity = _ratio(true_negatives, total - support)
    npv = _ratio(true_negatives, total - given)
    present = support > 0
    agreement_defined = not ((support == total) & (given == total)).any()
    correlation_defined = support.max() < total and given.max() < total
    metrics: dict[str, Any] = {
        "accuracy": float(hits.sum() / total),
        "balanced_accuracy": _number(_mean(recall, present)),
        "f1_macro": _number(_mean(f1, present)),
        "f1_weighted": _number(_mean(f1, present, support)),
        "precision_macro": _number(_mean(np.nan_to_num(precision), present)),
        "precision_weighted": _number(_mean(np.nan_to_num(precision), present, support)),
        "recall_macro": _number(_mean(recall, present)),
        "recall_weighted": _number(_mean(recall, present, support)),
        "specificity_macro": _number(_mean(specificity, present)),
        "npv_macro": _number(_mean(np.nan_to_num(npv), present)),
        "kappa": float(cohen_kappa_score(truth, predicted, sample_weight=weights)) if agreement_defined else None,
        "mcc": float(matthews_corrcoef(truth, predicted, sample_weight=weights)) if correlation_defined else None,
        "support": int(total),
        "per_class": {
            name: {
                "sensitivity": _number(recall[index]),
                "specificity": _number(specificity[index]),
                "ppv": _number(precision[index]),
                "npv": _number(npv[index]),
                "f1": _number(f1[index]),
                "support": int(support[index]),
                "predicted": int(given[index]),
            }
            for index, name in enumerate(classes)
        },
    }
    if malignant:
        metrics["malignant"] = _malignant_from_confusion(counts, np.isin(classes, malignant))
    metrics["confusion_matrix"] = counts.tolist()
    metrics["remarks"] = _remarks(metrics, classes)
    return metrics


def _malignant_from_confusion(counts: NDArray[np.int64], cancer: NDArray[np.bool_]) -> dict[str, Any]:
    true_positives, missed = counts[cancer][:, cancer].sum(), counts[cancer][:, ~cancer].sum()
    false_alarms, true_negatives = counts[~cancer][:, cancer].sum(), counts[~cancer][:, ~cancer].sum()
    return {
        "sensitivity": _number(_ratio(true_positives, true_positives + missed)),
        "specificity": _number(_ratio(true_negatives, true_negatives + false_alarms)),
        "ppv": _number(_ratio(true_positives, true_positives + false_alarms)),
        "npv": _number(_ratio(true_negatives, true_negatives + missed)),
        "support": int(true_positives + missed),
    }


def _remarks(metrics: dict[str, Any], classes: list[str]) -> list[str]:
    values = metrics["per_class"]
    absent = [name for name in classes if values[name]["support"] == 0]
    silent = [name for name in classes if values[name]["support"] > 0 and values[name]["predicted"] == 0]
    remarks = []
    if absent:
        remarks.append(
            f"no image of {', '.join(absent)} in the test set: sensitivity and AUC are undefined there, and balanced accuracy "
            f"and all macro averages run over the {len(classes) - len(absent)} classes present"
        )
    if silent:
        remarks.append(
            f"{', '.join(silent)} never predicted: the PPV is undefined there and counts 0 in precision_macro and precision_weighted"
        )
    if len(absent) == len(classes) - 1:
        remarks.append("the test set holds one class only: AUC and specificity are undefined there, and the figures say little")
    for name in classes:
        if values[name]["predicted"] == metrics["support"]:
            remarks.append(f"every image was predicted {name}: its NPV is undefined and counts 0 in npv_macro")
    for measure in ("kappa", "mcc"):
        if metrics[measure] is None:
            remarks.append(f"{measure} is undefined: the truth or the predictions hold one class only")
    undefined = [measure for measure, value in metrics.get("malignant", {}).items() if value is None]
    if undefined:
        remarks.append(f"malignant versus benign: {', '.join(undefined)} undefined, as one of the two never occurs")
    return remarks


def _in_order(metrics: dict[str, Any]) -> dict[str, Any]:
    rest = [key for key in metrics if key not in HEADLINE_MEASURES]
    ordered = {key: metrics[key] for key in (*HEADLINE_MEASURES, *rest)}
    ordered["per_class"] = {name: {key: values[key] for key in CLASS_MEASURES} for name, values in metrics["per_class"].items()}
    if "malignant" in metrics:
        ordered["malignant"] = {key: metrics["malignant"][key] for key in MALIGNANT_MEASURES}
    return ordered


def _auc(positive: NDArray[np.bool_], score: Floats) -> float:
    return float(roc_auc_score(positive, score)) if 0 < positive.sum() < len(positive) else float("nan")


def _mean(values: Floats, present: NDArray[np.bool_], weights: NDArray[np.int64] | None = None) -> float:
    """Average the defined values of the classes present; NaN if there are none."""
    chosen = present & ~np.isnan(values)
    if not chosen.any():
        return float("nan")
    return float(np.average(values[chosen], weights=None if weights is None else weights[chosen]))


def _ratio(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> Floats:
    """Divide, 0/0 being NaN."""
    result: Floats = np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=np.asarray(denominator) > 0)
    return result


def _number(value: float | Floats) -> float | None:
    """Return a float for JSON, None for NaN."""
    return None if np.isnan(value) else float(value)
