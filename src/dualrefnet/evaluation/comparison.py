"""Many systems on the same test images: values with intervals, differences with p, corrected for their number.

A system is what one or more seeds of one training answered. Its value is the mean over seeds of the measure; an
interval comes from resampling patients, the same resamples for every seed and every system, so that what makes a
sample easy or hard cancels out of a difference. The interval thus says how far the value depends on who was in the
test set, given the trained models; how far it depends on the training, the spread over seeds says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.bootstrap import draw, group_codes, percentile_interval, two_sided_p
from dualrefnet.evaluation.metrics import Resampler, check_classes, compute_metrics

Floats = NDArray[np.float64]
NAN = float("nan")


@dataclass(frozen=True)
class Value:
    """A value and its interval; NaN: undefined, or the measure has no interval.

    Attributes:
        value: mean over seeds.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How far a system is above a reference; NaN as in `Value`.

    Attributes:
        difference: system - reference.
        low: lower end of the interval.
        high: upper end.
        p: two-sided, see `two_sided_p`.
        samples: bootstrap samples in which both were defined.
    """

    difference: float
    low: float
    high: float
    p: float
    samples: int


@dataclass(frozen=True)
class PooledBootstrap:
    """Systems measured on the same resamples of patients.

    Attributes:
        points: system -> measure -> value on the whole test set, mean over seeds; NaN where it is undefined for a seed.
        drawn: system -> measure -> (samples,), the value in every resample. Measures without it have no interval.
        groups: number of patients.
        images: number of test images.
        samples: number of resamples.
        level: coverage of the intervals.
    """

    points: Mapping[str, Mapping[str, float]]
    drawn: Mapping[str, Mapping[str, Floats]]
    groups: int
    images: int
    samples: int
    level: float

    def value(self, system: str, measure: str) -> Value:
        """Return a system's value and interval.

        Raises:
            ValueError: the measure is unknown.
        """
        drawn = self.drawn[system].get(measure)
        interval = None if drawn is None else percentile_interval(drawn, self.level)
        return Value(self._point(system, measure), *(interval or (NAN, NAN)))

    def difference(self, system: str, reference: str, measure: str) -> Difference:
        """Return how far `system` is above `reference`.

        Raises:
            ValueError: the measure is unknown.
        """
        difference = self._point(system, measure) - self._point(reference, measure)
        if measure not in self.drawn[system]:
            return Difference(difference, NAN, NAN, NAN, 0)
        drawn = self.drawn[system][measure] - self.drawn[reference][measure]
        interval = percentile_interval(drawn, self.level)
        if interval is None or np.isnan(difference):
            return Difference(difference, NAN, NAN, NAN, 0)
        return Difference(difference, *interval, two_sided_p(drawn), int((~np.isnan(drawn)).sum()))

    def _point(self, system: str, measure: str) -> float:
        points = self.points[system]
        if measure not in points:
            raise ValueError(f"unknown measure {measure!r}; known: {', '.join(points)}")
        return points[measure]


def pooled_bootstrap(
    labels: ArrayLike,
    systems: Mapping[str, Sequence[ArrayLike]],
    groups: ArrayLike,
    classes: Sequence[str],
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    malignant: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> PooledBootstrap:
    """Measure several systems on the same images and on the same resamples of patients.

    Args:
        labels: (N,), indices into `classes`.
        systems: name -> one (N, C) array of probabilities a seed; rows in the order of `labels`.
        groups: (N,), the patient of every image; each image of an unknown patient needs a name of its own.
        classes: names in the order of the columns.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage of the intervals.
        malignant: the classes that are cancer, for the measures `malignant.*`.
        progress: called with (samples done, samples in all).

    Raises:
        ValueError: there is no system, or one without a seed; see also `bootstrap_intervals`.
    """
    classes, malignant = list(classes), list(malignant)
    check_classes(classes, malignant)
    empty = [name for name, seeds in systems.items() if not seeds]
    if empty or not systems:
        raise ValueError(f"no predictions of {', '.join(empty) or 'any system'}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    codes = group_codes(groups)
    resamplers = [
        Resampler(labels, seed_scores, codes, classes, malignant) for seeds in systems.values() for seed_scores in seeds
    ]
    drawn = iter(draw(resamplers, samples, seed, progress))
    points, resampled = {}, {}
    for name, seeds in systems.items():
        points[name] = _mean([flat_measures(compute_metrics(labels, scores, classes, malignant)) for scores in seeds])
        resampled[name] = _mean([next(drawn) for _ in seeds])
    return PooledBootstrap(points, resampled, resamplers[0].group_count, len(codes), samples, level)


def flat_measures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return every value of `compute_metrics` under the keys of `Intervals`, None as NaN.

    Keys are `accuracy`, `per_class.MEL.sensitivity`, `malignant.auc` and the like.
    """
    parts = {"": metrics, "malignant.": metrics.get("malignant", {})}
    parts |= {f"per_class.{name}.": values for name, values in metrics["per_class"].items()}
    return {
        prefix + key: NAN if value is None else float(value)
        for prefix, values in parts.items()
        for key, value in values.items()
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    }


def holm(p_values: Sequence[float | None]) -> list[float]:
    """Correct p-values for their number by stepping down (Holm 1979): holds whatever their dependence.

    Args:
        p_values: one a comparison; None or NaN where there was none: not counted, and NaN in the result.

    Raises:
        ValueError: a p-value lies outside 0..1.

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


def _mean(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Average each measure over seeds; NaN where a seed has none."""
    return {measure: sum(values[measure] for values in seeds) / len(seeds) for measure in seeds[0]}
