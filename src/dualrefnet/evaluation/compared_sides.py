"""One part of a test side against another: which measures have enough patients, and how far they are apart.

Measures of classes run over the classes that both sides have from enough patients. Where a share is none or all, all resamples agree,
which would feign certainty: there the interval is Wilson's, each patient counting as one case, and the gap's interval is made of
those of both sides (Newcombe 1998); other measures have no interval there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dualrefnet.data.schema import DatasetSchema
from dualrefnet.evaluation.inputs import check_predictions
from dualrefnet.evaluation.intervals import percentile_interval, wilson_interval
from dualrefnet.evaluation.resampling import Resampler

Floats = NDArray[np.float64]
Bounds = tuple[float, float]
NAN = float("nan")

NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "auc_macro_ovr": "AUC, mean of classes",
    "malignant.sensitivity": "sensitivity for cancer",
    "malignant.specificity": "specificity for cancer",
    "malignant.auc": "AUC of cancer or not",
    "overconfidence": "overconfidence",
    "ece": "expected calibration error",
}
# The error grows as images get fewer: resamples lie above it, and a small level's gap would always look bad.
WITHOUT_INTERVAL = ("ece",)
# Averages over classes, and the value of each class of which they are made.
_AVERAGES = {"balanced_accuracy": "sensitivity", "auc_macro_ovr": "auc"}
# Shares of images: how many of which.
_SHARES = ("accuracy", "malignant.sensitivity", "malignant.specificity")
# A level with fewer has no numbers; and fewer patients of a class on one side: it isn't compared.
MINIMUM_IMAGES, MINIMUM_PATIENTS, MINIMUM_OF_CLASS = 20, 10, 5


class Part(Resampler):
    """Images whose overconfidence is measured, too."""

    def measure(self, times: Floats) -> dict[str, Floats]:
        """Return the measures of `Resampler`, and `overconfidence`: mean confidence less accuracy."""
        values = super().measure(times)
        total = times.T @ self.cells.sum(axis=1)
        surplus = times.T @ self.gaps.sum(axis=1)
        values["overconfidence"] = np.divide(-surplus, total, out=np.full(len(total), np.nan), where=total > 0)
        return values


@dataclass(frozen=True)
class Whole:
    """All images of a test side.

    Attributes:
        labels: (N,).
        scores: (N, C).
        codes: (N,), patients 0..G-1.
        size: G.
        classes: names.
        malignant: names.
    """

    labels: NDArray[np.int64]
    scores: Floats
    codes: NDArray[np.int64]
    size: int
    classes: list[str]
    malignant: list[str]

    @classmethod
    def of(cls, predictions: pd.DataFrame, codes: NDArray[np.int64], schema: DatasetSchema) -> Whole:
        """Take rows of `predictions.csv`; `codes`: (N,), patients 0..G-1."""
        position = {name: index for index, name in enumerate(schema.classes)}
        labels = predictions["label"].map(position).to_numpy(dtype=np.int64)
        truth, scores = check_predictions(labels, predictions[[f"prob_{name}" for name in schema.classes]].to_numpy(dtype=float))
        return cls(truth, scores, codes, int(codes.max()) + 1, list(schema.classes), list(schema.malignant))

    @property
    def measures(self) -> list[str]:
        """Keys of `NAMES` that these classes have."""
        return [name for name in NAMES if self.malignant or not name.startswith("malignant.")]

    @property
    def cancer(self) -> NDArray[np.bool_]:
        """Which images show a cancer, (N,)."""
        return np.isin(self.classes, self.malignant)[self.labels]

    def part(self, mask: NDArray[np.bool_]) -> Part:
        """Return some of the images, ready for resamples of all patients."""
        return Part(self.labels[mask], self.scores[mask], self.codes[mask], self.classes, self.malignant, self.size)

    def patients(self, mask: NDArray[np.bool_]) -> int:
        """Return the number of patients of some images."""
        return len(np.unique(self.codes[mask]))

    def support(self, mask: NDArray[np.bool_]) -> dict[str, object]:
        """Return what `Subgroups.levels` says of some images."""
        images, patients = int(mask.sum()), self.patients(mask)
        gone = sorted(set(self.labels) - set(self.labels[mask])) if images else []
        return {
            "images": images,
            "patients": patients,
            "malignant": int(self.cancer[mask].sum()) if self.malignant else NAN,
            "measured": images >= MINIMUM_IMAGES and patients >= MINIMUM_PATIENTS,
            "missing": ", ".join(self.classes[index] for index in gone),
        }


class Side:
    """One side of a comparison: which measures have enough patients, and what the resamples gave.

    Args:
        test: the test side.
        mask: (N,), the images of this side.
        drawn: what `draw` gave for `test.part(mask)`.
        level: coverage of the intervals.
    """

    def __init__(self, test: Whole, mask: NDArray[np.bool_], drawn: dict[str, Floats], level: float) -> None:
        self.drawn, self.level, self.test = drawn, level, test
        self.point = test.part(mask).measure(np.ones((test.size, 1)))
        self.patients = test.patients(mask)
        self.enough = int(mask.sum()) >= MINIMUM_IMAGES and self.patients >= MINIMUM_PATIENTS
        self.of_class = [test.patients(mask & (test.labels == index)) for index in range(len(test.classes))]
        self.ill, self.well = test.patients(mask & test.cancer), test.patients(mask & ~test.cancer)

    def about(self, measure: str) -> int:
        """Return the number of patients that a measure is about; of the rarer kind if there are two."""
        kinds = {"malignant.sensitivity": self.ill, "malignant.specificity": self.well, "malignant.auc": min(self.ill, self.well)}
        return kinds.get(measure, self.patients)

    def bounds(self, measure: str, value: float, drawn: Floats) -> Bounds:
        """Return the interval; NaN where all resamples agree and the measure is no share."""
        if measure in _SHARES and value in (0, 1):
            return wilson_interval(int(value) * self.about(measure), self.about(measure), self.level)
        return (NAN, NAN) if _agree(drawn) else percentile_interval(drawn, self.level) or (NAN, NAN)


def compare(one: Side, other: Side | None, measure: str, level: float, counted: bool) -> dict[str, object]:
    """Return value, interval and gap of one measure of one level: what a row of `Subgroups.table` says.

    Args:
        one: the level.
        other: the images with which it is compared; None: there are none.
        measure: a key of `NAMES`.
        level: coverage of the gap's interval.
        counted: whether no comparison of the same images stands above.
    """
    classes = one.test.classes
    result: dict[str, object] = dict.fromkeys(("value", "low", "high", "others", "gap", "gap_low", "gap_high"), NAN)
    result |= {"flagged": False, "counted": counted, "classes": ""}
    if measure in _AVERAGES:
        shared = [
            name
            for name, here, there in zip(classes, one.of_class, other.of_class if other else one.of_class, strict=True)
            if min(here, there) >= MINIMUM_OF_CLASS
        ]
        result["classes"] = ", ".join(shared)
        if len(shared) < 2:
            return result
        keys = [f"per_class.{name}.{_AVERAGES[measure]}" for name in shared]
    elif one.about(measure) < MINIMUM_OF_CLASS:
        return result
    else:
        keys = [measure]
    mine, values = _stack(one.drawn, keys), float(_stack(one.point, keys).mean())
    result["value"] = values
    if measure in WITHOUT_INTERVAL:
        return result
    result["low"], result["high"] = one.bounds(measure, values, _mean(mine))
    if other is None or not other.enough or other.about(measure) < MINIMUM_OF_CLASS:
        return result
    theirs, others = _stack(other.drawn, keys), float(_stack(other.point, keys).mean())
    gap = values - others
    result |= {"others": others, "gap": gap}
    if _agree(_mean(mine)) or _agree(_mean(theirs)):
        low, high = one.bounds(measure, values, _mean(mine))
        other_low, other_high = other.bounds(measure, others, _mean(theirs))
        bounds = (gap - np.hypot(values - low, other_high - others), gap + np.hypot(high - values, others - other_low))
    else:
        # Class by class: one that vanished from a resample on either side is left out on both.
        bounds = percentile_interval(_mean(mine - theirs), level) or (NAN, NAN)
    result["gap_low"], result["gap_high"] = float(bounds[0]), float(bounds[1])
    result["flagged"] = bool(bounds[0] > 0 or bounds[1] < 0)
    return result


def _stack(values: dict[str, Floats], keys: list[str]) -> Floats:
    return np.stack([values[key] for key in keys])


def _mean(values: Floats) -> Floats:
    """Average (K, S) over the defined values of each resample; NaN if there are none."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=0)
    result: Floats = np.divide(np.where(defined, values, 0).sum(axis=0), count, out=np.full(values.shape[1], np.nan), where=count > 0)
    return result


def _agree(drawn: Floats) -> bool:
    """Return whether all resamples give the same value, or none."""
    defined = drawn[~np.isnan(drawn)]
    return not len(defined) or bool(np.ptp(defined) < 1e-12)
