"""Calibration on the validation split: temperature, conformal sets and referral, and what they give on the test split.

Temperature (Guo et al. 2017): every probability is raised to the power 1/T and the row is scaled to sum 1; T above 1
lowers the confidence. The most probable class stays. The logarithm of a probability is the logit up to a constant of
the row, which cancels out, so the probabilities are all that is needed.

Conformal sets (Angelopoulos and Bates 2023): as few classes as are needed for the right one to be among them with the
wanted probability, for images that are exchangeable with those of validation.

Referral: an image is referred if its malignancy score, the sum of the probabilities of the malignant classes, reaches a
threshold: the largest one with the wanted sensitivity on validation. On other patients the sensitivity comes out above
or below that, about as often the one as the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.bootstrap import NAN, Bootstrap, Estimate, Floats, percentile_interval
from dualrefnet.evaluation.metrics import CalibrationErrors, check_classes, check_predictions
from dualrefnet.evaluation.referral import TABLE, measure_selective
from dualrefnet.runtime.availability import Availability, Thresholds
from dualrefnet.runtime.calibration import Decision, apply_temperature, malignancy, prediction_sets, softmax, to_logits

LEVEL = 0.95
ERRORS = ("ece", "adaptive_ece", "brier", "log_loss")

# Beyond these a temperature says that validation is too small or the model useless, not how confident it may be.
LOWEST, HIGHEST = 0.05, 20.0
AT_BOUND = f"the temperature stands at the end of its range, {LOWEST:g} to {HIGHEST:g}: the probabilities say little"

# Bisections of the range of log T: the last is far below the precision of a float.
STEPS = 60

# Temperatures between which the intervals interpolate.
_GRID = np.exp(np.linspace(np.log(LOWEST), np.log(HIGHEST), 241))

# A conformal threshold can't guarantee all; this is the highest coverage that is requested.
ALMOST_ALL = 1 - 1e-6


def fit_temperature(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return the temperature, in `LOWEST`..`HIGHEST`, at which the log loss of probabilities (N, C) is smallest.

    The log loss is convex in 1/T: bisection finds where its slope changes sign. If every image is right, it falls for
    ever with T; there are too few images then, and T is 1.
    """
    target, scores = check_predictions(labels, probabilities)
    if not _wrong(target, scores).any():
        return 1.0
    logits = to_logits(scores)
    low, high = np.log([LOWEST, HIGHEST])
    for _ in range(STEPS):
        middle = (low + high) / 2
        # A positive slope over 1/T: the smallest log loss lies at a smaller 1/T, a higher T.
        low, high = (middle, high) if _slopes(target, logits, float(np.exp(middle))).mean() > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def at_bound(temperature: float) -> bool:
    """Return whether a temperature stands at an end of its range: the probabilities then say little."""
    return not LOWEST * 1.001 < temperature < HIGHEST / 1.001


def temperature_interval(
    labels: ArrayLike, probabilities: ArrayLike, bootstrap: Bootstrap
) -> tuple[float, float] | None:
    """Return the percentile interval of the temperature over resampled patients; None if all were skipped.

    A resample in which every image is right is skipped. Between the temperatures of a fine grid the slope is
    interpolated.
    """
    target, scores = check_predictions(labels, probabilities)
    logits, positions = to_logits(scores), np.log(_GRID)
    slopes = bootstrap.sums(np.stack([_slopes(target, logits, temperature) for temperature in _GRID], axis=1))
    wrong = bootstrap.sums(_wrong(target, scores)[:, None])[:, 0]

    def fit(weights: Floats) -> Floats:
        falling = weights @ slopes
        # The first slope that isn't positive; none: the highest temperature.
        after = np.where((falling > 0).all(axis=1), len(_GRID) - 1, (falling <= 0).argmax(axis=1))
        before, rows = np.maximum(after - 1, 0), np.arange(len(weights))
        above, below = falling[rows, before], falling[rows, after]
        crossing = (above > 0) & (below <= 0)
        fraction = np.divide(above, above - below, out=np.ones(len(rows)), where=crossing)
        fitted = np.exp(positions[before] + fraction * (positions[after] - positions[before]))
        return np.where(weights @ wrong > 0, fitted, NAN)

    return percentile_interval(bootstrap.resample(fit), bootstrap.level)


def conformal_threshold(true_probabilities: ArrayLike, coverage: float, draws: int = 1) -> float:
    """Return the probability that a class must reach to be in a set; 0 (all classes) if there are too few images.

    `true_probabilities`, (n * draws,), are those of each calibration image's true class; several `draws` of an image's
    inputs count as one image.

    >>> conformal_threshold([0.9, 0.5, 0.8, 0.6], 0.6)  # ceil(5 x .6) = 3rd largest
    0.6
    >>> conformal_threshold([0.9, 0.5, 0.8, 0.6], 0.9)  # ceil(5 x .9) = 5, and there are four
    0.0
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must lie between 0 and 1, not {coverage}")
    values = np.sort(np.asarray(true_probabilities, dtype=np.float64))[::-1]
    images = len(values) // draws
    return float(values[_rank(images, coverage) * draws - 1]) if can_guarantee(images, coverage) else 0.0


def can_guarantee(images: int, coverage: float) -> bool:
    """Return whether so many calibration images are enough for a coverage: 9 for 90%, 19 for 95%."""
    return _rank(images, coverage) <= images


def class_thresholds(
    labels: NDArray[np.int64], probabilities: Floats, coverage: float, draws: int = 1
) -> tuple[float, ...]:
    """Return the threshold of each class from its own images; 0 (in every set) for a class with too few of them."""
    count = probabilities.shape[1]
    return tuple(conformal_threshold(probabilities[labels == index, index], coverage, draws) for index in range(count))


def referral_threshold(malignant: NDArray[np.bool_], score: Floats, sensitivity: float) -> float | None:
    """Return the largest threshold with at least the wanted sensitivity; None if no image is malignant.

    >>> referral_threshold(np.array([True, True, True, True, False]), np.array([0.9, 0.2, 0.7, 0.4, 0.8]), 0.75)
    0.4
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"the wanted sensitivity must be above 0 and at most 1, not {sensitivity}")
    descending = np.sort(score[malignant])[::-1]
    return float(descending[math.ceil(len(descending) * sensitivity - 1e-9) - 1]) if len(descending) else None


def threshold_interval(
    malignant: NDArray[np.bool_], score: Floats, sensitivity: float, bootstrap: Bootstrap
) -> tuple[float, float] | None:
    """Return the percentile interval of `referral_threshold` over patients; None if no image is malignant."""
    places = np.flatnonzero(malignant)
    places = places[np.argsort(-score[places], kind="stable")]
    if not len(places):
        return None

    def fit(weights: Floats) -> Floats:
        passed = weights[:, bootstrap.codes[places]].cumsum(axis=1)
        reached = passed >= passed[:, -1:] * sensitivity - 1e-9
        return np.where(passed[:, -1] > 0, score[places][reached.argmax(axis=1)], NAN)

    return percentile_interval(bootstrap.resample(fit), bootstrap.level)


@dataclass(frozen=True, kw_only=True)
class Calibration(Decision):
    """What was fitted on validation: a `Decision`, and how it came about."""

    images: int
    groups: int
    per_class: dict[str, int]  # number of validation images
    temperature_interval: tuple[float, float] | None  # 95%, over validation patients; None without resamples
    sensitivity: float  # share of cancers that shall be referred
    referral_interval: tuple[float, float] | None
    remarks: tuple[str, ...] = ()  # weaknesses of the fit

    def to_json(self) -> dict[str, Any]:
        referral = None
        if self.referral is not None:
            threshold = Estimate(self.referral, *(self.referral_interval or ()))
            referral = {"sensitivity": self.sensitivity, **threshold.to_json("threshold", LEVEL)}
        return {
            "classes": list(self.classes),
            "malignant": list(self.malignant),
            "fitted_on": {"split": "val", "images": self.images, "groups": self.groups, "per_class": self.per_class},
            **Estimate(self.temperature, *(self.temperature_interval or ())).to_json("temperature", LEVEL),
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
        """Return the calibration that `to_json` described; ValueError if it is none."""
        decision = cls.parse(values)
        try:
            fitted, referral = values["fitted_on"], values["referral"] or {}
            bounds, referral_bounds = values.get("temperature_ci95"), referral.get("threshold_ci95")
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


# Which images, (N,), a calibration is for: those of one fold, of which it has seen none.
CalibrationByFold = Sequence[tuple[NDArray[np.bool_], Calibration]]


def fit_calibration(
    labels: ArrayLike,
    probabilities: ArrayLike,
    bootstrap: Bootstrap,
    classes: Sequence[str],
    malignant: Sequence[str],
    coverage: float = 0.9,
    sensitivity: float = 0.95,
    availability: Sequence[Thresholds] = (),
    field_effects: Mapping[str, float] | None = None,
) -> Calibration:
    """Fit temperature, conformal thresholds and the referral threshold on validation images."""
    check_classes(classes, malignant)
    target, scores = check_predictions(labels, probabilities, len(classes))
    cancer = np.isin(classes, malignant)
    temperature = fit_temperature(target, scores)
    calibrated = apply_temperature(scores, temperature)
    score = malignancy(calibrated, cancer)
    per_class = dict(zip(classes, np.bincount(target, minlength=len(classes)).tolist(), strict=True))
    remarks = [AT_BOUND] if at_bound(temperature) else []
    if not _wrong(target, scores).any():
        remarks.append("every validation image is right, so no temperature can be fitted; it stays 1")
    few = [f"{name} ({count})" for name, count in per_class.items() if not can_guarantee(count, coverage)]
    if few:
        remarks.append(
            f"too few validation images to guarantee {coverage:.0%} within the class, so in every set that is made by "
            f"class: {', '.join(few)}"
        )
    if not malignant:
        remarks.append("the data set names no malignant class, so there is no referral")
    elif not cancer[target].any():
        remarks.append("no validation image is malignant, so there is no referral threshold")
    return Calibration(
        classes=tuple(classes),
        malignant=tuple(malignant),
        temperature=temperature,
        coverage=coverage,
        threshold=conformal_threshold(calibrated[np.arange(len(target)), target], coverage),
        class_thresholds=dict(zip(classes, class_thresholds(target, calibrated, coverage), strict=True)),
        referral=referral_threshold(cancer[target], score, sensitivity),
        availability=tuple(availability),
        field_effects=dict(field_effects or {}),
        images=len(target),
        groups=bootstrap.groups,
        per_class=per_class,
        temperature_interval=temperature_interval(target, scores, bootstrap),
        sensitivity=sensitivity,
        referral_interval=threshold_interval(cancer[target], score, sensitivity, bootstrap),
        remarks=tuple(remarks),
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
    """Fit the thresholds of one availability group on `draws` such inputs of each validation image.

    The referral threshold is conformal too; 0 (refer everybody) if there are too few cancers for that.
    """
    check_classes(classes, malignant)
    target, scores = check_predictions(labels, probabilities, len(classes))
    cancer = np.isin(classes, malignant)
    temperature, positive = fit_temperature(target, scores), cancer[target]
    calibrated, referral = apply_temperature(scores, temperature), None
    if malignant:
        score = malignancy(calibrated, cancer)[positive]
        referral = conformal_threshold(score, min(sensitivity, ALMOST_ALL), draws)
    return Thresholds(
        group,
        temperature,
        conformal_threshold(calibrated[np.arange(len(target)), target], coverage, draws),
        dict(zip(classes, class_thresholds(target, calibrated, coverage, draws), strict=True)),
        referral,
        len(target) // draws,
        int(positive.sum()) // draws,
        (AT_BOUND,) if at_bound(temperature) else (),
    )


def measure_calibrated(
    calibration: Calibration,
    labels: ArrayLike,
    probabilities: ArrayLike,
    bootstrap: Bootstrap,
    by_fold: CalibrationByFold = (),
) -> dict[str, Any]:
    """Measure a calibration on images that had no part in it; intervals are over patients, given the calibration.

    The calibration of a cross-fitted run has seen all images; they are measured with those `by_fold`.
    """
    classes = calibration.classes
    target, scores = check_predictions(labels, probabilities, len(classes))
    by_fold = by_fold or [(np.ones(len(target), dtype=bool), calibration)]
    calibrated, refer = np.empty_like(scores), np.zeros(len(target), dtype=bool)
    held = {name: np.zeros(scores.shape, dtype=bool) for name in ("marginal", "by_class")}
    filled = dict.fromkeys(held, 0)
    for rows, one in by_fold:
        calibrated[rows] = one.probabilities(scores[rows])
        for name in held:
            thresholds = one.thresholds(name == "by_class")
            held[name][rows] = prediction_sets(calibrated[rows], thresholds)
            filled[name] += int((calibrated[rows] < np.asarray(thresholds)).all(axis=1).sum())
        decided = one.refer(scores[rows])
        refer[rows] = False if decided is None else decided
    sets = {
        name: measure_sets(target, held[name], filled[name], bootstrap, classes, calibration.coverage) for name in held
    }
    referred, referral = None if calibration.referral is None else refer, None
    if referred is not None:
        referral = {"wanted": calibration.sensitivity, "threshold": calibration.referral}
        referral |= measure_referral(calibration.cancer[target], referred, bootstrap, calibration.sensitivity)
    selective = measure_selective(target, calibrated, bootstrap, classes, TABLE)
    return {
        "temperature": calibration.temperature,
        **compare_errors(target, scores, calibrated, bootstrap),
        "conformal": {"promised": calibration.coverage, **sets},
        "referral": referral,
        "selective": selective.to_json(),
        "remarks": list(calibration.remarks),
    }


def measure_sets(
    labels: NDArray[np.int64],
    sets: NDArray[np.bool_],
    filled: int,
    bootstrap: Bootstrap,
    classes: Sequence[str],
    coverage: float,
) -> dict[str, Any]:
    """Measure conformal sets (N, C) of images with no part in the thresholds; `filled`: they would have been empty."""
    level = bootstrap.level
    size, held = sets.sum(axis=1), sets[np.arange(len(labels)), labels]
    # All images, and those of each class.
    included = np.column_stack([np.ones(len(labels), dtype=bool), labels[:, None] == np.arange(len(classes))])
    held_by, sizes = (
        bootstrap.ratios(np.broadcast_to(values[:, None], included.shape), included, proportions)
        for values, proportions in ((held, True), (size, False))
    )
    (singletons,) = bootstrap.ratios(size[:, None] == 1, included[:, :1])
    marginal, promise = held_by[0], None
    if not np.isnan(marginal.low):
        promise = "missed" if marginal.high < coverage else "exceeded" if marginal.low > coverage else "within"
    return {
        **marginal.to_json("coverage", level),
        **sizes[0].to_json("mean_size", level),
        **singletons.to_json("singletons", level),
        "filled": filled,
        "promise": promise,
        "sizes": np.bincount(size, minlength=len(classes) + 1)[1:].tolist(),
        "per_class": {
            name: one.to_json("coverage", level) | its_size.to_json("mean_size", level) | {"images": images}
            for name, one, its_size, images in zip(
                classes, held_by[1:], sizes[1:], included[:, 1:].sum(axis=0).tolist(), strict=True
            )
        },
    }


def measure_referral(
    malignant: NDArray[np.bool_], referred: NDArray[np.bool_], bootstrap: Bootstrap, target: float
) -> dict[str, Any]:
    """Measure referral, (N,), on images that had no part in the choice of the threshold."""
    amounts = np.stack([referred, ~referred, referred], axis=1)
    included = np.stack([malignant, ~malignant, np.ones(len(malignant), dtype=bool)], axis=1)
    estimates = bootstrap.ratios(amounts, included)
    result: dict[str, Any] = {}
    for name, estimate in zip(("sensitivity", "specificity", "referred"), estimates, strict=True):
        result |= estimate.to_json(name, bootstrap.level)
    return result | {
        "malignant": int(malignant.sum()),
        "benign": int((~malignant).sum()),
        "missed": int((malignant & ~referred).sum()),
        "spared": int((~malignant & ~referred).sum()),
        "reached": bool(estimates[0].value >= target - 1e-9) if malignant.any() else None,
    }


def compare_errors(
    labels: NDArray[np.int64], before: Floats, after: Floats, bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """Measure the calibration of probabilities (N, C) `before` and `after` a change, and its `difference`."""
    errors = {
        name: CalibrationErrors(labels, scores, bootstrap.codes, bootstrap.groups)
        for name, scores in (("before", before), ("after", after))
    }
    point = {name: one.measure(bootstrap.unit_weights) for name, one in errors.items()}
    resampled = bootstrap.resample_each({name: one.measure for name, one in errors.items()})
    for sides in (point, resampled):
        sides["difference"] = {key: sides["after"][key] - sides["before"][key] for key in ERRORS}
    result: dict[str, dict[str, Any]] = {name: {} for name in point}
    for name, values in point.items():
        for key in ERRORS:
            estimate = bootstrap.estimate(float(values[key][0]), resampled[name][key])
            result[name] |= estimate.to_json(key, bootstrap.level)
    for name, one in errors.items():
        if bootstrap.samples:
            result[name] |= one.by_chance(bootstrap.samples, bootstrap.seed)
    return result


def _wrong(target: NDArray[np.int64], scores: Floats) -> NDArray[np.bool_]:
    """Return which images have a class more probable than the true one; without any, no temperature can be fitted."""
    return np.asarray(scores[np.arange(len(target)), target] < scores.max(axis=1))


def _slopes(target: NDArray[np.int64], logits: Floats, temperature: float) -> Floats:
    """Return each image's slope of the log loss over 1/T: the expected logit less the target's."""
    return np.asarray((softmax(logits / temperature) * logits).sum(axis=1) - logits[np.arange(len(target)), target])


def _rank(images: int, coverage: float) -> int:
    # 10 x .9 must not become 9.000000000000002.
    return math.ceil((images + 1) * coverage - 1e-9)
