"""The reliability diagram of the top label: of the images with a confidence of about 80%, are 80% right?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dualrefnet.evaluation.calibration import DEFAULT_BINS, equal_width_bins, expected_calibration_error, reliability_curve
from dualrefnet.evaluation.curves import check_draw
from dualrefnet.evaluation.inputs import check_predictions
from dualrefnet.evaluation.intervals import draw_counts, percentile_interval, wilson_interval


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram's numbers.

    Attributes:
        table: of `reliability_curve`, and `patients` (number in the bin), `accuracy_low` and `accuracy_high` (NaN where there
            is no interval).
        ece: expected calibration error over the same bins.
        images: number in the test set.
        groups: number of patients in the test set.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage of the intervals.
    """

    table: pd.DataFrame
    ece: float
    images: int
    groups: int
    samples: int
    seed: int
    level: float


def compute_reliability(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    bins: int = DEFAULT_BINS,
    samples: int = 500,
    seed: int = 0,
    level: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
) -> Reliability:
    """Compute the reliability of the top label, with an interval of each bin's accuracy from a bootstrap over patients.

    A resample without images in a bin is skipped for it. Where all of a bin's images are right, or none, all resamples agree,
    which would feign certainty: there the interval is Wilson's, each patient counting as one case. For the same reason a
    bin with the images of a single patient, some of them right, has no interval.

    Args:
        labels: (N,), class indices.
        probabilities: (N, C), rows sum to 1.
        groups: (N,), the patient of every image; each image of an unknown patient needs a name of its own.
        bins: number of bins of equal width.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage.
        progress: called with (samples done, samples in all).

    Raises:
        ValueError: see `check_predictions` and `check_draw`; or `bins` is below 1.
    """
    truth, scores = check_predictions(labels, probabilities)
    codes = check_draw(groups, len(truth), samples, level)
    table, size = reliability_curve(truth, scores, bins), int(codes.max()) + 1
    cells = codes * bins + equal_width_bins(scores.max(axis=1), bins)
    counts = np.bincount(cells, minlength=size * bins).reshape(size, bins).astype(np.float64)
    right = np.bincount(cells, scores.argmax(axis=1) == truth, size * bins).reshape(size, bins)
    drawn = np.full((samples, bins), np.nan)
    done = 0
    for times in draw_counts(size, samples, seed, progress):
        seen = times @ counts
        np.divide(times @ right, seen, out=drawn[done : done + len(times)], where=seen > 0)
        done += len(times)
    table["patients"] = (counts > 0).sum(axis=0)
    intervals = []
    for accuracy, patients, column in zip(table["accuracy"], table["patients"], drawn.T, strict=True):
        if accuracy in (0, 1):
            interval = wilson_interval(int(accuracy) * patients, patients, level)
        else:
            interval = (percentile_interval(column, level) if patients > 1 else None) or (np.nan, np.nan)
        intervals.append(interval)
    table[["accuracy_low", "accuracy_high"]] = intervals
    return Reliability(table, expected_calibration_error(truth, scores, bins), len(truth), size, samples, seed, level)
