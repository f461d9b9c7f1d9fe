"""Calibration: do the probabilities mean what they say?

The confidence of an image is its largest probability (top label). Sources: Naeini et al. 2015 and Guo et al. 2017
(expected calibration error), Nguyen and O'Connor 2015 (bins of equal mass), Brier 1950.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.inputs import check_predictions

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
