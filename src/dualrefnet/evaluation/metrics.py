"""The one check that labels and probabilities pass before anything is computed from them."""

# also: Calibration: do the probabilities mean what they say?
# also: The arithmetic of the bootstrap: all measures of many resamples at once, from how often each group was drawn.
# also: The one audited definition of every measure: each measure's average stands in its name.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import (
    cohen_kappa_score,
    confusion_matrix,
    log_loss,
    matthews_corrcoef,
    precision_recall_fscore_support,
    roc_auc_score,
)

# Half-precision outputs and printed decimals miss 1 by less; scores that aren't probabilities miss it by more.
SUM_TOLERANCE = 1e-2


def check_predictions(
    labels: ArrayLike, probabilities: ArrayLike, class_count: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Check labels and probabilities, and return them as int64 and float64 arrays.

    The probabilities keep their values: rows aren't scaled to sum 1, since that could break or make ties between rows.

    Args:
        labels: true class of every image, (N,), whole numbers 0..C-1.
        probabilities: one row an image, (N, C), each row summing to 1.
        class_count: C, where the caller knows it.

    Raises:
        ValueError: a shape is wrong, there are no rows, a label isn't a class, or a row isn't a probability
            distribution.
    """
    truth = np.asarray(labels)
    scores = np.asarray(probabilities, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(f"probabilities must have the shape (images, classes), not {scores.shape}")
    if truth.shape != (len(scores),):
        raise ValueError(
            f"labels must have the shape ({len(scores)},), one for each row of probabilities, not {truth.shape}"
        )
    if len(scores) == 0:
        raise ValueError("there are no rows to measure")
    if class_count is not None and scores.shape[1] != class_count:
        raise ValueError(f"probabilities have {scores.shape[1]} columns for {class_count} classes")
    if scores.shape[1] < 2:
        raise ValueError("there must be at least 2 classes")
    if not np.issubdtype(truth.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers (class indices), not {truth.dtype}")
    if truth.min() < 0 or truth.max() >= scores.shape[1]:
        raise ValueError(f"labels must lie in 0..{scores.shape[1] - 1}; they lie in {truth.min()}..{truth.max()}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).any(axis=1).sum())} rows of probabilities hold NaN or infinity")
    if scores.min() < 0 or scores.max() > 1 + SUM_TOLERANCE:
        raise ValueError("probabilities must lie in 0..1; were logits passed? apply a softmax first")
    wrong = np.abs(scores.sum(axis=1) - 1) > SUM_TOLERANCE
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} rows of probabilities don't sum to 1, the first is row {int(wrong.argmax())}; apply a softmax first"
        )
    return truth.astype(np.int64), scores


def check_classes(classes: list[str], malignant: list[str]) -> None:
    """Check the names of the classes.

    Raises:
        ValueError: fewer than 2 classes, a class named twice, or a malignant class that is no class.
    """
    if len(classes) < 2:
        raise ValueError("there must be at least 2 classes")
    if len(set(classes)) != len(classes):
        raise ValueError(f"a class is named twice: {', '.join(classes)}")
    unknown = sorted(set(malignant) - set(classes))
    if unknown:
        raise ValueError(f"malignant names no class: {', '.join(unknown)}; classes: {', '.join(classes)}")


DEFAULT_BINS = 15


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """Return the expected calibration error of the top label over bins of equal width.

    ECE = sum over bins b of (n_b / N) |accuracy_b - confidence_b|, bin b of B being the interval ((b-1)/B, b/B].

    Args:
        labels: (N,), class indices.
        probabilities: (N, C).
        bins: number of bins.

    Returns:
        A number in 0..1; 0 is perfect.

    Raises:
        ValueError: see `check_predictions`; or `bins` is below 1.

    >>> probabilities = [[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]]
    >>> round(expected_calibration_error([0, 1, 1, 1], probabilities, bins=10), 6)  # 2/4 |1/2 - .9| + 2/4 |2/2 - .6|
    0.4
    """
    truth, scores = check_predictions(labels, probabilities)
    confidence, correct = _top_label(truth, scores)
    return _binned_gap(equal_width_bins(confidence, bins), confidence, correct)


def adaptive_calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """Return the expected calibration error of the top label over bins of equal mass (about N / bins images each).

    The formula is that of `expected_calibration_error`; only the bins differ. Equal confidences share a bin, so the
    value doesn't depend on the order of the rows.

    Raises:
        ValueError: see `check_predictions`; or `bins` is below 1.

    >>> probabilities = [[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]]
    >>> round(adaptive_calibration_error([0, 1, 1, 1], probabilities, bins=2), 6)  # 2/4 |2/2 - .65| + 2/4 |1/2 - .85|
    0.35
    """
    truth, scores = check_predictions(labels, probabilities)
    _check_bins(bins)
    confidence, correct = _top_label(truth, scores)
    first_rank = np.searchsorted(np.sort(confidence), confidence, side="left")
    return _binned_gap(first_rank * bins // len(confidence), confidence, correct)


def reliability_curve(labels: ArrayLike, probabilities: ArrayLike, bins: int = DEFAULT_BINS) -> pd.DataFrame:
    """Return what a reliability diagram draws, one row a bin of equal width.

    Returns:
        Columns `low`, `high` (edges; low is outside the bin, high inside), `confidence` and `accuracy` (means in the
        bin; NaN where it is empty) and `count`.

    Raises:
        ValueError: see `check_predictions`; or `bins` is below 1.
    """
    truth, scores = check_predictions(labels, probabilities)
    confidence, correct = _top_label(truth, scores)
    index = equal_width_bins(confidence, bins)
    count = np.bincount(index, minlength=bins)
    filled = np.where(count > 0, count, np.nan)
    edges = np.linspace(0, 1, bins + 1)
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "confidence": np.bincount(index, confidence, bins) / filled,
            "accuracy": np.bincount(index, correct, bins) / filled,
            "count": count,
        }
    )


def brier_score(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the multi-class Brier score, 1/N sum over images and classes of (probability - [class is true])².

    Returns:
        A number in 0..2; 0 is perfect. For two classes it is twice the usual binary score.

    Raises:
        ValueError: see `check_predictions`.

    >>> round(brier_score([0, 1], [[0.8, 0.2], [0.6, 0.4]]), 6)  # (.2² + .2² + .6² + .6²) / 2
    0.4
    """
    truth, scores = check_predictions(labels, probabilities)
    wanted = np.eye(scores.shape[1])[truth]
    return float(np.square(scores - wanted).sum(axis=1).mean())


def equal_width_bins(confidence: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """Return the bin 0..bins-1 of every confidence; bin b is the interval (b / bins, (b + 1) / bins].

    Raises:
        ValueError: `bins` is below 1.
    """
    _check_bins(bins)
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left").astype(np.int64)


def _check_bins(bins: int) -> None:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")


def _top_label(truth: NDArray[np.int64], scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    return scores.max(axis=1), scores.argmax(axis=1) == truth


def _binned_gap(index: NDArray[np.int64], confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    # n_b |accuracy_b - confidence_b| is |sum of (correct - confidence) in b|: empty bins need no care.
    return float(np.abs(np.bincount(index, correct - confidence)).sum() / len(index))


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """One score against one yes-or-no truth, sorted once.

    Attributes:
        groups: (N,), group of every image, in ascending order of the score.
        positive: (P,), places in that order where the truth is yes.
        lower: (P,), number of images with a smaller score than each positive.
        upper: (P,), number of images with a smaller or the same score, itself included.
    """

    groups: NDArray[np.int64]
    positive: NDArray[np.int64]
    lower: NDArray[np.int64]
    upper: NDArray[np.int64]

    @classmethod
    def of(cls, score: Floats, positive: NDArray[np.bool_], groups: NDArray[np.int64]) -> Ranking:
        """Sort the images by score; all (N,)."""
        order = np.argsort(score, kind="stable")
        ascending = score[order]
        places = np.flatnonzero(positive[order])
        lower, upper = (np.searchsorted(ascending, ascending[places], side=side) for side in ("left", "right"))
        return cls(groups[order], places, lower, upper)

    def auc(self, times: Floats) -> Floats:
        """Return the area under the ROC curve of every resample, ties counting one half; NaN where one side is empty.

        The Mann-Whitney form: the rank sum of the positives, less the part that positives win among themselves.

        Args:
            times: (G, S), how often each group was drawn.
        """
        weights = times[self.groups]
        # Images up to each place in the order, with 0 in front. All are whole numbers or halves: the sums are exact.
        passed = np.zeros((len(weights) + 1, weights.shape[1]))
        np.cumsum(weights, axis=0, out=passed[1:])
        chosen = weights[self.positive]
        yes = chosen.sum(axis=0)
        won = (chosen * (passed[self.lower] + passed[self.upper])).sum(axis=0) / 2 - yes**2 / 2
        return _ratio(won, yes * (passed[-1] - yes))


class Resampler:
    """One model's predictions, prepared for measuring resamples of groups.

    Args:
        labels: (N,).
        probabilities: (N, C).
        groups: (N,), group of every image, 0..G-1.
        classes: C names.
        malignant: the classes that are cancer; empty: no `malignant` measures.
        group_count: number of groups, of which these images may be a part; None: the largest number in `groups` + 1.

    Raises:
        ValueError: see `check_predictions`; or `groups` has another length.
    """

    def __init__(
        self,
        labels: ArrayLike,
        probabilities: ArrayLike,
        groups: NDArray[np.int64],
        classes: list[str],
        malignant: list[str],
        group_count: int | None = None,
    ) -> None:
        truth, scores = check_predictions(labels, probabilities, len(classes))
        if groups.shape != truth.shape:
            raise ValueError(f"groups must have the shape {truth.shape}, one for each image, not {groups.shape}")
        self.classes = classes
        self.group_count = int(groups.max()) + 1 if group_count is None else group_count
        self.cancer = np.isin(classes, malignant)
        predicted, confidence = scores.argmax(axis=1), scores.max(axis=1)
        self.cells = self._sums(groups, truth * len(classes) + predicted, len(classes) ** 2)
        self.gaps = self._sums(
            groups, equal_width_bins(confidence, DEFAULT_BINS), DEFAULT_BINS, (predicted == truth) - confidence
        )
        self.rankings = [Ranking.of(scores[:, index], truth == index, groups) for index in range(len(classes))]
        self.cancer_ranking = (
            Ranking.of(scores[:, self.cancer].sum(axis=1), self.cancer[truth], groups) if malignant else None
        )

    def measure(self, times: Floats) -> dict[str, Floats]:
        """Return every measure of every resample, with the keys of `Intervals`; each (S,), NaN where undefined.

        Args:
            times: (G, S), how often each group was drawn.
        """
        count = len(self.classes)
        matrices = (times.T @ self.cells).reshape(-1, count, count)
        total = matrices.sum(axis=(1, 2))
        hits = np.diagonal(matrices, axis1=1, axis2=2)
        support, given = matrices.sum(axis=2), matrices.sum(axis=1)
        negatives = total[:, None] - support
        correct_negatives = negatives - given + hits
        present = support > 0

        sensitivity = _ratio(hits, support)
        ppv = _ratio(hits, given)
        auc = np.stack([ranking.auc(times) for ranking in self.rankings], axis=1)
        # A resample may hold none of these images, if they are a part of a test set.
        accuracy = _ratio(hits.sum(axis=1), total)
        chance = _ratio((support * given).sum(axis=1), total**2)
        recall = _mean(sensitivity, present)
        f1 = _ratio(2 * hits, support + given)
        npv = _ratio(correct_negatives, total[:, None] - given)
        specificity = _ratio(correct_negatives, negatives)
        values = {
            "accuracy": accuracy,
            "balanced_accuracy": recall,
            "auc_macro_ovr": _mean(auc, present),
            "auc_weighted_ovr": _mean(auc, present, support),
            "f1_macro": _mean(f1, present),
            "f1_weighted": _mean(f1, present, support),
            "precision_macro": _mean(np.nan_to_num(ppv), present),
            "precision_weighted": _mean(np.nan_to_num(ppv), present, support),
            "recall_macro": recall,
            "recall_weighted": _mean(sensitivity, present, support),
            "specificity_macro": _mean(specificity, present),
            "npv_macro": _mean(np.nan_to_num(npv), present),
            "kappa": _ratio(accuracy - chance, 1 - chance),
            "ece": _ratio(np.abs(times.T @ self.gaps).sum(axis=1), total),
        }
        by_class = {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ppv": ppv,
            "npv": npv,
            "f1": f1,
            "auc": auc,
        }
        for index, name in enumerate(self.classes):
            for measure, columns in by_class.items():
                values[f"per_class.{name}.{measure}"] = columns[:, index]
        if self.cancer_ranking is not None:
            found = matrices[:, self.cancer][:, :, self.cancer].sum(axis=(1, 2))
            cleared = matrices[:, ~self.cancer][:, :, ~self.cancer].sum(axis=(1, 2))
            ill, accused = support[:, self.cancer].sum(axis=1), given[:, self.cancer].sum(axis=1)
            values["malignant.sensitivity"] = _ratio(found, ill)
            values["malignant.specificity"] = _ratio(cleared, total - ill)
            values["malignant.ppv"] = _ratio(found, accused)
            values["malignant.npv"] = _ratio(cleared, total - accused)
            values["malignant.auc"] = self.cancer_ranking.auc(times)
        return values

    def _sums(
        self, groups: NDArray[np.int64], index: NDArray[np.int64], width: int, weights: Floats | None = None
    ) -> Floats:
        """Return (G, width): the number, or the sum of `weights`, of each group's images at each index."""
        flat = np.bincount(groups * width + index, weights, self.group_count * width)
        return flat.reshape(self.group_count, width).astype(np.float64)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Divide, NaN where the denominator is 0."""
    result: Floats = np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)
    return result


def _mean(values: Floats, present: NDArray[np.bool_], weights: Floats | None = None) -> Floats:
    """Average each row over its present classes whose value is defined; NaN if there are none."""
    chosen = (present & ~np.isnan(values)) * (1.0 if weights is None else weights)
    return _ratio((chosen * np.nan_to_num(values)).sum(axis=1), chosen.sum(axis=1))


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


def compute_metrics(
    labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str], malignant: Sequence[str] = ()
) -> dict[str, Any]:
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
    metrics["auc_macro_ovr"] = _number(_metrics_mean(aucs, support > 0))
    metrics["auc_weighted_ovr"] = _number(_metrics_mean(aucs, support > 0, support))
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
    specificity = _metrics_ratio(true_negatives, total - support)
    npv = _metrics_ratio(true_negatives, total - given)
    present = support > 0
    agreement_defined = not ((support == total) & (given == total)).any()
    correlation_defined = support.max() < total and given.max() < total
    metrics: dict[str, Any] = {
        "accuracy": float(hits.sum() / total),
        "balanced_accuracy": _number(_metrics_mean(recall, present)),
        "f1_macro": _number(_metrics_mean(f1, present)),
        "f1_weighted": _number(_metrics_mean(f1, present, support)),
        "precision_macro": _number(_metrics_mean(np.nan_to_num(precision), present)),
        "precision_weighted": _number(_metrics_mean(np.nan_to_num(precision), present, support)),
        "recall_macro": _number(_metrics_mean(recall, present)),
        "recall_weighted": _number(_metrics_mean(recall, present, support)),
        "specificity_macro": _number(_metrics_mean(specificity, present)),
        "npv_macro": _number(_metrics_mean(np.nan_to_num(npv), present)),
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
        "sensitivity": _number(_metrics_ratio(true_positives, true_positives + missed)),
        "specificity": _number(_metrics_ratio(true_negatives, true_negatives + false_alarms)),
        "ppv": _number(_metrics_ratio(true_positives, true_positives + false_alarms)),
        "npv": _number(_metrics_ratio(true_negatives, true_negatives + missed)),
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
        remarks.append(
            "the test set holds one class only: AUC and specificity are undefined there, and the figures say little"
        )
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
    ordered["per_class"] = {
        name: {key: values[key] for key in CLASS_MEASURES} for name, values in metrics["per_class"].items()
    }
    if "malignant" in metrics:
        ordered["malignant"] = {key: metrics["malignant"][key] for key in MALIGNANT_MEASURES}
    return ordered


def _auc(positive: NDArray[np.bool_], score: Floats) -> float:
    return float(roc_auc_score(positive, score)) if 0 < positive.sum() < len(positive) else float("nan")


def _metrics_mean(values: Floats, present: NDArray[np.bool_], weights: NDArray[np.int64] | None = None) -> float:
    """Average the defined values of the classes present; NaN if there are none."""
    chosen = present & ~np.isnan(values)
    if not chosen.any():
        return float("nan")
    return float(np.average(values[chosen], weights=None if weights is None else weights[chosen]))


def _metrics_ratio(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> Floats:
    """Divide, 0/0 being NaN."""
    result: Floats = np.divide(
        numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=np.asarray(denominator) > 0
    )
    return result


def _number(value: float | Floats) -> float | None:
    """Return a float for JSON, None for NaN."""
    return None if np.isnan(value) else float(value)
