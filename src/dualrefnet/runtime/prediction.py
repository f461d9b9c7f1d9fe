"""Predictions and their explanation by occlusion: parts of the image and values of the metadata are left out."""

# ruff: noqa: B905 (zip of Python 3.9 can't be strict)
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# A patch spans two of so many steps along a side: neighbours overlap by half, so that no edge stays visible.
STEPS = 8


@dataclass(frozen=True)
class Prediction:
    """The prediction for one lesion. Not a diagnosis.

    Attributes:
        label: the likeliest class.
        probabilities: class -> probability, calibrated if the run has a calibration.
        malignancy: sum of the probabilities of the malignant classes; None if the data set names none.
        warnings: what was missing or unusual about the input.
        out_of_scope: out-of-distribution score of the image (of several the largest); more than 1 is among the
            warnings. None if no image was read, or the run has no such score.
        likely: the conformal set, which holds the right class as often as `evaluation.coverage` of the run's recipe
            says, likeliest first; empty if the run has no calibration.
        refer: whether the malignancy reaches the referral threshold that was fitted for such inputs; None if no class
            is malignant or the run has no calibration.
        availability: what was given, as a group of `dualrefnet.runtime.availability`; empty if nothing was fitted for
            it.
    """

    label: str
    probabilities: dict[str, float]
    malignancy: float | None
    warnings: list[str] = field(default_factory=list)
    out_of_scope: float | None = None
    likely: tuple[str, ...] = ()
    refer: bool | None = None
    availability: str = ""


@dataclass(frozen=True)
class Explanation:
    """How the probability of `label` changes when parts of the input are left out.

    Attributes:
        label: the class that is explained.
        probability: of that class.
        saliency: (S, S) float32: how much the probability falls if a patch around that pixel is occluded with the
            image's mean colour; negative where it rises. None without an image.
        fields: field -> the probability less what it would be without that value; fields with a value only.
    """

    label: str
    probability: float
    saliency: NDArray[np.float32] | None
    fields: dict[str, float]


def occlude(image: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return copies of an image (S, S, 3), each with one patch in the mean colour: (STEPS - 1)^2, row by row."""
    mean = image.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    copies = []
    for rows, columns in _patches(len(image)):
        copy = image.copy()
        copy[rows, columns] = mean
        copies.append(copy)
    return copies


def saliency_map(values: NDArray[np.floating], side: int) -> NDArray[np.float32]:
    """Spread one value a patch over (side, side): at each pixel the weighted mean of the patches that hold it."""
    total, weights = np.zeros((side, side)), np.zeros((side, side))
    for value, (rows, columns) in zip(values, _patches(side)):
        # A patch says most about its middle.
        weight = np.outer(_tent(rows), _tent(columns))
        total[rows, columns] += value * weight
        weights[rows, columns] += weight
    return np.asarray(total / weights, dtype=np.float32)


def _patches(side: int) -> list[tuple[slice, slice]]:
    edges = [round(side * step / STEPS) for step in range(STEPS + 1)]
    along = [slice(edges[step], edges[step + 2]) for step in range(STEPS - 1)]
    return [(rows, columns) for rows in along for columns in along]


def _tent(along: slice) -> NDArray[np.float64]:
    """Return weights that fall from the middle of a patch to its ends, never to zero."""
    length = along.stop - along.start
    middle = (length - 1) / 2
    return np.asarray(1 - np.abs(np.arange(length) - middle) / (middle + 1))
