"""The arithmetic of the bootstrap: all measures of many resamples at once, from how often each group was drawn.

A resample is a column of counts, one a group. Measures that need counts only come from one confusion matrix a group;
the calibration error from one sum a group and bin; the AUC from scores that are sorted once, whose ranks are then
counted with the groups' weights. The results are exact: they equal the measures of the laid-out sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.calibration import DEFAULT_BINS, equal_width_bins
from dualrefnet.evaluation.inputs import check_predictions

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
        self.gaps = self._sums(groups, equal_width_bins(confidence, DEFAULT_BINS), DEFAULT_BINS, (predicted == truth) - confidence)
        self.rankings = [Ranking.of(scores[:, index], truth == index, groups) for index in range(len(classes))]
        self.cancer_ranking = Ranking.of(scores[:, self.cancer].sum(axis=1), self.cancer[truth], groups) if malignant else None

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

    def _sums(self, groups: NDArray[np.int64], index: NDArray[np.int64], width: int, weights: Floats | None = None) -> Floats:
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
