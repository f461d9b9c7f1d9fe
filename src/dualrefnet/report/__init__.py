"""Pages: of a run, and of a suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReportOptions:
    """Choices for the explanations.

    Attributes:
        images: test images at most that are looked at, each class in proportion; of SHAP as `shap_images`.
        shap_images: those whose answers are weighed.
        each: right ones and wrong ones a class in the gallery.
        label: also show where photographs speak for this class.
        masks: folder of lesion masks; None: `masks` in the data set's folder, if there is one.
        photographs: show photographs of patients and single patients' answers.
        seed: of all choices.
    """

    images: int = 500
    shap_images: int = 200
    each: int = 2
    label: str | None = None
    masks: Path | None = None
    photographs: bool = True
    seed: int = 0
