"""Availability: how much of an image and its metadata was given.

Calibration is fitted for each group of inputs by what is missing (Mondrian; Vovk 2012), and a model to which missing
metadata mean "benign" is recognised here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Share of the fields that have a value: above the first number, up to the second.
BINS = ((0.0, 0.0), (0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))
TOLERANCE = 1e-9
# Inputs with which every run is measured, where its model accepts them.
AS_RECORDED, ALWAYS_RECORDED = "as_recorded", "always_recorded"
IMAGE_ONLY, METADATA_ONLY = "image_only", "metadata_only"
# The largest fall, when metadata are missing, of the share of cancers referred or of the mean malignancy.
LARGEST_FALL = 0.10


class Availability(NamedTuple):
    """A group of inputs."""

    image: bool  # whether there is one
    above: float  # the share of fields with a value is above this ...
    to: float  # ... and at most this; 0: no field has a value

    @property
    def name(self) -> str:
        """The group in a table, such as `image, 33-67% of fields`."""
        modality = "image" if self.image else "no image"
        if self.to == 0:
            return f"{modality} only" if self.image else "nothing"
        return f"{modality}, {100 * self.above:.0f}-{100 * self.to:.0f}% of fields"

    @property
    def description(self) -> str:
        """The group within a sentence."""
        some = f"{100 * self.above:.0f} to {100 * self.to:.0f}% of the metadata fields"
        return f"{'an image' if self.image else 'no image'} and {some if self.to else 'no metadata'}"

    def contains(self, image: ArrayLike, share: ArrayLike) -> NDArray[np.bool_]:
        """Return which inputs belong to the group, (N,), by whether there is an image and `share_given`."""
        share = np.asarray(share, dtype=np.float64)
        inside = (share > self.above + TOLERANCE) & (share <= self.to + TOLERANCE)
        nothing = (self.to == 0) & (share <= TOLERANCE)
        return np.asarray((inside | nothing) & (np.asarray(image, dtype=bool) == self.image))


def share_given(missing: NDArray[np.bool_], reads_metadata: bool) -> NDArray[np.float64]:
    """Return the share of fields with a value, (N,), of `missing` (N, F); 1 for a model that reads none."""
    if not reads_metadata or not missing.shape[1]:
        return np.ones(len(missing))
    return np.asarray(1 - missing.mean(axis=1))


def availability_groups(*, reads_image: bool, needs_image: bool, reads_metadata: bool) -> list[Availability]:
    """Return the groups of inputs that a model accepts, from the least to the most; nothing at all is no input."""
    bins = BINS if reads_metadata else ((0.0, 1.0),)
    images = [False] * (not needs_image) + [True] * reads_image
    return [Availability(image, *limits) for image in images for limits in bins if image or limits[1]]


@dataclass(frozen=True)
class Thresholds:
    """Temperature and thresholds of one group of inputs, fitted on `images` validation images, `cancers` of them
    malignant.

    A class with at least the probability `threshold` is in the set (0: too few validation cases, so all classes are);
    `class_thresholds` are for sets with the same coverage within every class. `referral` is the malignancy from which a
    case is referred (0: too few cancers in validation, so all are; None: no class is malignant).
    """

    group: Availability
    temperature: float
    threshold: float
    class_thresholds: dict[str, float]
    referral: float | None
    images: int = 0
    cancers: int = 0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.group.name,
            "group": self.group._asdict(),
            "fitted_on": {"images": self.images, "cancers": self.cancers},
            "temperature": self.temperature,
            "conformal": {"threshold": self.threshold, "class_thresholds": self.class_thresholds},
            "referral": None if self.referral is None else {"threshold": self.referral},
            "remarks": list(self.notes),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Thresholds:
        group, conformal, referral = values["group"], values["conformal"], values["referral"]
        return cls(
            Availability(bool(group["image"]), float(group["above"]), float(group["to"])),
            float(values["temperature"]),
            float(conformal["threshold"]),
            {str(name): float(value) for name, value in conformal["class_thresholds"].items()},
            None if referral is None else float(referral["threshold"]),
            int(values["fitted_on"]["images"]),
            int(values["fitted_on"]["cancers"]),
            tuple(values["remarks"]),
        )


def missingness_shortcut(metrics: Mapping[str, Any]) -> str | None:
    """Return why a model must not be used where metadata may be missing, by the metrics of its run; None if it may.

    Without metadata fewer cancers reach a threshold that was fitted with them, for which the thresholds fitted without
    make up. But missing metadata must not lower the malignancy on average: over many patients the mean of calibrated
    probabilities is the share of cancers, whatever is known of each. A model whose mean falls takes missing for a sign
    of benign.
    """
    inputs = metrics.get("availability", {}).get("inputs")
    if inputs is None:
        return (
            "the effect of missing metadata on its referral of cancers was never measured (`dualrefnet evaluate RUN` "
            "measures it; then export it again)"
        )
    if IMAGE_ONLY not in inputs:
        return None

    def fall(measure: str) -> tuple[float, float] | None:
        """The measure with and without metadata, if it falls."""
        full, without = (inputs[name].get(measure) for name in (AS_RECORDED, IMAGE_ONLY))
        return None if full is None or without is None or full - without <= LARGEST_FALL else (full, without)

    referred, found, mean = map(fall, ("cancers_referred", "cancers_at_recorded_threshold", "mean_malignancy"))
    if referred is not None:
        return f"it refers {referred[0]:.0%} of the test cancers with metadata, and {referred[1]:.0%} without"
    if found is None or mean is None:
        return None
    return (
        f"without metadata the mean malignancy of the test cases falls from {mean[0]:.0%} to {mean[1]:.0%}, and the "
        f"threshold that found {found[0]:.0%} of the cancers finds {found[1]:.0%}: to this model missing means benign"
    )
