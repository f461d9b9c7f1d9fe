"""Bootstrap over patients: resample weights, percentile intervals, paired differences, and ratios with intervals.

Images of one patient resemble each other, so patients are resampled, not images (cluster bootstrap with percentile
intervals; Efron and Tibshirani 1993, Field and Welsh 2007). No resample is ever laid out: it is a row of weights, how
often each patient was drawn, and a statistic is a function of such rows, (S, G). The value on the test set itself is
that of unit weights. "Patient" stands for the unit of grouping of a data set, which may be a lesion or an image.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.progress import track

Floats = NDArray[np.float64]
Name = TypeVar("Name", bound=Hashable)
NAN = float("nan")

# Resamples measured at once: enough to fill the vector units, few enough to stay in the cache.
CHUNK = 64


def images_of(images: int, groups: int, unit: str, what: str = "test images") -> str:
    """Return `80 test images of 12 patients`; `unit` in the singular or plural."""
    unit = unit.removesuffix("s")
    return f"{images:,} {what}" + (f" of {groups:,} {unit}s" if unit != "image" else "")


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; NaN for an undefined value or a missing interval."""

    value: float
    low: float = NAN
    high: float = NAN

    def to_json(self, name: str, level: float) -> dict[str, Any]:
        """Return `name` and, if there is an interval, `name`_ci95; None for an undefined value."""
        if np.isnan(self.value):
            return {name: None}
        interval = {} if np.isnan(self.low) else {name + interval_suffix(level): [float(self.low), float(self.high)]}
        return {name: float(self.value), **interval}

    def columns(self, name: str = "") -> dict[str, float]:
        """Return cells of a table: `value`, `low`, `high`, or for a name `name`, `name_low`, `name_high`."""
        keys = (name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")
        return dict(zip(keys, (self.value, self.low, self.high), strict=True))


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference of two models on the same resamples, `samples` of which define both; `p`: see `two_sided_p`."""

    p: float = NAN
    samples: int = 0

    @classmethod
    def of(cls, value: float, resampled: Floats, level: float) -> Difference:
        """Return a difference from its value in every resample, (S,)."""
        interval = percentile_interval(resampled, level)
        if interval is None or np.isnan(value):
            return cls(value)
        return cls(value, *interval, two_sided_p(resampled), int((~np.isnan(resampled)).sum()))


class Bootstrap:
    """Resamples of the patients of a test set; equal arguments draw the same patients for every statistic.

    `groups`, (N,), names the patient of every image, each unknown one by a name of its own, and becomes `codes`, 0 to
    G-1; `label` names the bar of the resamples, if there is to be one.
    """

    def __init__(self, groups: ArrayLike, samples: int, seed: int = 0, level: float = 0.95, label: str = "") -> None:
        _check_level(level)
        if samples < 0:
            raise ValueError(f"samples must be at least 0, not {samples}")
        self.codes = group_codes(groups)
        self.images, self.groups = len(self.codes), int(self.codes.max()) + 1
        self.samples, self.seed, self.level, self.label = samples, seed, level, label

    @property
    def unit_weights(self) -> Floats:
        return np.ones((1, self.groups))

    def resample(self, statistic: Callable[[Floats], Floats]) -> Floats:
        """Return a statistic of every resample, (samples, ...); it maps weights (S, G) to (S, ...)."""
        return self.resample_each({0: lambda weights: {"": statistic(weights)}})[0][""]

    def resample_each(
        self, models: Mapping[Name, Callable[[Floats], dict[str, Floats]]]
    ) -> dict[Name, dict[str, Floats]]:
        """Return the statistics of several models on the same resamples, each (samples, ...)."""
        draws = draw_counts(self.groups, self.samples, self.seed, self.label)
        chunks = [{name: measure(weights) for name, measure in models.items()} for weights in draws]
        if not chunks:
            unit = {name: measure(self.unit_weights) for name, measure in models.items()}
            return {name: {key: values[:0] for key, values in columns.items()} for name, columns in unit.items()}
        return {
            name: {key: np.concatenate([chunk[name][key] for chunk in chunks]) for key in chunks[0][name]}
            for name in models
        }

    def sums(self, values: ArrayLike) -> Floats:
        return group_sums(values, self.codes, self.groups)

    def estimate(self, value: float, resampled: Floats) -> Estimate:
        """Return a value with the percentile interval of its resamples, (S,); none for an undefined value."""
        interval = None if np.isnan(value) else percentile_interval(resampled, self.level)
        return Estimate(value, *(interval or (NAN, NAN)))

    def proportion(self, value: float, resampled: Floats, patients: int) -> Estimate:
        """Return a proportion with its interval: at 0 and 1, where all resamples agree, Wilson's over patients."""
        if self.samples and value in (0, 1):
            return Estimate(value, *wilson_interval(int(value) * patients, patients, self.level))
        return self.estimate(value, resampled)

    def ratios(self, amounts: ArrayLike, included: ArrayLike, proportions: bool = True) -> list[Estimate]:
        """Divide sums of `amounts` by counts of the images `included`, (N, K) both: one value a column, NaN without
        images.
        """
        counted = np.asarray(included, dtype=bool)
        numerator = self.sums(np.where(counted, np.asarray(amounts, dtype=np.float64), 0.0))
        denominator = self.sums(counted)
        values = divide(numerator.sum(axis=0), denominator.sum(axis=0)).tolist()
        resampled = self.resample(lambda weights: divide(weights @ numerator, weights @ denominator))
        patients = (denominator > 0).sum(axis=0).tolist()
        columns = zip(values, resampled.T, patients, strict=True)
        return [self.proportion(*column) if proportions else self.estimate(*column[:2]) for column in columns]

    def describe(self, unit: str) -> str:
        """Return how a figure's bands were made, for its caption; `unit` is what was resampled, in the plural."""
        text = images_of(self.images, self.groups, unit)
        if self.samples:
            text += f"; {100 * self.level:g}% intervals from {self.samples} resamples of the {unit} (seed {self.seed})"
        return text


def draw_counts(groups: int, samples: int, seed: int, label: str = "") -> Iterator[Floats]:
    """Draw groups with replacement: yield how often each was drawn, (at most `CHUNK` samples, groups) at a time."""
    generator = np.random.default_rng(seed)
    for done in track(range(0, samples, CHUNK), label):
        size = min(CHUNK, samples - done)
        drawn = [np.bincount(generator.integers(groups, size=groups), minlength=groups) for _ in range(size)]
        yield np.stack(drawn).astype(np.float64)


def group_codes(groups: ArrayLike) -> NDArray[np.int64]:
    """Number the groups, at least 2 and none missing (else ValueError), 0..G-1 in the order of their first image."""
    import pandas as pd

    codes, names = pd.factorize(np.asarray(groups))
    if (codes < 0).any():
        missing = int((codes < 0).sum())
        raise ValueError(f"{missing} images have no group; give each image of an unknown patient a name of its own")
    if len(names) < 2:
        raise ValueError("a bootstrap over patients needs at least 2 patients")
    return codes.astype(np.int64)


def group_sums(values: ArrayLike, groups: NDArray[np.int64], size: int) -> Floats:
    """Return (G, K): the sum of each group's rows of (N, K)."""
    rows = np.asarray(values, dtype=np.float64)
    result = np.zeros((size, rows.shape[1]))
    np.add.at(result, groups, rows)
    return result


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """Divide, NaN where the denominator is 0."""
    result: Floats = np.divide(numerator, denominator, out=np.full(np.shape(numerator), NAN), where=denominator > 0)
    return result


def percentile_interval(resampled: Floats, level: float) -> tuple[float, float] | None:
    """Return the central interval that holds the share `level` of the values; NaN is left out, None if all are."""
    defined = resampled[~np.isnan(resampled)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval_suffix(level: float) -> str:
    """Return what a value's key is followed by for its interval: `_ci95` for 0.95."""
    return f"_ci{100 * level:g}"


def wilson_interval(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927), for counts of independent cases.

    >>> [round(value, 4) for value in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    _check_level(level)
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} of {total} is no proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    proportion = successes / total
    middle = proportion + z**2 / (2 * total)
    half = z * np.sqrt(proportion * (1 - proportion) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    # At none and all the bounds are exactly 0 and 1, which rounding would miss by 1e-16.
    low = 0.0 if successes == 0 else float((middle - half) / scale)
    high = 1.0 if successes == total else float((middle + half) / scale)
    return low, high


def two_sided_p(differences: Floats) -> float:
    """Return twice the smaller tail of differences beyond 0, each with one sample added, so that p is never 0."""
    defined = differences[~np.isnan(differences)]
    tail = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(defined) + 1))


def holm(p_values: Sequence[float | None]) -> list[float]:
    """Correct p-values for multiple comparisons by stepping down (Holm 1979): holds whatever their dependence.

    None or NaN is no comparison: not counted, and NaN in the result.

    >>> holm([0.01, 0.04, None, 0.03])
    [0.03, 0.06, nan, 0.06]
    """
    values = np.array([NAN if value is None else value for value in p_values], dtype=float)
    known = np.flatnonzero(~np.isnan(values))
    if ((values[known] < 0) | (values[known] > 1)).any():
        raise ValueError("p-values must lie in 0..1")
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    values[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(value) for value in values]


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
