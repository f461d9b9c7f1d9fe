"""Temperature scaling: one number, found on the validation side, that makes a model as sure of itself as it may be.

Every probability is raised to the power 1/T and the row is scaled to sum 1 (Guo et al. 2017): T above 1 takes sureness
away,
T below 1 adds some. The likeliest class stays the likeliest. The logarithm of a probability is the logit up to a
constant of the
row, and the constant cancels out, so the probabilities are all that is needed.
"""

# also: Conformal sets: instead of one class, as few classes as are needed for the right one to be among them as often
# as promised.
# also: Calibration errors of several sets of probabilities of the same images, on the same resamples of patients.
# also: What a run's validation side teaches about its probabilities, and what that is worth on the test side.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.bootstrap import (
    Ratio,
    beside,
    draw_counts,
    group_codes,
    group_sums,
    measure_ratios,
    percentile_interval,
)
from dualrefnet.evaluation.metrics import (
    DEFAULT_BINS,
    adaptive_calibration_error,
    brier_score,
    check_classes,
    check_predictions,
    equal_width_bins,
    expected_calibration_error,
)
from dualrefnet.evaluation.referral import (
    TABLE,
    measure_referral,
    measure_selective,
    referral_threshold,
    threshold_interval,
)
from dualrefnet.runtime.availability import Availability, Thresholds
from dualrefnet.runtime.calibration import Decision, apply_temperature, malignancy, prediction_sets, softmax, to_logits

Floats = NDArray[np.float64]


# Beyond these a temperature says that the validation side is too small or the model useless, not how sure it may be.
LOWEST, HIGHEST = 0.05, 20.0


# Halvings of the range of log T: the last is far below what a float can tell.
STEPS = 60


# Temperatures between which the intervals interpolate.
_GRID = np.exp(np.linspace(np.log(LOWEST), np.log(HIGHEST), 241))


def fit_temperature(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the temperature at which the log loss is smallest.

    The log loss is convex in 1/T, so its slope changes sign once, and halving the range finds where.

    Args:
        labels: (N,), class indices.
        probabilities: (N, C), rows sum to 1.

    Returns:
        A number in `LOWEST`..`HIGHEST`. 1 if every image is right: then the log loss falls for ever as T falls to 0,
        which says
        that there are too few images, not that the model may be sure of everything.

    Raises:
        ValueError: see `check_predictions`.
    """
    truth, scores = check_predictions(labels, probabilities)
    logits = to_logits(scores)
    if all_right(truth, scores):
        return 1.0
    low, high = np.log([LOWEST, HIGHEST])
    for _ in range(STEPS):
        middle = (low + high) / 2
        # A positive slope over 1/T: the smallest log loss lies at a smaller 1/T, a higher T.
        low, high = (middle, high) if _slopes(truth, logits, float(np.exp(middle))).mean() > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def all_right(labels: NDArray[np.int64], probabilities: Floats) -> bool:
    """Return whether every image's class has the largest probability (shared or not): then no temperature can be
    found.
    """
    return bool((probabilities[np.arange(len(labels)), labels] == probabilities.max(axis=1)).all())


def at_bound(temperature: float) -> bool:
    """Return whether a temperature stands at an end of its range: the probabilities then say little."""
    return not LOWEST * 1.001 < temperature < HIGHEST / 1.001


def temperature_interval(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: NDArray[np.int64],
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float] | None:
    """Return the percentile interval of the temperature over resampled patients.

    A resample in which every image is right has none and is skipped. Between the temperatures of a fine grid the slope
    of the log
    loss counts as straight.

    Args:
        labels: (N,), class indices.
        probabilities: (N, C), rows sum to 1.
        groups: (N,), patient of every image, 0..G-1.
        samples: bootstrap samples.
        seed: of the draw.
        level: coverage.

    Returns:
        (low, high); None if every resample was skipped.

    Raises:
        ValueError: see `check_predictions`.
    """
    truth, scores = check_predictions(labels, probabilities)
    logits, size = to_logits(scores), int(groups.max()) + 1
    slopes = np.stack([np.bincount(groups, _slopes(truth, logits, temperature), size) for temperature in _GRID], axis=1)
    wrong = np.bincount(groups, scores[np.arange(len(truth)), truth] < scores.max(axis=1), size)
    found = []
    for times in draw_counts(size, samples, seed):
        found.append(np.where(times @ wrong > 0, _zeros(times @ slopes), np.nan))
    return percentile_interval(np.concatenate(found), level)


def _zeros(slopes: Floats) -> Floats:
    """Return for each row the temperature of `_GRID` at which a falling slope passes 0, straight between two of the
    grid.
    """
    positive = slopes > 0
    # The first that isn't positive; none: the highest temperature.
    after = np.where(positive.all(axis=1), len(_GRID) - 1, (~positive).argmax(axis=1))
    before = np.maximum(after - 1, 0)
    rows, places = np.arange(len(slopes)), np.log(_GRID)
    above, below = slopes[rows, before], slopes[rows, after]
    crossing = (above > 0) & (below <= 0)
    share = np.divide(above, above - below, out=np.ones(len(slopes)), where=crossing)
    return np.asarray(np.exp(places[before] + share * (places[after] - places[before])))


def _slopes(truth: NDArray[np.int64], logits: Floats, temperature: float) -> Floats:
    """Return each image's slope of the log loss over 1/T: the mean logit, weighted by probability, less that of its
    class.
    """
    return np.asarray((softmax(logits / temperature) * logits).sum(axis=1) - logits[np.arange(len(truth)), truth])


def conformal_threshold(true_probabilities: ArrayLike, coverage: float, draws: int = 1) -> float:
    """Return the probability that a class must reach to be in a set; 0 (all classes) if there are too few images.

    Args:
        true_probabilities: (n * draws,), what each calibration image's true class was given; may be empty.
        coverage: how often the right class shall be in the set, between 0 and 1.
        draws: inputs of each image, such as several choices of its metadata; they count as one.

    Raises:
        ValueError: `coverage` isn't between 0 and 1.

    >>> conformal_threshold([0.9, 0.5, 0.8, 0.6], 0.6)  # ceil(5 x .6) = 3rd largest
    0.6
    >>> conformal_threshold([0.9, 0.5, 0.8, 0.6], 0.9)  # ceil(5 x .9) = 5, and there are four
    0.0
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must lie between 0 and 1, not {coverage}")
    values = np.sort(np.asarray(true_probabilities, dtype=np.float64))[::-1]
    images = len(values) // draws
    return float(values[_rank(images, coverage) * draws - 1]) if can_promise(images, coverage) else 0.0


def can_promise(images: int, coverage: float) -> bool:
    """Return whether so many calibration images are enough for a promise: 9 for 90%, 19 for 95%."""
    return _rank(images, coverage) <= images


def class_thresholds(
    labels: NDArray[np.int64], probabilities: Floats, coverage: float, draws: int = 1
) -> tuple[float, ...]:
    """Return the threshold of each class from its own images; 0 (in every set) for a class with too few of them."""
    count = probabilities.shape[1]
    return tuple(conformal_threshold(probabilities[labels == index, index], coverage, draws) for index in range(count))


def measure_sets(
    labels: NDArray[np.int64],
    probabilities: Floats,
    thresholds: float | Sequence[float],
    groups: NDArray[np.int64],
    classes: Sequence[str],
    coverage: float,
    samples: int,
    seed: int,
    level: float,
) -> dict[str, Any]:
    """Measure sets on images that had no part in the thresholds.

    Args:
        labels: (N,).
        probabilities: (N, C), as those from which the thresholds come.
        thresholds: one for all classes, or one for each.
        groups: (N,), patient of every image, 0..G-1.
        classes: names.
        coverage: what was promised.
        samples: bootstrap samples; 0: no intervals.
        seed: of the draw.
        level: coverage of the intervals.

    Returns:
        `coverage` (share of images whose set holds the right class), `mean_size`, `singletons` (share of sets of one
        class), each
        with its interval; `filled` (number of sets that would have been empty); `promise` (`within` if the promised
        coverage lies
        in the interval, `missed` if the interval lies below it, `exceeded` if above; None without an interval); `sizes`
        (number
        of images with a set of 1, 2, ... classes); `per_class` (class -> `coverage`, `mean_size`, `images`).
    """
    sets = prediction_sets(probabilities, thresholds)
    size, held = sets.sum(axis=1), sets[np.arange(len(labels)), labels]
    everything = np.ones((len(labels), 1), dtype=bool)
    mine = labels[:, None] == np.arange(len(classes))
    about = np.hstack([everything, everything, mine])
    right = np.hstack([held[:, None], size[:, None] == 1, np.tile(held[:, None], len(classes))])
    whole, singletons, *by_class = measure_ratios(right, about, groups, samples, seed, level)
    sizes = measure_ratios(
        np.tile(size[:, None], len(classes) + 1),
        np.hstack([everything, mine]),
        groups,
        samples,
        seed,
        level,
        shares=False,
    )
    result = (
        whole.to_json("coverage", level)
        | sizes[0].to_json("mean_size", level)
        | singletons.to_json("singletons", level)
    )
    result["filled"] = int((probabilities < np.asarray(thresholds)).all(axis=1).sum())
    result["promise"] = _promise(whole, coverage)
    result["sizes"] = np.bincount(size, minlength=len(classes) + 1)[1:].tolist()
    result["per_class"] = {
        name: one.to_json("coverage", level) | its_size.to_json("mean_size", level) | {"images": one.count}
        for name, one, its_size in zip(classes, by_class, sizes[1:], strict=True)
    }
    return result


def _rank(images: int, coverage: float) -> int:
    # 10 x .9 must not become 9.000000000000002.
    return math.ceil((images + 1) * coverage - 1e-9)


def _promise(ratio: Ratio, coverage: float) -> str | None:
    if np.isnan(ratio.low):
        return None
    if ratio.high < coverage:
        return "missed"
    return "exceeded" if ratio.low > coverage else "within"


ERRORS = ("ece", "adaptive_ece", "brier", "log_loss")


# As in `metrics`: a probability of 0 for the true class counts as this.
_SMALLEST = float(np.finfo(np.float64).eps)


class _Errors:
    """One set of probabilities, prepared for resamples; arguments as in `compare_errors`."""

    def __init__(self, truth: NDArray[np.int64], scores: Floats, groups: NDArray[np.int64], size: int) -> None:
        confidence = scores.max(axis=1)
        surplus = (scores.argmax(axis=1) == truth) - confidence
        each = np.stack(
            [np.square(scores - np.eye(scores.shape[1])[truth]).sum(axis=1), log_losses(truth, scores)], axis=1
        )
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
        binned = np.bincount(cells.ravel(), (weights * self.surplus).ravel(), len(times) * DEFAULT_BINS).reshape(
            -1, DEFAULT_BINS
        )
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
        For each name, and for `difference` (second - first): `ERRORS`, each followed by its interval; for each name
        also
        `ece_by_chance` and `adaptive_ece_by_chance`: mean and upper end (95% lie below) if the probabilities were true,
        absent
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


LEVEL = 0.95


# A conformal threshold can't promise all; this is the most that it is asked for.
ALMOST_ALL = 1 - 1e-6


AT_BOUND = f"the temperature stands at the end of its range, {LOWEST:g} to {HIGHEST:g}: the probabilities say little"


@dataclass(frozen=True, kw_only=True)
class Calibration(Decision):
    """What was fitted on the validation side: a `Decision`, and how it came about.

    Attributes:
        images: number of validation images.
        groups: number of their patients.
        per_class: class -> number of validation images.
        temperature_interval: 95%, over validation patients; None without resamples.
        sensitivity: share of cancers that shall be referred.
        referral_interval: 95%, over validation patients; None without resamples or without a threshold.
        remarks: what is weak about the fit, in sentences.
    """

    images: int
    groups: int
    per_class: dict[str, int]
    temperature_interval: tuple[float, float] | None
    sensitivity: float
    referral_interval: tuple[float, float] | None
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the content of `calibration.json`."""
        referral = None
        if self.referral is not None:
            referral = {
                "sensitivity": self.sensitivity,
                **beside("threshold", self.referral, self.referral_interval, LEVEL),
            }
        return {
            "classes": list(self.classes),
            "malignant": list(self.malignant),
            "fitted_on": {"split": "val", "images": self.images, "groups": self.groups, "per_class": self.per_class},
            **beside("temperature", self.temperature, self.temperature_interval, LEVEL),
            "conformal": {
                "coverage": self.coverage,
                "threshold": self.threshold,
                "class_thresholds": self.class_thresholds,
            },
            "referral_sensitivity": self.sensitivity,
            "referral": referral,
            "remarks": list(self.remarks),
            "availability": [thresholds.to_json() for thresholds in self.availability],
            "field_effects": self.field_effects,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        """Return the calibration that `to_json` described.

        Raises:
            ValueError: a key is missing, or a value has the wrong type.
        """
        decision = cls.parse(values)
        try:
            fitted, referral = values["fitted_on"], values["referral"]
            bounds, referral_bounds = values.get("temperature_ci95"), referral and referral.get("threshold_ci95")
            return cls(
                **decision,
                images=int(fitted["images"]),
                groups=int(fitted["groups"]),
                per_class={str(name): int(count) for name, count in fitted["per_class"].items()},
                temperature_interval=(float(bounds[0]), float(bounds[1])) if bounds else None,
                sensitivity=float(values["referral_sensitivity"]),
                referral_interval=(float(referral_bounds[0]), float(referral_bounds[1])) if referral_bounds else None,
                remarks=tuple(values["remarks"]),
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"this isn't a calibration: {error!r}") from None


def fit_calibration(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    classes: Sequence[str],
    malignant: Sequence[str],
    coverage: float = 0.9,
    sensitivity: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    availability: Sequence[Thresholds] = (),
    field_effects: Mapping[str, float] | None = None,
) -> Calibration:
    """Fit temperature, conformal thresholds and the threshold of referral on validation images.

    Args:
        labels: (N,), indices into `classes`.
        probabilities: (N, C), rows sum to 1.
        groups: (N,), the patient of every image.
        classes: names in the order of the columns.
        malignant: the classes that are cancer; empty: no referral.
        coverage: how often a set shall hold the right class.
        sensitivity: share of cancers that shall be referred.
        samples: bootstrap samples for the two intervals; 0: none.
        seed: of the draw.
        availability: from `fit_thresholds`, for each group of inputs.
        field_effects: see `Decision`.

    Raises:
        ValueError: see `check_predictions`, `check_classes`, `group_codes`, `conformal_threshold` and
            `referral_threshold`.
    """
    classes, malignant = list(classes), list(malignant)
    check_classes(classes, malignant)
    truth, scores = check_predictions(labels, probabilities, len(classes))
    codes, cancer = group_codes(groups), np.isin(classes, malignant)
    temperature = fit_temperature(truth, scores)
    warmed = apply_temperature(scores, temperature)
    score = malignancy(warmed, cancer)
    by_class = class_thresholds(truth, warmed, coverage)
    per_class = np.bincount(truth, minlength=len(classes)).tolist()
    bounds = temperature_interval(truth, scores, codes, samples, seed, LEVEL) if samples else None
    referral_bounds = (
        threshold_interval(cancer[truth], score, sensitivity, codes, samples, seed, LEVEL) if samples else None
    )
    return Calibration(
        classes=tuple(classes),
        malignant=tuple(malignant),
        temperature=temperature,
        coverage=coverage,
        threshold=conformal_threshold(warmed[np.arange(len(truth)), truth], coverage),
        class_thresholds=dict(zip(classes, by_class, strict=True)),
        referral=referral_threshold(cancer[truth], score, sensitivity),
        availability=tuple(availability),
        field_effects=dict(field_effects or {}),
        images=len(truth),
        groups=int(codes.max()) + 1,
        per_class=dict(zip(classes, per_class, strict=True)),
        temperature_interval=bounds,
        sensitivity=sensitivity,
        referral_interval=referral_bounds,
        remarks=tuple(_remarks(truth, scores, temperature, classes, per_class, coverage, malignant)),
    )


def fit_thresholds(
    group: Availability,
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    malignant: Sequence[str],
    coverage: float,
    sensitivity: float,
    draws: int = 1,
) -> Thresholds:
    """Fit what holds for the inputs of one group of availability on such inputs of validation images.

    The threshold of referral is conformal too: the largest one that refers a new cancer with the wanted probability, if
    it is
    exchangeable with those of validation; 0 (refer everybody) if these are too few for that.

    Args:
        group: what is given in all of these inputs.
        labels: (N * draws,), indices into `classes`.
        probabilities: (N * draws, C), rows sum to 1.
        classes: names in the order of the columns.
        malignant: the classes that are cancer; empty: no referral.
        coverage: how often a set shall hold the right class.
        sensitivity: share of cancers that shall be referred.
        draws: inputs of each image.

    Raises:
        ValueError: see `check_predictions` and `check_classes`.
    """
    classes, malignant = list(classes), list(malignant)
    check_classes(classes, malignant)
    truth, scores = check_predictions(labels, probabilities, len(classes))
    cancer = np.isin(classes, malignant)
    temperature = fit_temperature(truth, scores)
    calibrated = apply_temperature(scores, temperature)
    by_class = class_thresholds(truth, calibrated, coverage, draws)
    ill = cancer[truth]
    referral = (
        conformal_threshold(malignancy(calibrated, cancer)[ill], min(sensitivity, ALMOST_ALL), draws)
        if malignant
        else None
    )
    remarks = [AT_BOUND] if at_bound(temperature) else []
    return Thresholds(
        group,
        temperature,
        conformal_threshold(calibrated[np.arange(len(truth)), truth], coverage, draws),
        dict(zip(classes, by_class, strict=True)),
        referral,
        len(truth) // draws,
        int(ill.sum()) // draws,
        tuple(remarks),
    )


def measure_calibrated(
    calibration: Calibration,
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a calibration on images that had no part in it. Intervals are 95%, over patients, given the calibration.

    Args:
        calibration: from `fit_calibration`.
        labels: (N,), indices into its classes.
        probabilities: (N, C), as the model gave them.
        groups: (N,), the patient of every image.
        samples: bootstrap samples; 0: no intervals.
        seed: of the draw.

    Returns:
        `temperature`; `before`, `after` and `difference` (after - before) with the keys of `calibration_errors.ERRORS`;
        `conformal`
        (`promised`, and `marginal` and `by_class` as `measure_sets` returns them); `referral` (`wanted`, `threshold`,
        and the keys
        of `measure_referral`) or None; `selective` (see `Selective.to_json`); `remarks`. Ready for strict JSON.

    Raises:
        ValueError: see `check_predictions` and `group_codes`.
    """
    classes = calibration.classes
    truth, scores = check_predictions(labels, probabilities, len(classes))
    codes, warmed = group_codes(groups), calibration.probabilities(scores)
    errors = compare_errors(truth, {"before": scores, "after": warmed}, codes, samples, seed, LEVEL)
    sets = {
        name: measure_sets(
            truth, warmed, calibration.thresholds(by_class), codes, classes, calibration.coverage, samples, seed, LEVEL
        )
        for name, by_class in (("marginal", False), ("by_class", True))
    }
    referred, referral = calibration.refer(scores), None
    if referred is not None:
        referral = {"wanted": calibration.sensitivity, "threshold": calibration.referral}
        referral |= measure_referral(
            calibration.cancer[truth], referred, codes, calibration.sensitivity, samples, seed, LEVEL
        )
    selective = measure_selective(truth, warmed, codes, classes, TABLE, samples, seed, LEVEL)
    return {
        "temperature": calibration.temperature,
        **errors,
        "conformal": {"promised": calibration.coverage, **sets},
        "referral": referral,
        "selective": selective.to_json(),
        "remarks": list(calibration.remarks),
    }


def _remarks(
    truth: NDArray[np.int64],
    scores: Floats,
    temperature: float,
    classes: list[str],
    per_class: list[int],
    coverage: float,
    malignant: list[str],
) -> list[str]:
    remarks = []
    if all_right(truth, scores):
        remarks.append("every validation image is right, so no temperature can be found; it stays 1")
    elif at_bound(temperature):
        remarks.append(AT_BOUND)
    few = [
        f"{name} ({count})" for name, count in zip(classes, per_class, strict=True) if not can_promise(count, coverage)
    ]
    if few:
        remarks.append(
            f"too few validation images for a promise of {coverage:.0%} within the class, so in every set that is made by class: "
            f"{', '.join(few)}"
        )
    if not malignant:
        remarks.append("the data set names no malignant class, so there is no referral")
    elif not np.isin(classes, malignant)[truth].any():
        remarks.append("no validation image is malignant, so there is no threshold of referral")
    return remarks
