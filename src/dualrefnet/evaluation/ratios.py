"""Shares and means of test images, with intervals over patients.

Everything here is a sum divided by a sum: of the images that a question is about, how many, or how much. A resample of patients
changes how often each image counts in both sums, so all resamples are two products of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.intervals import draw_counts, interval_suffix, percentile_interval, wilson_interval

Floats = NDArray[np.float64]
NAN = float("nan")


@dataclass(frozen=True)
class Ratio:
    """A value and its interval; NaN: undefined, or there is no interval.

    Attributes:
        value: on all images.
        low: lower end of the interval.
        high: upper end.
        count: number of images that it is about.
    """

    value: float
    low: float
    high: float
    count: int

    def to_json(self, name: str, level: float) -> dict[str, Any]:
        """Return `name` and, if there is an interval, `name`_ci95; None for an undefined value."""
        return beside(name, self.value, (self.low, self.high), level)


def beside(name: str, value: float, bounds: tuple[float, float] | None, level: float) -> dict[str, Any]:
    """Return a value for strict JSON with its interval, if there is one, as its neighbour."""
    result: dict[str, Any] = {name: None if np.isnan(value) else float(value)}
    if bounds is not None and not np.isnan(bounds[0]) and not np.isnan(value):
        result[name + interval_suffix(level)] = [float(bounds[0]), float(bounds[1])]
    return result


def measure_ratios(
    amounts: ArrayLike, about: ArrayLike, groups: NDArray[np.int64], samples: int, seed: int, level: float, shares: bool = True
) -> list[Ratio]:
    """Divide sums by counts, with percentile intervals of a bootstrap over patients.

    Args:
        amounts: (N, K), what is summed; truth values for shares.
        about: (N, K), whether the image belongs to the question.
        groups: (N,), patient of every image, 0..G-1.
        samples: bootstrap samples; 0: no intervals.
        seed: of the draw.
        level: coverage of the intervals.
        shares: the values are shares: where none or all images count, all resamples agree, which would feign certainty, and the
            interval is Wilson's, each patient counting as one case.

    Returns:
        One value a column; NaN where no image belongs to the question. Resamples without such an image are skipped.
    """
    wanted = np.asarray(about, dtype=bool)
    summed = np.where(wanted, np.asarray(amounts, dtype=np.float64), 0.0)
    size = int(groups.max()) + 1
    numerator, denominator = group_sums(summed, groups, size), group_sums(wanted, groups, size)
    values = divide(numerator.sum(axis=0), denominator.sum(axis=0))
    patients, counts = (denominator > 0).sum(axis=0), wanted.sum(axis=0)
    drawn = np.empty((0, wanted.shape[1]))
    if samples:
        drawn = np.concatenate([divide(times @ numerator, times @ denominator) for times in draw_counts(size, samples, seed)])
    result = []
    for column, value in enumerate(values.tolist()):
        bounds = None
        if samples and shares and value in (0, 1):
            bounds = wilson_interval(int(value) * int(patients[column]), int(patients[column]), level)
        elif samples and not np.isnan(value):
            bounds = percentile_interval(drawn[:, column], level)
        result.append(Ratio(value, *(bounds or (NAN, NAN)), int(counts[column])))
    return result


def group_sums(values: ArrayLike, groups: NDArray[np.int64], size: int) -> Floats:
    """Return (G, K): the sum of each group's rows of (N, K)."""
    rows = np.asarray(values, dtype=np.float64)
    result = np.zeros((size, rows.shape[1]))
    np.add.at(result, groups, rows)
    return result


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """Divide, NaN where the denominator is 0."""
    result: Floats = np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)
    return result
