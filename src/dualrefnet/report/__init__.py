"""Reports of a run and of a suite: one HTML page each, with its figures and their numbers as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportOptions:
    """Options of explanations, reports and probes."""

    images: int = 500  # test images at most, a stratified sample
    shap_images: int = 200  # the same for SHAP
    each: int = 2  # correct and incorrect predictions a class in the gallery
    label: str | None = None  # also show the Grad-CAM of this class, and only its SHAP values
    masks: Path | None = None  # lesion masks; None: `masks` in the data set's folder, if there is one
    photographs: bool = True  # show images of patients and values of single patients
    seed: int = 0
    root: Path | None = None  # the data set's folder, if it has moved since training
    cache: Path | None = None  # folder of the image stores
    device: str | None = None  # where to compute; None: a GPU if there is one
