"""Availability: how much of an image and its metadata was given. Calibration is fitted for each of its groups
(Mondrian; Vovk 2012).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Share of the fields that have a value: above the first number, up to the second.
SHARES = ((0.0, 0.0), (0.0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.0))
TOLERANCE = 1e-9
# Inputs that every run is measured with, where it can answer them.
AS_RECORDED, ALWAYS_RECORDED, IMAGE_ONLY, METADATA_ONLY = (
    "as_recorded",
    "always_recorded",
    "image_only",
    "metadata_only",
)
# The largest fall, when metadata are blank, of the share of cancers referred, or of the mean malignancy, of a model
# that may be used.
LARGEST_FALL = 0.10


class Availability(NamedTuple):
    """A group of inputs.

    Attributes:
        image: whether there is an image.
        above: the share of the fields with a value is above this ...
        to: ... and at most this; 0: no field has a value.
    """

    image: bool
    above: float
    to: float

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
        fields = (
            "no metadata" if self.to == 0 else f"{100 * self.above:.0f} to {100 * self.to:.0f}% of the metadata fields"
        )
        return f"{'an image' if self.image else 'no image'} and {fields}"

    def contains(self, image: ArrayLike, share: ArrayLike) -> NDArray[np.bool_]:
        """Return which inputs belong to the group, (N,).

        Args:
            image: (N,), whether there is an image.
            share: (N,), of the fields with a value; 1 for a model that reads none.
        """
        share = np.asarray(share, dtype=np.float64)
        inside = (share > self.above + TOLERANCE) & (share <= self.to + TOLERANCE)
        return np.asarray(
            (inside | ((self.to == 0) & (share <= TOLERANCE))) & (np.asarray(image, dtype=bool) == self.image)
        )


def share_given(missing: NDArray[np.bool_], reads_metadata: bool) -> NDArray[np.float64]:
    """Return which share of the fields has a value, (N,), from which are missing, (N, F); 1 for a model that reads
    none.
    """
    if not reads_metadata or not missing.shape[1]:
        return np.ones(len(missing))
    return np.asarray(1 - missing.mean(axis=1))


def availability_groups(*, reads_image: bool, needs_image: bool, reads_metadata: bool) -> list[Availability]:
    """Return the groups of inputs that a model can answer, from the least to the most; nothing at all is no input."""
    shares = SHARES if reads_metadata else ((0.0, 1.0),)
    images = [False] * (not needs_image) + [True] * reads_image
    return [Availability(image, *share) for image in images for share in shares if image or share[1]]


@dataclass(frozen=True)
class Thresholds:
    """What holds for the inputs of one group.

    Attributes:
        group: which inputs.
        temperature: see `dualrefnet.runtime.calibration.apply_temperature`.
        threshold: a class with at least this probability is in the set; 0: too few validation cases, so all classes
            are.
        class_thresholds: class -> the same for sets that keep the promise within every class.
        referral: malignancy from which a case is referred; 0: too few cancers in validation, so all are; None: no class
            is malignant.
        images: validation images on which they were fitted.
        cancers: how many of these show one.
        remarks: what is weak about the fit, in sentences.
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
        """Return one group of `calibration.json`."""
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
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Read one group of a `calibration.json`.

        Raises:
            KeyError, TypeError: a key is missing, or a value has the wrong type.
        """
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
    """Say why a run must not answer patients whose metadata may be blank; None if it may.

    Blank metadata leave less to go by, so that fewer cancers reach a threshold that was fitted with metadata, and the
    thresholds that were
    fitted without answer for that. But they must not lower the malignancy on average: over many patients the mean of
    calibrated
    probabilities is the share of cancers, whatever is known of each. A model whose mean falls takes missing for a sign
    of benign.

    Args:
        metrics: of the run, or of its bundle.
    """
    inputs = metrics.get("availability", {}).get("inputs")
    if inputs is None:
        return "what blank metadata do to its referral of cancers was never measured (`dualrefnet evaluate RUN` does it; then export it again)"
    if IMAGE_ONLY not in inputs:
        return None

    def fall(measure: str) -> tuple[float, float, bool]:
        full, blank = (inputs[name].get(measure) for name in (AS_RECORDED, IMAGE_ONLY))
        return (
            (full, blank, full - blank > LARGEST_FALL) if full is not None and blank is not None else (0.0, 0.0, False)
        )

    full, blank, falls = fall("cancers_referred")
    if falls:
        return f"it refers {full:.0%} of the test cancers with their metadata, and {blank:.0%} when these are blank"
    full, blank, falls = fall("cancers_at_recorded_threshold")
    before, after, shifts = fall("mean_malignancy")
    if not falls or not shifts:
        return None
    return (
        f"when the metadata of the test cases are blank their mean malignancy falls from {before:.0%} to {after:.0%}, and the threshold "
        f"that found {full:.0%} of the cancers finds {blank:.0%}: to this model missing means benign"
    )
