"""Intervals: how far could a value lie from the truth, given that few patients were seen?

Images of one patient resemble each other, so the bootstrap draws patients, not images (cluster bootstrap, percentile
interval; Efron and Tibshirani 1993, Field and Welsh 2007). All sums are weighted by how often a patient was drawn, so
no sample is ever laid out: 1,000 samples of 5,000 images take a second or two.

A class of which no image was drawn is left out *of that sample*: its own values are skipped and the macro averages run
over the classes left, exactly as `metrics` treats a class absent from the test set. `Intervals.samples_without` counts
such samples; where they are many, the interval of that class is too narrow to be believed.
"""

# also: Shares and means of test images, with intervals over patients.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.metrics import Resampler, check_classes

# Samples measured at once: enough to fill the vector units, few enough to stay in the cache.
CHUNK = 64


class Intervals(dict[str, tuple[float, float]]):
    """Measure -> (low, high), and how they were drawn.

    Keys are `accuracy`, `per_class.MEL.sensitivity`, `malignant.auc` and the like.

    Attributes:
        samples: number of bootstrap samples.
        level: coverage, such as 0.95.
        groups: number of patients.
        samples_without: class -> number of samples in which it had no image; only classes of the test set.
    """

    def __init__(
        self,
        values: Mapping[str, tuple[float, float]],
        *,
        samples: int,
        level: float,
        groups: int,
        samples_without: Mapping[str, int],
    ) -> None:
        super().__init__(values)
        self.samples = samples
        self.level = level
        self.groups = groups
        self.samples_without = dict(samples_without)


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
    """Return percentile intervals of the headline and per-class values from a patient-level bootstrap.

    Args:
        labels: (N,), indices into `classes`.
        probabilities: (N, C), rows sum to 1.
        groups: (N,), the patient of every image; each image of an unknown patient needs a name of its own.
        classes: names in the order of the columns.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage.
        progress: called with (samples done, samples in all).
        malignant: the classes that are cancer; empty: no `malignant` intervals.

    Returns:
        The intervals; a value that is undefined in every sample has none.

    Raises:
        ValueError: see `check_predictions`; fewer than 2 groups, a missing group, `samples` below 1 or `level` outside
            0..1.
    """
    classes, malignant = list(classes), list(malignant)
    check_classes(classes, malignant)
    _check_level(level)
    codes = group_codes(groups)
    resampler = Resampler(labels, probabilities, codes, classes, malignant)
    drawn = draw([resampler], samples, seed, progress)[0]

    values: dict[str, tuple[float, float]] = {}
    for measure, column in drawn.items():
        interval = percentile_interval(column, level)
        if interval is not None:
            values[measure] = interval
    present = [classes[index] for index in np.unique(np.asarray(labels))]
    without = {name: int(np.isnan(drawn[f"per_class.{name}.sensitivity"]).sum()) for name in present}
    return Intervals(values, samples=samples, level=level, groups=resampler.group_count, samples_without=without)


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
) -> dict[str, Any]:
    """Compare two models on the same images: is A's value of `measure` above B's?

    Both are measured on the same resamples of patients, so what makes a sample easy or hard for both cancels out.

    Args:
        labels: (N,).
        probabilities_a: (N, C), model A.
        probabilities_b: (N, C), model B, on the same images in the same order.
        groups: (N,), the patient of every image.
        classes: names in the order of the columns.
        measure: a key of `bootstrap_intervals`, such as `auc_macro_ovr` or `per_class.MEL.sensitivity`.
        samples: bootstrap samples.
        seed: of the draw.
        malignant: the classes that are cancer, for the measures `malignant.*`.

    Returns:
        `measure`, `a`, `b`, `difference` (a - b), `ci95` ([low, high] of the difference), `p` (two-sided: twice the
        smaller tail of the bootstrap differences beyond 0, each tail with one sample added so that p is never 0),
        `samples` (those in which the measure was defined) and `groups`.

    Raises:
        ValueError: see `bootstrap_intervals`; the measure is unknown, or undefined on these images.
    """
    classes, malignant = list(classes), list(malignant)
    check_classes(classes, malignant)
    codes = group_codes(groups)
    resamplers = [
        Resampler(labels, probabilities, codes, classes, malignant)
        for probabilities in (probabilities_a, probabilities_b)
    ]
    whole = np.ones((resamplers[0].group_count, 1))
    points = [resampler.measure(whole) for resampler in resamplers]
    if measure not in points[0]:
        raise ValueError(f"unknown measure {measure!r}; known: {', '.join(points[0])}")
    a, b = (float(point[measure][0]) for point in points)
    if np.isnan(a) or np.isnan(b):
        raise ValueError(f"{measure} is undefined on these images")
    drawn = draw(resamplers, samples, seed, None)
    differences = drawn[0][measure] - drawn[1][measure]
    interval = percentile_interval(differences, 0.95)
    if interval is None:
        raise ValueError(f"{measure} is undefined in every bootstrap sample; there are too few images")
    return {
        "measure": measure,
        "a": a,
        "b": b,
        "difference": a - b,
        "ci95": list(interval),
        "p": two_sided_p(differences),
        "samples": int((~np.isnan(differences)).sum()),
        "groups": resamplers[0].group_count,
    }


def wilson_interval(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927), for counts of independent cases.

    Raises:
        ValueError: not 0 <= successes <= total with total > 0, or `level` is outside 0..1.

    >>> [round(value, 4) for value in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    _check_level(level)
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} of {total} is no proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / total
    centre = share + z**2 / (2 * total)
    half = z * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    # At none and all the bounds are exactly 0 and 1, which rounding would miss by 1e-16.
    low = 0.0 if successes == 0 else float((centre - half) / scale)
    high = 1.0 if successes == total else float((centre + half) / scale)
    return low, high


def with_intervals(metrics: Mapping[str, Any], intervals: Intervals) -> dict[str, Any]:
    """Return the content of metrics.json: every value that has an interval gets it as its neighbour.

    `accuracy` is followed by `accuracy_ci95` ([low, high]; `_ci90` at level 0.9), also inside `per_class` and
    `malignant`. `bootstrap` tells how the intervals were drawn, and a remark names the classes that vanished from
    samples.

    Args:
        metrics: as `compute_metrics` returns them; not changed.
        intervals: as `bootstrap_intervals` returns them.
    """
    result = _beside(metrics, intervals, "")
    result["per_class"] = {
        name: _beside(values, intervals, f"per_class.{name}.") for name, values in metrics["per_class"].items()
    }
    if "malignant" in metrics:
        result["malignant"] = _beside(metrics["malignant"], intervals, "malignant.")
    result["bootstrap"] = {
        "samples": intervals.samples,
        "level": intervals.level,
        "groups": intervals.groups,
        "samples_without": intervals.samples_without,
    }
    vanished = [f"{name} ({count})" for name, count in intervals.samples_without.items() if count]
    remarks = list(metrics["remarks"])
    if vanished:
        remarks.append(
            f"classes missing from some of the {intervals.samples} bootstrap samples, and skipped in those: {', '.join(vanished)}; "
            "their intervals are too narrow"
        )
    result["remarks"] = remarks
    return result


def draw(
    resamplers: Sequence[Resampler], samples: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, NDArray[np.float64]]]:
    """Measure every model on the same draws of groups.

    Args:
        resamplers: one a model, all of the same groups.
        samples: number of draws.
        seed: of the draws.
        progress: called with (samples done, samples in all).

    Returns:
        For each model, measure -> (samples,), NaN where undefined.

    Raises:
        ValueError: `samples` is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    groups = resamplers[0].group_count
    parts: list[list[dict[str, NDArray[np.float64]]]] = [[] for _ in resamplers]
    for times in draw_counts(groups, samples, seed, progress):
        for part, resampler in zip(parts, resamplers, strict=True):
            part.append(resampler.measure(np.ascontiguousarray(times.T)))
    return [{measure: np.concatenate([chunk[measure] for chunk in part]) for measure in part[0]} for part in parts]


def draw_counts(
    groups: int, samples: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> Iterator[NDArray[np.float64]]:
    """Draw groups with replacement, and give how often each was drawn, (samples, groups), at most `CHUNK` samples at a
    time.

    Args:
        groups: how many there are, and how many are drawn.
        samples: number of draws.
        seed: of the draws.
        progress: called with (samples done, samples in all), when a chunk has been used.
    """
    generator = np.random.default_rng(seed)
    for done in range(0, samples, CHUNK):
        size = min(CHUNK, samples - done)
        yield np.stack(
            [np.bincount(generator.integers(groups, size=groups), minlength=groups) for _ in range(size)]
        ).astype(np.float64)
        if progress is not None:
            progress(done + size, samples)


def group_codes(groups: ArrayLike) -> NDArray[np.int64]:
    """Number the groups 0..G-1 in the order of their first image.

    Raises:
        ValueError: an image has no group, or there are fewer than 2 groups.
    """
    codes, names = pd.factorize(np.asarray(groups))
    if (codes < 0).any():
        raise ValueError(
            f"{int((codes < 0).sum())} images have no group; give each image of an unknown patient a name of its own"
        )
    if len(names) < 2:
        raise ValueError("a bootstrap over patients needs at least 2 patients")
    return codes.astype(np.int64)


def percentile_interval(drawn: NDArray[np.float64], level: float) -> tuple[float, float] | None:
    """Return the interval that holds the share `level` of the defined (not NaN) values; None if there are none."""
    defined = drawn[~np.isnan(drawn)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def two_sided_p(differences: NDArray[np.float64]) -> float:
    """Return twice the smaller tail of bootstrap differences beyond 0, NaN left out.

    Each tail has one sample added, so that p is never 0.
    """
    defined = differences[~np.isnan(differences)]
    tail = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(defined) + 1))


def interval_suffix(level: float) -> str:
    """Return what is added to a measure's name for its interval: `_ci95` for 0.95."""
    return f"_ci{100 * level:g}"


def _beside(values: Mapping[str, Any], intervals: Intervals, prefix: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        result[key] = value
        if prefix + key in intervals:
            result[key + interval_suffix(intervals.level)] = list(intervals[prefix + key])
    return result


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")


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
    amounts: ArrayLike,
    about: ArrayLike,
    groups: NDArray[np.int64],
    samples: int,
    seed: int,
    level: float,
    shares: bool = True,
) -> list[Ratio]:
    """Divide sums by counts, with percentile intervals of a bootstrap over patients.

    Args:
        amounts: (N, K), what is summed; truth values for shares.
        about: (N, K), whether the image belongs to the question.
        groups: (N,), patient of every image, 0..G-1.
        samples: bootstrap samples; 0: no intervals.
        seed: of the draw.
        level: coverage of the intervals.
        shares: the values are shares: where none or all images count, all resamples agree, which would feign certainty,
            and the
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
        drawn = np.concatenate(
            [divide(times @ numerator, times @ denominator) for times in draw_counts(size, samples, seed)]
        )
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
