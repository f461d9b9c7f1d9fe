"""What the software says of a lesion, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Prediction:
    """What the model says of one lesion. Not a diagnosis.

    Attributes:
        label: the likeliest class.
        probabilities: class -> probability, at the run's temperature if it has one.
        malignancy: sum of the probabilities of the malignant classes; None if the data set names none.
        warnings: what was missing or odd about the input.
        out_of_scope: how unlike the training photographs the picture is (of several the most unlike); more than 1 stands among the
            warnings. None if no picture was read, or the run has no such check.
        likely: the conformal set, which holds the right class as often as `evaluation.coverage` of the run's recipe says, likeliest
            first; empty if the run has no calibration.
        refer: whether the malignancy reaches the referral threshold that was fitted for such inputs; None if no class is malignant or
            the run has no calibration.
        availability: what was given, as a group of `dualrefnet.runtime.availability`; empty if nothing was fitted for it.
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
        heat: (S, S) float32: how much the probability falls if a patch around that place is painted over with the picture's mean
            colour; negative where it rises. None without a photograph.
        fields: field -> the probability less what it would be if that answer had been left blank; answered fields only.
    """

    label: str
    probability: float
    heat: NDArray[np.float32] | None
    fields: dict[str, float]
