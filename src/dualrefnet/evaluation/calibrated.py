"""What a run's validation side teaches about its probabilities, and what that is worth on the test side.

Three things are fitted, all on the validation side and all kept in `calibration.json`: the temperature; the thresholds of the
conformal sets; the threshold of referral. `predictions.csv` stays as the model gave it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualrefnet.evaluation.calibration_errors import compare_errors
from dualrefnet.evaluation.conformal import can_promise, class_thresholds, conformal_threshold, measure_sets
from dualrefnet.evaluation.inputs import check_classes, check_predictions
from dualrefnet.evaluation.intervals import group_codes
from dualrefnet.evaluation.ratios import beside
from dualrefnet.evaluation.referral import measure_referral, referral_threshold, threshold_interval
from dualrefnet.evaluation.selective import TABLE, measure_selective
from dualrefnet.evaluation.temperature import HIGHEST, LOWEST, all_right, at_bound, fit_temperature, temperature_interval
from dualrefnet.runtime.availability import Availability, Thresholds
from dualrefnet.runtime.probabilities import Decision, apply_temperature, malignancy

Floats = NDArray[np.float64]

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
            referral = {"sensitivity": self.sensitivity, **beside("threshold", self.referral, self.referral_interval, LEVEL)}
        return {
            "classes": list(self.classes),
            "malignant": list(self.malignant),
            "fitted_on": {"split": "val", "images": self.images, "groups": self.groups, "per_class": self.per_class},
            **beside("temperature", self.temperature, self.temperature_interval, LEVEL),
            "conformal": {"coverage": self.coverage, "threshold": self.threshold, "class_thresholds": self.class_thresholds},
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
        decision = cls.read(values)
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
        ValueError: see `check_predictions`, `check_classes`, `group_codes`, `conformal_threshold` and `referral_threshold`.
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
    referral_bounds = threshold_interval(cancer[truth], score, sensitivity, codes, samples, seed, LEVEL) if samples else None
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

    The threshold of referral is conformal too: the largest one that refers a new cancer with the wanted probability, if it is
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
    referral = conformal_threshold(malignancy(calibrated, cancer)[ill], min(sensitivity, ALMOST_ALL), draws) if malignant else None
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
        `temperature`; `before`, `after` and `difference` (after - before) with the keys of `calibration_errors.ERRORS`; `conformal`
        (`promised`, and `marginal` and `by_class` as `measure_sets` returns them); `referral` (`wanted`, `threshold`, and the keys
        of `measure_referral`) or None; `selective` (see `Selective.to_json`); `remarks`. Ready for strict JSON.

    Raises:
        ValueError: see `check_predictions` and `group_codes`.
    """
    classes = calibration.classes
    truth, scores = check_predictions(labels, probabilities, len(classes))
    codes, warmed = group_codes(groups), calibration.probabilities(scores)
    errors = compare_errors(truth, {"before": scores, "after": warmed}, codes, samples, seed, LEVEL)
    sets = {
        name: measure_sets(truth, warmed, calibration.thresholds(by_class), codes, classes, calibration.coverage, samples, seed, LEVEL)
        for name, by_class in (("marginal", False), ("by_class", True))
    }
    referred, referral = calibration.refer(scores), None
    if referred is not None:
        referral = {"wanted": calibration.sensitivity, "threshold": calibration.referral}
        referral |= measure_referral(calibration.cancer[truth], referred, codes, calibration.sensitivity, samples, seed, LEVEL)
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
    few = [f"{name} ({count})" for name, count in zip(classes, per_class, strict=True) if not can_promise(count, coverage)]
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
