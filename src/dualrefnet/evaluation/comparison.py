"""Several models on the same test images: values with intervals, and paired differences.

A system is the predictions of one or more seeds of one training. Its value is the mean of the metric over seeds. Its
interval resamples patients, the same ones for every seed and every system, so that what makes a resample easy or hard
cancels out of a difference. The interval says how far the value depends on the patients of the test set, given the
trained models; how far it depends on the training, the standard deviation over seeds says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from dualrefnet.evaluation.bootstrap import (
    NAN,
    Bootstrap,
    Difference,
    Estimate,
    Floats,
    holm,
    interval_suffix,
    percentile_interval,
)
from dualrefnet.evaluation.metrics import WeightedMetrics, compute_metrics


@dataclass(frozen=True)
class PooledBootstrap:
    """Systems measured on the same resamples of patients; metrics that aren't in `drawn` have no interval."""

    points: Mapping[str, Mapping[str, float]]  # system -> metric -> mean over seeds; NaN: undefined for a seed
    drawn: Mapping[str, Mapping[str, Floats]]  # system -> metric -> (samples,), the value in every resample
    groups: int  # number of patients
    images: int
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
    bootstrap: Bootstrap,
    classes: Sequence[str],
    malignant: Sequence[str] = (),
) -> PooledBootstrap:
    """Measure systems, name -> one (N, C) array of probabilities a seed, on the same images, labels (N,)."""
    empty = [name for name, seeds in systems.items() if not seeds]
    if empty or not systems:
        raise ValueError(f"no predictions of {', '.join(empty) or 'any system'}")
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
    return PooledBootstrap(points, drawn, bootstrap.groups, bootstrap.images, bootstrap.level)


# What two systems are compared by, class by class.
COMPARED_BY_CLASS = ("sensitivity", "ppv")


def class_differences(bootstrap: PooledBootstrap, system: str, reference: str, classes: Sequence[str]) -> pd.DataFrame:
    """Return a row a class and measure: how far `system` is above `reference` in sensitivity and precision."""
    rows = []
    for measure in COMPARED_BY_CLASS:
        for name in classes:
            key = f"per_class.{name}.{measure}"
            found = bootstrap.difference(system, reference, key)
            rows.append(
                {
                    "class": name,
                    "images": int(bootstrap.value(system, f"per_class.{name}.support").value),
                    "measure": measure,
                    "value": bootstrap.value(system, key).value,
                    "reference_value": bootstrap.value(reference, key).value,
                    "difference": found.value,
                    "low": found.low,
                    "high": found.high,
                    "p": found.p,
                }
            )
    return pd.DataFrame(rows)


def corrected_classes(rows: pd.DataFrame) -> pd.DataFrame:
    """Add `p_holm` to rows of `class_differences`, corrected over all of a measure."""
    return rows.assign(p_holm=rows.groupby("measure", sort=False)["p"].transform(lambda p: holm(p.tolist())))


def metrics_with_intervals(
    labels: ArrayLike,
    probabilities: ArrayLike,
    bootstrap: Bootstrap,
    classes: Sequence[str],
    malignant: Sequence[str] = (),
) -> dict[str, Any]:
    """Return `compute_metrics`, and behind every value its interval (`accuracy_ci95`): the content of metrics.json."""
    metrics = compute_metrics(labels, probabilities, classes, malignant)
    if not bootstrap.samples:
        return metrics
    drawn = pooled_bootstrap(labels, {"": [probabilities]}, bootstrap, classes, malignant).drawn[""]
    suffix = interval_suffix(bootstrap.level)

    def beside(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in values.items():
            result[key] = value
            interval = percentile_interval(drawn.get(prefix + key, np.empty(0)), bootstrap.level)
            if interval is not None:
                result[key + suffix] = list(interval)
        return result

    by_class: dict[str, dict[str, Any]] = metrics["per_class"]
    result = beside(metrics)
    result["per_class"] = {name: beside(values, f"per_class.{name}.") for name, values in by_class.items()}
    if malignant:
        result["malignant"] = beside(metrics["malignant"], "malignant.")
    without = {
        name: int(np.isnan(drawn[f"per_class.{name}.sensitivity"]).sum())
        for name, values in by_class.items()
        if values["support"]
    }
    result["bootstrap"] = {
        "samples": bootstrap.samples,
        "level": bootstrap.level,
        "groups": bootstrap.groups,
        "samples_without": without,
    }
    named = ", ".join(f"{name} ({count})" for name, count in without.items() if count)
    if named:
        note = f"missing from some of the {bootstrap.samples} bootstrap resamples, and left out there: {named}"
        result["remarks"] = [*metrics["remarks"], f"{note}; their intervals are too narrow"]
    return result


def flat_measures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return every value of `compute_metrics` under keys like `accuracy` and `per_class.MEL.auc`, None as NaN."""
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
