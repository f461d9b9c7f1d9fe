"""A stand-in for a predictor, and what tests of prediction into a CSV share."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from dualrefnet.data.images import decode_image
from dualrefnet.deploy.batch import Cases, ModelFolder, Summary, csv_lines, predict_here, predict_to_csv
from dualrefnet.errors import DataError
from dualrefnet.runtime.prediction import Prediction


@dataclass
class Field:
    name: str


class Coloured:
    """Stands for a predictor: how red a picture is, and the age of its form."""

    classes = ("BLUE", "RED")
    fields = (Field("age"), Field("region"))
    reads_image = True

    def __init__(self, needs_image: bool = True, seconds: float = 0.0) -> None:
        self.needs_image = needs_image
        self.seconds = seconds
        self.batches: list[int] = []

    def check_metadata(self, form: Mapping[str, str]) -> None:
        if not form.get("age", "0").isdigit():
            raise DataError("age must be\na number")

    def prepare(self, image: Path | None) -> np.ndarray | None:
        return None if image is None else decode_image(image)

    def predict_arrays(
        self, prepared: Sequence[np.ndarray | None], metadata: Sequence[Mapping[str, str]]
    ) -> list[Prediction]:
        time.sleep(self.seconds)
        self.batches.append(len(prepared))
        answers = []
        for picture, form in zip(prepared, metadata, strict=True):
            red = 0.5 if picture is None else float(picture[..., 0].mean()) / 255
            said = [f"age {form['age']}"] if "age" in form else []
            answers.append(
                Prediction(
                    "RED" if red > 0.5 else "BLUE", {"BLUE": 1 - red, "RED": red}, red, said, 0.25, ("RED",), red > 0.5
                )
            )
        return answers


def draw(folder: Path, names: Sequence[str]) -> list[Path]:
    """Draw a picture a name, each of another red."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        picture = np.zeros((16, 16, 3), np.uint8)
        picture[..., 2] = 255 * number // len(names)
        cv2.imwrite(str(folder / name), picture)
    return [folder / name for name in names]


def predict(model: Any, cases: Cases, out: Path, folder: Path, batch: int = 4, resume: bool = False) -> Summary:
    """Predict as the command does; `folder` holds what stands for the model's files."""
    folder.mkdir(exist_ok=True)
    work = partial(predict_here, model, batch=batch, workers=2)
    return predict_to_csv(ModelFolder(folder), model.classes, cases, out, work, batch=batch, resume=resume)


def table_of(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    path.write_bytes(csv_lines(rows))
    return path
