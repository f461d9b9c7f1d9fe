"""Calibration errors of several sets of probabilities of the same images, on the same resamples of patients.

Exact, as everything in `resampling`: what a resample gives equals the measure of the laid-out sample. A resample holds fewer
different images than the test set, and both errors over bins grow with fewer images, so that their intervals lie too high and may
even miss the value itself; Brier score and log loss are means and don't suffer from that. For the same reason an error over bins is
never 0 on few images. What it would be by chance alone, if the probabilities were true, is drawn, too: every answer is right with
its confidence (consistency resampling; Broecker and Smith 2007).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.calibration import (
    DEFAULT_BINS,
    adaptive_calibration_error,
    brier_score,
    equal_width_bins,
    expected_calibration_error,
)
from dualrefnet.evaluation.inputs import check_predictions
from dualrefnet.evaluation.intervals import draw_counts, percentile_interval
from dualrefnet.evaluation.ratios import beside, group_sums

Floats = NDArray[np.float64]

ERRORS = ("ece", "adaptive_ece", "brier", "log_loss")
# As in `metrics`: a probability of 0 for the true class counts as this.
_SMALLEST = float(np.finfo(np.float64).eps)


class _Errors:
    """One set of probabilities, prepared for resamples; arguments as in `compare_errors`."""

    def __init__(self, truth: NDArray[np.int64], scores: Floats, groups: NDArray[np.int64], size: int) -> None:
        confidence = scores.max(axis=1)
        surplus = (scores.argmax(axis=1) == truth) - confidence
        each = np.stack([np.square(scores - np.eye(scores.shape[1])[truth]).sum(axis=1), log_losses(truth, scores)], axis=1)
        self.point = {
            "ece": expected_calibration_error(truth, scores),
            "adaptive_ece": adaptive_calibration_error(truth, scores),
            "brier": brier_score(truth, scores),
            "log_loss": float(each[:, 1].mean()),
        }
        bins = equal_width_bins(confidence, DEFAULT_BINS)[:, None] == np.arange(DEFAULT_BINS)
        self.gaps = group_sums(bins * surplus[:, None], groups, size)
        self.sums = group_sums(np.column_stack([each, np.ones(len(truth))]), groups, size)
        order = np.argsort(confidence, kind="stable")
        self.groups, self.surplus, self.confidence = groups[order], surplus[order], confidence[order]
        # For each image in ascending order: how many lie below its confidence.
        self.below = np.searchsorted(confidence[order], confidence[order], side="left")

    def measure(self, times: Floats) -> dict[str, Floats]:
        """Return every error of every resample, (S,); `times`: (S, G), how often each group was drawn."""
        sums = times @ self.sums
        total = sums[:, 2]
        weights = times[:, self.groups]
        passed = np.pad(weights.cumsum(axis=1), ((0, 0), (1, 0)))
        mass = (passed[:, self.below] * DEFAULT_BINS // total[:, None]).astype(np.int64)
        # An image that wasn't drawn may lie behind the last bin; it has no weight.
        cells = np.minimum(mass, DEFAULT_BINS - 1) + np.arange(len(times))[:, None] * DEFAULT_BINS
        binned = np.bincount(cells.ravel(), (weights * self.surplus).ravel(), len(times) * DEFAULT_BINS).reshape(-1, DEFAULT_BINS)
        return {
            "ece": np.abs(times @ self.gaps).sum(axis=1) / total,
            "adaptive_ece": np.abs(binned).sum(axis=1) / total,
            "brier": sums[:, 0] / total,
            "log_loss": sums[:, 1] / total,
        }

    def by_chance(self, samples: int, seed: int) -> dict[str, list[float]]:
        """Return mean and upper end of both errors over bins if every answer were right with its confidence."""
        generator, count = np.random.default_rng(seed), len(self.confidence)
        surplus = (generator.random((samples, count)) < self.confidence) - self.confidence
        places = {
            "ece_by_chance": equal_width_bins(self.confidence, DEFAULT_BINS),
            "adaptive_ece_by_chance": self.below * DEFAULT_BINS // count,
        }
        result = {}
        for name, place in places.items():
            errors = np.abs(surplus @ (place[:, None] == np.arange(DEFAULT_BINS))).sum(axis=1) / count
            result[name] = [float(errors.mean()), float(np.quantile(errors, 0.95))]
        return result


def compare_errors(
    labels: ArrayLike,
    systems: Mapping[str, ArrayLike],
    groups: NDArray[np.int64],
    samples: int,
    seed: int,
    level: float,
) -> dict[str, dict[str, Any]]:
    """Measure the calibration of two sets of probabilities, and how far they are apart.

    Args:
        labels: (N,), class indices.
        systems: name -> (N, C); the first is that from which the second differs.
        groups: (N,), patient of every image, 0..G-1.
        samples: bootstrap samples; 0: no intervals.
        seed: of the draw.
        level: coverage of the intervals.

    Returns:
        For each name, and for `difference` (second - first): `ERRORS`, each followed by its interval; for each name also
        `ece_by_chance` and `adaptive_ece_by_chance`: mean and upper end (95% lie below) if the probabilities were true, absent
        without samples. Ready for strict JSON.

    Raises:
        ValueError: see `check_predictions`.
    """
    size = int(groups.max()) + 1
    prepared = {name: _Errors(*check_predictions(labels, scores), groups, size) for name, scores in systems.items()}
    drawn: dict[str, dict[str, Floats]] = {name: {key: np.empty(samples) for key in ERRORS} for name in systems}
    done = 0
    for times in draw_counts(size, samples, seed):
        for name, errors in prepared.items():
            for key, column in errors.measure(times).items():
                drawn[name][key][done : done + len(times)] = column
        done += len(times)
    first, second = systems
    points = {name: errors.point for name, errors in prepared.items()}
    points["difference"] = {key: points[second][key] - points[first][key] for key in ERRORS}
    drawn["difference"] = {key: drawn[second][key] - drawn[first][key] for key in ERRORS}
    result: dict[str, dict[str, Any]] = {}
    for name, values in points.items():
        result[name] = {}
        for key in ERRORS:
            result[name] |= beside(key, values[key], percentile_interval(drawn[name][key], level), level)
    for name, errors in prepared.items():
        if samples:
            result[name] |= errors.by_chance(samples, seed)
    return result


def log_losses(labels: NDArray[np.int64], probabilities: Floats) -> Floats:
    """Return the log loss of every image, (N,), as `metrics` averages it."""
    mine = probabilities[np.arange(len(labels)), labels] / probabilities.sum(axis=1)
    return np.asarray(-np.log(np.clip(mine, _SMALLEST, 1 - _SMALLEST)))
