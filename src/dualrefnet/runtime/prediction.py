"""Predictions and their explanation by occlusion: parts of the image and values of the metadata are left out."""

# ruff: noqa: B905 (zip of Python 3.9 can't be strict)
from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# A patch spans two of so many steps along a side: neighbours overlap by half, so that no edge stays visible.
STEPS = 8
# Opacity of the most salient place.
RED = 0.7


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

    def __repr__(self) -> str:
        parts = [f"{self.label} {self.probabilities[self.label]:.2f}"]
        parts += [f"likely {', '.join(self.likely)}"] if self.likely else []
        parts += [] if self.malignancy is None else [f"malignancy {self.malignancy:.2f}"]
        parts += [] if self.refer is None else ["refer" if self.refer else "no referral"]
        parts += [f"{len(self.warnings)} warnings"] if self.warnings else []
        return f"Prediction({'; '.join(parts)})"


@dataclass(frozen=True)
class Explanation:
    """How the probability of `label` changes when parts of the input are left out.

    Attributes:
        label: the class that is explained.
        probability: of that class.
        saliency: (S, S) float32: how much the probability falls if a patch around that pixel is occluded with the
            image's mean colour; negative where it rises. None without an image.
        fields: field -> the probability less what it would be without that value; fields with a value only.
        image: (S, S, 3) as the model read it; None without an image.
    """

    label: str
    probability: float
    saliency: NDArray[np.float32] | None = field(repr=False)
    fields: dict[str, float]
    image: NDArray[np.uint8] | None = field(default=None, repr=False)

    def save(self, path: Path | str) -> list[Path]:
        """Write the saliency over the image as a PNG file, and the table of the fields beside it; return the files."""
        path = Path(path)
        table = path.with_suffix(".csv")
        table.parent.mkdir(parents=True, exist_ok=True)
        with table.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["field", "change"])
            rows.writerows((name, f"{change:.6f}") for name, change in self.fields.items())
        if self.image is None or self.saliency is None:
            return [table]
        picture = path.with_suffix(".png")
        Image.fromarray(self.overlay()).save(picture)
        return [picture, table]

    def overlay(self) -> NDArray[np.uint8]:
        """Return the image (S, S, 3) with what speaks for the class in red; ValueError: there is no image."""
        if self.image is None or self.saliency is None:
            raise ValueError("an explanation without an image has no saliency")
        falls = np.clip(self.saliency, 0, None)
        opacity = (RED * falls / max(float(falls.max()), 1e-12))[..., None]
        return np.asarray(np.rint((1 - opacity) * self.image + opacity * np.array([255, 0, 0])), dtype=np.uint8)


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
