"""The one definition of every classification metric, as a function of resample weights.

A metric of the test set is that of unit weights; a metric of a bootstrap resample is that of how often each patient was
drawn. Predictions are summed up by patient once, so that all metrics of many resamples are a few matrix products.

A class that is absent, from the test set or from a resample, has no sensitivity and no AUC there and leaves the
averages: macro values run over the classes present. What each average means stands in its name. The values agree with
scikit-learn's on unit weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.bootstrap import Floats, divide, group_sums

# Half-precision outputs and printed decimals miss 1 by less; scores that aren't probabilities miss it by more.
SUM_TOLERANCE = 1e-2

# Bins of the calibration errors.
DEFAULT_BINS = 15

HEADLINE_MEASURES = (
    *("accuracy", "balanced_accuracy", "auc_macro_ovr", "auc_weighted_ovr", "f1_macro", "f1_weighted"),
    *("precision_macro", "precision_weighted", "recall_macro", "recall_weighted", "specificity_macro", "npv_macro"),
    *("kappa", "mcc", "ece", "brier", "log_loss", "support"),
)
CLASS_MEASURES = ("sensitivity", "specificity", "ppv", "npv", "f1", "auc", "support", "predicted")
MALIGNANT_MEASURES = ("sensitivity", "specificity", "ppv", "npv", "auc", "support")


def check_predictions(
    labels: ArrayLike, probabilities: ArrayLike, class_count: int | None = None
) -> tuple[NDArray[np.int64], Floats]:
    """Check labels (N,) and probabilities (N, C), and return them as int64 and float64 arrays; ValueError if wrong.

    Rows aren't scaled to sum 1, since that could break or make ties between rows.
    """
    target = np.asarray(labels)
    scores = np.asarray(probabilities, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(f"probabilities must have the shape (images, classes), not {scores.shape}")
    if target.shape != (len(scores),):
        raise ValueError(f"labels must have the shape ({len(scores)},), one for each row, not {target.shape}")
    if len(scores) == 0:
        raise ValueError("there are no rows to measure")
    if class_count is not None and scores.shape[1] != class_count:
        raise ValueError(f"probabilities have {scores.shape[1]} columns for {class_count} classes")
    if scores.shape[1] < 2:
        raise ValueError("there must be at least 2 classes")
    if not np.issubdtype(target.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers (class indices), not {target.dtype}")
    if target.min() < 0 or target.max() >= scores.shape[1]:
        raise ValueError(f"labels must lie in 0..{scores.shape[1] - 1}; they lie in {target.min()}..{target.max()}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).any(axis=1).sum())} rows of probabilities hold NaN or infinity")
    if scores.min() < 0 or scores.max() > 1 + SUM_TOLERANCE:
        raise ValueError("probabilities must lie in 0..1; were logits passed? apply a softmax first")
    wrong = np.abs(scores.sum(axis=1) - 1) > SUM_TOLERANCE
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} rows of probabilities don't sum to 1, the first is row {int(wrong.argmax())}; "
            "apply a softmax first"
        )
    return target.astype(np.int64), scores


def check_classes(classes: Sequence[str], malignant: Sequence[str]) -> None:
    """Check the names: at least 2 classes, none named twice, malignant ones among them; else ValueError."""
    if len(classes) < 2:
        raise ValueError("there must be at least 2 classes")
    if len(set(classes)) != len(classes):
        raise ValueError(f"a class is named twice: {', '.join(classes)}")
    unknown = sorted(set(malignant) - set(classes))
    if unknown:
        raise ValueError(f"malignant names no class: {', '.join(unknown)}; classes: {', '.join(classes)}")


@dataclass(frozen=True)
class Ranking:
    """Images in descending order of a score; `ends` (T,) are the last images of each distinct threshold: ties share
    one.
    """

    groups: NDArray[np.int64]
    positive: NDArray[np.bool_]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, score: Floats, positive: NDArray[np.bool_], groups: NDArray[np.int64]) -> Ranking:
        """Sort images by score; all (N,)."""
        order = np.argsort(-score, kind="stable")
        return cls(groups[order], positive[order], np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1))

    def counts(self, weights: Floats) -> tuple[Floats, Floats]:
        """Return true and false positives at each threshold, (S, T + 1), as exact whole numbers; in front none is
        called.
        """
        drawn = weights[:, self.groups]
        called, true = (
            np.pad(counted.cumsum(axis=1)[:, self.ends], ((0, 0), (1, 0))) for counted in (drawn, drawn * self.positive)
        )
        return true, called - true

    def auc(self, weights: Floats) -> Floats:
        """Return the area under the ROC curve, (S,), ties counting one half; NaN where the target is constant."""
        true, false = self.counts(weights)
        area = (np.diff(false, axis=1) * (true[:, 1:] + true[:, :-1])).sum(axis=1)
        return divide(area, 2 * true[:, -1] * false[:, -1])


class CalibrationErrors:
    """Errors of probabilities (N, C), as functions of weights (S, G); without groups (N,) all images are one.

    `counts` and `gaps` are (G, bins): images of each group by confidence in bins of equal width, and the sum of
    [right] - confidence of these images.

    >>> errors = CalibrationErrors(np.array([0, 1, 1, 1]), np.array([[0.9, 0.1]] * 2 + [[0.4, 0.6]] * 2), bins=10)
    >>> errors.ece(np.ones((1, 1))).round(6).tolist()  # 2/4 |1/2 - .9| + 2/4 |2/2 - .6|
    [0.4]
    """

    def __init__(
        self,
        target: NDArray[np.int64],
        scores: Floats,
        groups: NDArray[np.int64] | None = None,
        size: int = 1,
        bins: int = DEFAULT_BINS,
    ) -> None:
        groups = np.zeros(len(target), dtype=np.int64) if groups is None else groups
        confidence, self.bins = scores.max(axis=1), bins
        gap = (scores.argmax(axis=1) == target) - confidence
        one_hot = np.eye(bins)[equal_width_bins(confidence, bins)]
        self.counts = group_sums(one_hot, groups, size)
        self.gaps = group_sums(one_hot * gap[:, None], groups, size)
        squared = np.square(scores - np.eye(scores.shape[1])[target]).sum(axis=1)
        # As scikit-learn does: a probability of 0 for the true class counts as the smallest step above 0.
        smallest = np.finfo(np.float64).eps
        likelihood = scores[np.arange(len(target)), target] / scores.sum(axis=1)
        log_loss = -np.log(np.clip(likelihood, smallest, 1 - smallest))
        self.losses = group_sums(np.column_stack([squared, log_loss]), groups, size)
        # In ascending order of confidence, for bins of equal mass; `below`: images with a smaller confidence.
        order = np.argsort(confidence, kind="stable")
        self.groups, self.gap, self.confidence = groups[order], gap[order], confidence[order]
        self.below = np.searchsorted(self.confidence, self.confidence, side="left")

    def ece(self, weights: Floats) -> Floats:
        """Return the expected calibration error of the top label, (S,), over bins of equal width (Guo et al. 2017).

        ECE = sum over bins b of (n_b / N) |accuracy_b - confidence_b|, bin b of B being the interval ((b-1)/B, b/B].
        """
        # n_b |accuracy_b - confidence_b| is |sum of the gaps in b|: empty bins need no care.
        return divide(np.abs(weights @ self.gaps).sum(axis=1), self._total(weights))

    def adaptive_ece(self, weights: Floats) -> Floats:
        """Return the same over bins of equal mass, about N / bins images each; equal confidences share a bin."""
        drawn = weights[:, self.groups]
        rank = np.pad(drawn.cumsum(axis=1), ((0, 0), (1, 0)))[:, self.below]
        # An image that wasn't drawn may lie behind the last bin; it has no weight.
        places = np.minimum((rank * self.bins // self._total(weights)[:, None]).astype(np.int64), self.bins - 1)
        cells = places + np.arange(len(weights))[:, None] * self.bins
        gaps = np.bincount(cells.ravel(), (drawn * self.gap).ravel(), len(weights) * self.bins)
        return divide(np.abs(gaps.reshape(-1, self.bins)).sum(axis=1), self._total(weights))

    def measure(self, weights: Floats) -> dict[str, Floats]:
        """Return all errors, each (S,); the Brier score sums over classes, so that it lies in 0..2."""
        brier, log_loss = (weights @ self.losses).T / self._total(weights)
        adaptive = self.adaptive_ece(weights)
        return {"ece": self.ece(weights), "adaptive_ece": adaptive, "brier": brier, "log_loss": log_loss}

    def by_chance(self, samples: int, seed: int) -> dict[str, list[float]]:
        """Return mean and 95% quantile of both calibration errors if every probability were true."""
        generator, count = np.random.default_rng(seed), len(self.confidence)
        gaps = (generator.random((samples, count)) < self.confidence) - self.confidence
        places = {
            "ece_by_chance": equal_width_bins(self.confidence, self.bins),
            "adaptive_ece_by_chance": self.below * self.bins // count,
        }
        errors = {name: np.abs(gaps @ np.eye(self.bins)[place]).sum(axis=1) / count for name, place in places.items()}
        return {name: [float(drawn.mean()), float(np.quantile(drawn, 0.95))] for name, drawn in errors.items()}

    def _total(self, weights: Floats) -> Floats:
        return np.asarray((weights @ self.counts).sum(axis=1))


class WeightedMetrics:
    """The metrics of one model's predictions as functions of weights; `groups`, (N,), may be a part of `size` ones."""

    def __init__(
        self,
        labels: ArrayLike,
        probabilities: ArrayLike,
        groups: NDArray[np.int64] | None,
        classes: Sequence[str],
        malignant: Sequence[str] = (),
        size: int | None = None,
    ) -> None:
        check_classes(classes, malignant)
        target, scores = check_predictions(labels, probabilities, len(classes))
        groups = np.zeros(len(target), dtype=np.int64) if groups is None else groups
        self.classes, self.malignant = list(classes), list(malignant)
        self.size = int(groups.max()) + 1 if size is None else size
        cell = target * len(classes) + scores.argmax(axis=1)
        self.confusion = group_sums(np.eye(len(classes) ** 2)[cell], groups, self.size)
        self.errors = CalibrationErrors(target, scores, groups, self.size)
        self.rankings = [Ranking.of(scores[:, index], target == index, groups) for index in range(len(classes))]
        cancer = np.isin(classes, malignant)
        self.cancer_ranking = Ranking.of(scores[:, cancer].sum(axis=1), cancer[target], groups) if malignant else None

    def matrices(self, weights: Floats) -> Floats:
        """Return the confusion matrices, (S, C, C); rows are the target, columns the prediction."""
        return np.asarray((weights @ self.confusion).reshape(-1, len(self.classes), len(self.classes)))

    def measure(self, weights: Floats) -> dict[str, Floats]:
        """Return every metric that has an interval, each (S,), NaN where undefined."""
        matrices = self.matrices(weights)
        values = confusion_metrics(matrices, self.classes, self.malignant)
        support = matrices.sum(axis=2)
        auc = np.stack([ranking.auc(weights) for ranking in self.rankings], axis=1)
        values["auc_macro_ovr"] = _mean(auc, support > 0)
        values["auc_weighted_ovr"] = _mean(auc, support > 0, support)
        values["ece"] = self.errors.ece(weights)
        for index, name in enumerate(self.classes):
            values[f"per_class.{name}.auc"] = auc[:, index]
        if self.cancer_ranking is not None:
            values["malignant.auc"] = self.cancer_ranking.auc(weights)
        return values


def confusion_metrics(matrices: Floats, classes: Sequence[str], malignant: Sequence[str] = ()) -> dict[str, Floats]:
    """Return what needs counts only, such as `per_class.MEL.sensitivity`, (S,) of matrices (S, C, C)."""
    total, support, predicted = matrices.sum(axis=(1, 2)), matrices.sum(axis=2), matrices.sum(axis=1)
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    by_class = _binary_metrics(hits, support, predicted, total[:, None])
    by_class["f1"] = divide(2 * hits, support + predicted)
    present = support > 0
    # What was never predicted has no precision, and counts as 0 in the averages.
    precision, npv = np.nan_to_num(by_class["ppv"]), np.nan_to_num(by_class["npv"])
    accuracy = divide(hits.sum(axis=1), total)
    chance = divide((support * predicted).sum(axis=1), total**2)
    recall = _mean(by_class["sensitivity"], present)
    values = {
        "accuracy": accuracy,
        "balanced_accuracy": recall,
        "f1_macro": _mean(by_class["f1"], present),
        "f1_weighted": _mean(by_class["f1"], present, support),
        "precision_macro": _mean(precision, present),
        "precision_weighted": _mean(precision, present, support),
        "recall_macro": recall,
        "recall_weighted": _mean(by_class["sensitivity"], present, support),
        "specificity_macro": _mean(by_class["specificity"], present),
        "npv_macro": _mean(npv, present),
        "kappa": divide(accuracy - chance, 1 - chance),
    }
    for index, name in enumerate(classes):
        values |= {f"per_class.{name}.{measure}": columns[:, index] for measure, columns in by_class.items()}
    if malignant:
        cancer = np.isin(classes, malignant)
        found = matrices[:, cancer][:, :, cancer].sum(axis=(1, 2))
        binary = _binary_metrics(found, support[:, cancer].sum(axis=1), predicted[:, cancer].sum(axis=1), total)
        values |= {f"malignant.{measure}": column for measure, column in binary.items()}
    return values


def compute_metrics(
    labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str], malignant: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure predictions: labels (N,) are indices into `classes`, rows of probabilities (N, C) sum to 1.

    Returns `HEADLINE_MEASURES`, `per_class`, `malignant` (by the sum of the malignant classes' probabilities),
    `confusion_matrix` (rows are the target) and `remarks` on what is undefined, ready for strict JSON. ValueError: see
    `check_predictions` and `check_classes`.
    """
    model, unit = WeightedMetrics(labels, probabilities, None, classes, malignant), np.ones((1, 1))
    values = model.measure(unit) | model.errors.measure(unit)
    return _report(values, model.matrices(unit)[0].astype(np.int64), model.classes, model.malignant)


def no_metrics(classes: Sequence[str], malignant: Sequence[str], remark: str) -> dict[str, Any]:
    """Return what `compute_metrics` does where nothing is measured: all undefined, and why."""
    check_classes(classes, malignant)
    names = [*HEADLINE_MEASURES, *(f"malignant.{name}" for name in MALIGNANT_MEASURES)]
    names += [f"per_class.{label}.{name}" for label in classes for name in CLASS_MEASURES]
    undefined = dict.fromkeys(names, np.array([np.nan]))
    nothing = np.zeros((len(classes), len(classes)), dtype=np.int64)
    return _report(undefined, nothing, list(classes), list(malignant)) | {"remarks": [remark]}


def metrics_from_confusion(matrix: ArrayLike, classes: Sequence[str], malignant: Sequence[str] = ()) -> dict[str, Any]:
    """Return the values of `compute_metrics` that need counts only, of a matrix (C, C) with the target in rows."""
    check_classes(classes, malignant)
    counts = np.asarray(matrix)
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"the confusion matrix must have the shape {(len(classes), len(classes))}, not {counts.shape}")
    if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        raise ValueError("the confusion matrix must hold whole numbers of at least 0")
    if counts.sum() == 0:
        raise ValueError("there are no rows to measure: the confusion matrix is all zero")
    values = confusion_metrics(counts[None].astype(np.float64), classes, malignant)
    return _report(values, counts, list(classes), list(malignant))


def equal_width_bins(confidence: Floats, bins: int) -> NDArray[np.int64]:
    """Return the bin 0..bins-1 of every confidence; bin b is the interval (b / bins, (b + 1) / bins]."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left").astype(np.int64)


def _binary_metrics(hits: Floats, support: Floats, predicted: Floats, total: Floats) -> dict[str, Floats]:
    """Return what follows from true positives, positives, predicted positives and images."""
    true_negatives = total - support - predicted + hits
    return {
        "sensitivity": divide(hits, support),
        "specificity": divide(true_negatives, total - support),
        "ppv": divide(hits, predicted),
        "npv": divide(true_negatives, total - predicted),
    }


def _mean(values: Floats, present: NDArray[np.bool_], weights: Floats | None = None) -> Floats:
    """Average each row over its present classes whose value is defined; NaN if there are none."""
    chosen = (present & ~np.isnan(values)) * (1.0 if weights is None else weights)
    return divide((chosen * np.nan_to_num(values)).sum(axis=1), chosen.sum(axis=1))


def _report(
    values: Mapping[str, Floats], matrix: NDArray[np.int64], classes: list[str], malignant: list[str]
) -> dict[str, Any]:
    """Return metrics of unit weights as `compute_metrics` does, with counts, Matthews correlation and remarks."""
    total, support, predicted = int(matrix.sum()), matrix.sum(axis=1), matrix.sum(axis=0)
    # Gorodkin 2004; undefined where the target or the prediction is constant.
    squared, cross = float(total) ** 2, float(np.trace(matrix) * total - support @ predicted)
    spread = (squared - float(support @ support)) * (squared - float(predicted @ predicted))
    flat: dict[str, float | int | None] = {
        key: None if np.isnan(column[0]) else float(column[0]) for key, column in values.items()
    }
    flat |= {"mcc": cross / spread**0.5 if spread else None, "support": total}
    flat["malignant.support"] = int(support[np.isin(classes, malignant)].sum())
    for index, name in enumerate(classes):
        flat |= {f"per_class.{name}.support": int(support[index]), f"per_class.{name}.predicted": int(predicted[index])}

    def pick(keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
        return {key: flat[prefix + key] for key in keys if prefix + key in flat}

    metrics: dict[str, Any] = pick(HEADLINE_MEASURES)
    metrics["per_class"] = {name: pick(CLASS_MEASURES, f"per_class.{name}.") for name in classes}
    if malignant:
        metrics["malignant"] = pick(MALIGNANT_MEASURES, "malignant.")
    return {**metrics, "confusion_matrix": matrix.tolist(), "remarks": _remarks(metrics, classes)}


def _remarks(metrics: Mapping[str, Any], classes: list[str]) -> list[str]:
    values = metrics["per_class"]
    absent = [name for name in classes if values[name]["support"] == 0]
    never = [name for name in classes if values[name]["support"] > 0 and values[name]["predicted"] == 0]
    remarks = []
    if absent:
        remarks.append(
            f"no image of {', '.join(absent)} in the test set: sensitivity and AUC are undefined there, and balanced "
            f"accuracy and all macro averages run over the {len(classes) - len(absent)} classes present"
        )
    if never:
        remarks.append(
            f"{', '.join(never)} never predicted: the PPV is undefined there and counts 0 in precision_macro and "
            "precision_weighted"
        )
    if len(absent) == len(classes) - 1:
        remarks.append("the test set holds one class only: AUC and specificity are undefined there")
    for name in classes:
        if values[name]["predicted"] == metrics["support"]:
            remarks.append(f"every image was predicted {name}: its NPV is undefined and counts 0 in npv_macro")
    for measure in ("kappa", "mcc"):
        if metrics[measure] is None:
            remarks.append(f"{measure} is undefined: the target or the predictions hold one class only")
    undefined = [measure for measure, value in metrics.get("malignant", {}).items() if value is None]
    if undefined:
        remarks.append(f"malignant versus benign: {', '.join(undefined)} undefined, as one of the two never occurs")
    return remarks
