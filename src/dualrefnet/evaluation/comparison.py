"""Several models on the same test images: values with intervals, and paired differences.

A system is the predictions of one or more seeds of one training. Its value is the mean of the metric over seeds. Its
interval resamples patients, the same ones for every seed and every system, so that what makes a resample easy or hard
cancels out of a difference. The interval says how far the value depends on the patients of the test set, given the
trained models; how far it depends on the training, the standard deviation over seeds says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dualrefnet.evaluation.bootstrap import (
    NAN,
    Bootstrap,
    Difference,
    Estimate,
    Floats,
    interval_suffix,
    percentile_interval,
)
from dualrefnet.evaluation.metrics import WeightedMetrics, compute_metrics


class Intervals(dict[str, tuple[float, float]]):
    """Metric -> (low, high), and how they were drawn.

    Keys are `accuracy`, `per_class.MEL.sensitivity`, `malignant.auc` and the like.

    Attributes:
        samples: number of bootstrap resamples.
        level: coverage, such as 0.95.
        groups: number of patients.
        samples_without: class of the test set -> number of resamples without an image of it. Where they are many, the
            intervals of that class are too narrow.
    """

    samples: int
    level: float
    groups: int
    samples_without: dict[str, int]


def bootstrap_intervals(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    classes: Sequence[str],
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    progress: Callable[[int, int], None] | None = None,
    malignant: Sequence[str] = (),
) -> Intervals:
    """Return percentile intervals of the headline and per-class metrics from a bootstrap over patients.

    Args:
        labels: (N,), indices into `classes`.
        probabilities: (N, C), rows sum to 1.
        groups: (N,), the patient of every image; each image of an unknown patient needs a name of its own.
        classes: names in the order of the columns.
        samples: bootstrap resamples.
        seed: of the draw.
        level: coverage.
        progress: called with (samples done, samples in all).
        malignant: the classes that are cancer; empty: no `malignant` intervals.

    Returns:
        The intervals; a metric that is undefined in every resample has none.

    Raises:
        ValueError: see `check_predictions`, `check_classes` and `Bootstrap`.
    """
    bootstrap = Bootstrap(groups, len(np.asarray(labels)), samples, seed, level, progress)
    model = WeightedMetrics(labels, probabilities, bootstrap.codes, classes, malignant)
    resampled = bootstrap.resample_each({"": model.measure})[""]
    intervals = {measure: percentile_interval(column, level) for measure, column in resampled.items()}
    result = Intervals({measure: interval for measure, interval in intervals.items() if interval is not None})
    present = [classes[index] for index in np.unique(np.asarray(labels))]
    result.samples, result.level, result.groups = samples, level, bootstrap.groups
    result.samples_without = {name: int(np.isnan(resampled[f"per_class.{name}.sensitivity"]).sum()) for name in present}
    return result


def with_intervals(metrics: Mapping[str, Any], intervals: Intervals) -> dict[str, Any]:
    """Return the content of metrics.json: every value that has an interval is followed by it.

    `accuracy` is followed by `accuracy_ci95` ([low, high]; `_ci90` at level 0.9), also inside `per_class` and
    `malignant`. `bootstrap` tells how the intervals were drawn.

    Args:
        metrics: as `compute_metrics` returns them; not changed.
        intervals: as `bootstrap_intervals` returns them.
    """
    suffix = interval_suffix(intervals.level)

    def beside(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in values.items():
            result[key] = value
            if prefix + key in intervals:
                result[key + suffix] = list(intervals[prefix + key])
        return result

    result = beside(metrics, "")
    result["per_class"] = {name: beside(values, f"per_class.{name}.") for name, values in metrics["per_class"].items()}
    if "malignant" in metrics:
        result["malignant"] = beside(metrics["malignant"], "malignant.")
    result["bootstrap"] = {
        "samples": intervals.samples,
        "level": intervals.level,
        "groups": intervals.groups,
        "samples_without": intervals.samples_without,
    }
    without = [f"{name} ({count})" for name, count in intervals.samples_without.items() if count]
    if without:
        note = f"missing from some of the {intervals.samples} bootstrap resamples, and left out there: "
        result["remarks"] = [*metrics["remarks"], f"{note}{', '.join(without)}; their intervals are too narrow"]
    return result


@dataclass(frozen=True)
class PooledBootstrap:
    """Systems measured on the same resamples of patients.

    Attributes:
        points: system -> metric -> value on the test set, mean over seeds; NaN where it is undefined for a seed.
        drawn: system -> metric -> (samples,), the value in every resample. Metrics without it have no interval.
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

    def value(self, system: str, measure: str) -> Estimate:
        """Return a system's value and interval; ValueError: the metric is unknown."""
        interval = percentile_interval(self._resampled(system, measure), self.level)
        return Estimate(self._point(system, measure), *(interval or (NAN, NAN)))

    def difference(self, system: str, reference: str, measure: str) -> Difference:
        """Return how far `system` is above `reference`; ValueError: the metric is unknown."""
        value = self._point(system, measure) - self._point(reference, measure)
        return Difference.of(value, self._resampled(system, measure) - self._resampled(reference, measure), self.level)

    def _point(self, system: str, measure: str) -> float:
        points = self.points[system]
        if measure not in points:
            raise ValueError(f"unknown measure {measure!r}; known: {', '.join(points)}")
        return points[measure]

    def _resampled(self, system: str, measure: str) -> Floats:
        return self.drawn[system].get(measure, np.empty(0))


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

    Args as `bootstrap_intervals`, but for `systems`: name -> one (N, C) array of probabilities a seed.

    Raises:
        ValueError: there is no system, or one without a seed; see also `bootstrap_intervals`.
    """
    empty = [name for name, seeds in systems.items() if not seeds]
    if empty or not systems:
        raise ValueError(f"no predictions of {', '.join(empty) or 'any system'}")
    bootstrap = Bootstrap(groups, len(np.asarray(labels)), samples, seed, level, progress)
    points = {
        name: _mean([flat_measures(compute_metrics(labels, scores, classes, malignant)) for scores in seeds])
        for name, seeds in systems.items()
    }
    models = {
        name: [WeightedMetrics(labels, scores, bootstrap.codes, classes, malignant) for scores in seeds]
        for name, seeds in systems.items()
    }
    drawn = bootstrap.resample_each(
        {
            name: lambda weights, seeds=seeds: _mean([model.measure(weights) for model in seeds])  # type: ignore[misc]
            for name, seeds in models.items()
        }
    )
    return PooledBootstrap(points, drawn, bootstrap.groups, bootstrap.images, samples, level)


def paired_difference(
    labels: ArrayLike,
    probabilities_a: ArrayLike,
    probabilities_b: ArrayLike,
    groups: ArrayLike,
    classes: Sequence[str],
    measure: str = "balanced_accuracy",
    samples: int = 1000,
    seed: int = 0,
    malignant: Sequence[str] = (),
) -> Difference:
    """Compare two models on the same images: how far is model A's value of `measure` above B's?

    Both (N, C) arrays of probabilities are measured on the same resamples; `pooled_bootstrap` explains the rest.

    Raises:
        ValueError: the metric is unknown; see also `bootstrap_intervals`.
    """
    systems = {"a": [probabilities_a], "b": [probabilities_b]}
    bootstrap = pooled_bootstrap(labels, systems, groups, classes, samples, seed, malignant=malignant)
    return bootstrap.difference("a", "b", measure)


def flat_measures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return every value of `compute_metrics` under the keys of `Intervals`, None as NaN."""
    parts = {"": metrics, "malignant.": metrics.get("malignant", {})}
    parts |= {f"per_class.{name}.": values for name, values in metrics["per_class"].items()}
    return {
        prefix + key: NAN if value is None else float(value)
        for prefix, values in parts.items()
        for key, value in values.items()
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    }


def _mean(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Average each metric over seeds; NaN where a seed has none."""
    return {measure: sum(values[measure] for values in seeds) / len(seeds) for measure in seeds[0]}
