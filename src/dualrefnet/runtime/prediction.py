"""Taking things away, to see what an answer rests on: places of the photograph, and answers of the form."""

# also: What the software says of a lesion, and why.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A patch covers two steps of this many; neighbours overlap by half, so that an edge between two patches hides nothing.
STEPS = 8


def covered(picture: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return copies of a picture (S, S, 3), each with one patch painted over with the mean colour: (STEPS - 1)^2, row
    by row.
    """
    mean = picture.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    copies = []
    for rows, columns in _patches(len(picture)):
        copy = picture.copy()
        copy[rows, columns] = mean
        copies.append(copy)
    return copies


def spread_out(values: NDArray[np.floating], side: int) -> NDArray[np.float32]:
    """Lay one number a patch over the picture (side, side): at each place the mean of the patches that cover it,
    smoothed.
    """
    total, times = np.zeros((side, side)), np.zeros((side, side))
    for value, (rows, columns) in zip(values, _patches(side), strict=True):
        # A patch says most of its middle.
        weight = np.outer(_tent(rows), _tent(columns))
        total[rows, columns] += value * weight
        times[rows, columns] += weight
    return np.asarray(total / times, dtype=np.float32)


def answers_apart(form: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return copies of a form, each without one of the named answers."""
    return [{name: value for name, value in form.items() if name != left_out} for left_out in names]


def _patches(side: int) -> list[tuple[slice, slice]]:
    edges = [round(side * step / STEPS) for step in range(STEPS + 1)]
    along = [slice(edges[step], edges[step + 2]) for step in range(STEPS - 1)]
    return [(rows, columns) for rows in along for columns in along]


def _tent(places: slice) -> NDArray[np.float64]:
    """Return weights along a patch that fall from its middle to its ends, never to zero."""
    length = places.stop - places.start
    middle = (length - 1) / 2
    return np.asarray(1 - np.abs(np.arange(length) - middle) / (middle + 1))


@dataclass(frozen=True)
class Prediction:
    """What the model says of one lesion. Not a diagnosis.

    Attributes:
        label: the likeliest class.
        probabilities: class -> probability, at the run's temperature if it has one.
        malignancy: sum of the probabilities of the malignant classes; None if the data set names none.
        warnings: what was missing or odd about the input.
        out_of_scope: how unlike the training photographs the picture is (of several the most unlike); more than 1
            stands among the
            warnings. None if no picture was read, or the run has no such check.
        likely: the conformal set, which holds the right class as often as `evaluation.coverage` of the run's recipe
            says, likeliest
            first; empty if the run has no calibration.
        refer: whether the malignancy reaches the referral threshold that was fitted for such inputs; None if no class
            is malignant or
            the run has no calibration.
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
    """What an answer rests on, found by taking things away and asking again; in probability of `label`.

    Attributes:
        label: the class that was asked about.
        probability: what the model gives it.
        saliency: (S, S) float32: how much the probability falls if a patch around that place is painted over with the
            picture's mean
            colour; negative where it rises. None without a photograph.
        fields: field -> the probability less what it would be if that answer had been left blank; answered fields only.
    """

    label: str
    probability: float
    saliency: NDArray[np.float32] | None
    fields: dict[str, float]
