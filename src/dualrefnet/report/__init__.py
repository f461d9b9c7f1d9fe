"""Reports of a run and of a suite: one HTML page each, with its figures and their numbers as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportOptions:
    """Options of explanations and reports: at most `images` (`shap_images`) test images, a stratified sample; `each`
    correct and incorrect predictions a class in the gallery; `label`, also show the Grad-CAM of this class, and only
    its SHAP values; `masks`, see `OpenedRun.masks`; `photographs`, show images of patients and values of single
    patients.
    """

    images: int = 500
    shap_images: int = 200
    each: int = 2
    label: str | None = None
    masks: Path | None = None
    photographs: bool = True
    seed: int = 0
