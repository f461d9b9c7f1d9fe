"""What is made of a model's probabilities: calibrated ones, conformal sets and referral.

Everything was fitted on the validation split, in `dualrefnet.evaluation.calibration`, for each group of inputs by what
is given (`dualrefnet.runtime.availability`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .availability import Availability, Thresholds

Floats = NDArray[np.float64]

# What is smaller can't be told from 0 in single precision; 0 itself has no logarithm.
FLOOR = float(np.finfo(np.float32).smallest_subnormal)


class Decisions(NamedTuple):
    """Decisions about N inputs."""

    probabilities: Floats  # (N, C), at the temperature of each input's group
    sets: NDArray[np.bool_]  # (N, C), which classes are in the conformal set; never none
    refer: NDArray[np.bool_] | None  # (N,), whether to refer to a dermatologist; None if no class is malignant
    thresholds: list[Thresholds]  # of each input's group


@dataclass(frozen=True)
class Decision:
    """Temperature and thresholds of a run.

    `temperature`, `threshold`, `class_thresholds` and `referral` (see `Thresholds`) are of the validation split as it
    was recorded: they describe the model. A prediction uses the thresholds of its group of `availability` (`decide`).
    `coverage`: how often a set is to hold the right class. `field_effects`: field -> mean change of the probability
    over validation when the field is left out; empty if that wasn't measured.
    """

    classes: tuple[str, ...]
    malignant: tuple[str, ...]
    temperature: float
    coverage: float
    threshold: float
    class_thresholds: dict[str, float]
    referral: float | None
    availability: tuple[Thresholds, ...]
    field_effects: dict[str, float]

    @cached_property
    def cancer(self) -> NDArray[np.bool_]:
        """Which columns are malignant, (C,)."""
        return np.isin(self.classes, self.malignant)

    def probabilities(self, probabilities: ArrayLike) -> Floats:
        return apply_temperature(probabilities, self.temperature)

    def decide(self, probabilities: ArrayLike, image: ArrayLike, share: ArrayLike) -> Decisions:
        """Decide about N inputs (N, C) by the thresholds of their groups; without any: all classes, referred."""
        scores = np.asarray(probabilities, dtype=np.float64)
        fitted = [*self.availability, self._unfitted]
        group = np.full(len(scores), len(self.availability))
        for number, thresholds in enumerate(self.availability):
            group[thresholds.group.contains(image, share)] = number
        calibrated, sets = np.empty_like(scores), np.empty(scores.shape, dtype=bool)
        refer = np.ones(len(scores), dtype=bool)
        for number in np.unique(group):
            rows, thresholds = group == number, fitted[number]
            calibrated[rows] = apply_temperature(scores[rows], thresholds.temperature)
            sets[rows] = prediction_sets(calibrated[rows], thresholds.threshold)
            refer[rows] = malignancy(calibrated[rows], self.cancer) >= (thresholds.referral or 0)
        return Decisions(calibrated, sets, refer if self.cancer.any() else None, [fitted[number] for number in group])

    @cached_property
    def _unfitted(self) -> Thresholds:
        nothing, referral = Availability(False, 0, 0), 0.0 if self.cancer.any() else None
        return Thresholds(nothing, self.temperature, 0.0, dict.fromkeys(self.classes, 0.0), referral)

    def thresholds(self, by_class: bool) -> float | list[float]:
        """Return the one threshold, or those of the classes in their order."""
        return [self.class_thresholds[name] for name in self.classes] if by_class else self.threshold

    def refer(self, probabilities: ArrayLike) -> NDArray[np.bool_] | None:
        """Return which images are referred, (N,), of the model's probabilities (N, C); None without a threshold."""
        if self.referral is None:
            return None
        return np.asarray(malignancy(self.probabilities(probabilities), self.cancer) >= self.referral)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes of a decision in a `calibration.json`; ValueError if one is missing or invalid."""
        try:
            conformal, referral = values["conformal"], values["referral"]
            return {
                "classes": tuple(values["classes"]),
                "malignant": tuple(values["malignant"]),
                "temperature": float(values["temperature"]),
                "coverage": float(conformal["coverage"]),
                "threshold": float(conformal["threshold"]),
                "class_thresholds": {name: float(conformal["class_thresholds"][name]) for name in values["classes"]},
                "referral": float(referral["threshold"]) if referral else None,
                # A calibration of an earlier version has none, so every input counts as one without a fitted group.
                "availability": tuple(Thresholds.from_json(one) for one in values.get("availability", ())),
                "field_effects": {str(name): float(effect) for name, effect in values.get("field_effects", {}).items()},
            }
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"this isn't a calibration: {error!r}") from None


def softmax(logits: ArrayLike) -> Floats:
    scores = np.asarray(logits, dtype=np.float64)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def to_logits(probabilities: ArrayLike) -> Floats:
    """Return logits (N, C) whose largest in each row is 0; 0 counts as the smallest number of single precision."""
    logits = np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), FLOOR))
    return np.asarray(logits - logits.max(axis=1, keepdims=True))


def apply_temperature(probabilities: ArrayLike, temperature: float) -> Floats:
    """Return probabilities (N, C) at a temperature above 0 (else ValueError); each row sums to 1 (Guo et al. 2017).

    0 counts as the smallest number of single precision.

    >>> apply_temperature([[0.8, 0.2]], 2).round(4).tolist()  # .8^½ : .2^½ = 2 : 1
    [[0.6667, 0.3333]]
    """
    if not temperature > 0:
        raise ValueError(f"a temperature must be above 0, not {temperature}")
    return softmax(to_logits(probabilities) / temperature)


def prediction_sets(probabilities: ArrayLike, thresholds: float | Sequence[float]) -> NDArray[np.bool_]:
    """Return which classes reach the one threshold, or theirs, (N, C); in an empty set the likeliest."""
    scores = np.asarray(probabilities, dtype=np.float64)
    sets = scores >= np.asarray(thresholds)
    empty = np.flatnonzero(~sets.any(axis=1))
    sets[empty, scores[empty].argmax(axis=1)] = True
    return np.asarray(sets)


def malignancy(probabilities: Floats, cancer: NDArray[np.bool_]) -> Floats:
    """Return the malignancy score of every image, (N,); `cancer`: (C,), which classes are malignant."""
    return np.asarray(probabilities[:, cancer].sum(axis=1))
