"""Runs whose model is made by hand, so that what its score leans on is known: its data are pictures and forms that
spell the answer.
"""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.data.schema import Dataset
from dualrefnet.data.store import ImageStore
from dualrefnet.models.base import Architecture, Method, Output
from dualrefnet.models.encoders import Encoded, EncoderOutput
from dualrefnet.recipe import ModelSection

SIDE, RADIUS = 64, 8
CENTRE, CORNER = (32, 32), (3, 3)
# Grey of the pictures, and of class c the colour of what spells it.
SKIN, FIRST, STEP = 230, 15, 30
# Fields that are missing for one class each, and whose flags therefore spell it; none of them is asked for otherwise.
FLAGGED = ("smoke", "drink", "pesticide", "skin_cancer_history", "cancer_history", "has_piped_water")


class HandMade(Method):
    """Reads one pixel of the picture, the age, or the flags of `FLAGGED`, and takes it for the class.

    Attributes:
        pairs: what was asked: the row that the picture's pixel spells, and the age, one a question.
    """

    title, reference = "Hand-made", "these tests"

    def __init__(self, opened: OpenedRun, looks_at: str) -> None:
        section = ModelSection.model_validate({"method": "concat"})
        super().__init__(
            Architecture(
                image_size=SIDE, metadata_width=opened.metadata.width, classes=len(opened.classes), section=section
            ),
            [],
        )
        self.opened, self.looks_at = opened, looks_at
        self.pairs: list[tuple[int, int]] = []

    def read(self, image: Tensor) -> Encoded:
        mean, sd = (torch.tensor(values)[None, :, None, None] for values in self.opened.normalisation)
        pixels = (image * sd + mean) * 255
        # Red of both places spells the class, green and blue of the corner the row.
        places = [pixels[:, :, *place] for place in (CENTRE, CORNER)]
        return Encoded((EncoderOutput(None, torch.cat(places, dim=1)),))

    def classify(self, images: Encoded, metadata: Tensor) -> Output:
        names, classes = self.opened.metadata.names, len(self.opened.classes)
        index = names.index("age")
        field = [one.name for one in self.opened.metadata.fields].index("age")
        age = metadata[:, index] * self.opened.metadata.std[field] + self.opened.metadata.mean[field]
        if images.outputs:
            rows = images.first.vector[:, 4].round() + 200 * images.first.vector[:, 5].round()
            self.pairs += list(zip(rows.int().tolist(), age.round().int().tolist(), strict=True))
        if self.looks_at == "flags":
            scores = torch.stack([metadata[:, names.index(f"missing_{name}")] for name in FLAGGED], dim=1)
            return Output(20 * scores, metadata, metadata, None, {})
        if self.looks_at == "age":
            number = age // 10
        else:
            red = images.first.vector[:, 0 if self.looks_at == "centre" else 3]
            number = (red - FIRST) / STEP
        nearest = number.round().clamp(0, classes - 1).long()
        return Output(20 * torch.nn.functional.one_hot(nearest, classes).float(), metadata, metadata, None, {})


class FormOnly(HandMade):
    reads_image = False


class PictureOnly(HandMade):
    reads_metadata = False
    needs_metadata = False


def hand_made(
    opened: OpenedRun, folder: Path, looks_at: str, model: type[HandMade] = HandMade, ages: bool = True
) -> OpenedRun:
    """Return a run whose pictures, ages and gaps spell the class, and whose model looks at one of them.

    Args:
        opened: of the drawn sample.
        folder: new or empty.
        looks_at: centre, corner, age or flags.
        model: HandMade or one that reads only a part.
        ages: spell the class; else the row.
    """
    table = opened.dataset.table.copy()
    codes = table["label"].map({name: index for index, name in enumerate(opened.classes)}).to_numpy()
    table["age"] = (codes * 10.0 + 5) if ages else np.arange(len(table), dtype=float)
    for field in opened.dataset.schema.fields:
        if field.name in FLAGGED:
            table[field.name] = "True"
    for index, name in enumerate(FLAGGED):
        table.loc[codes == index, name] = np.nan
    pictures = np.full((len(table), SIDE, SIDE, 3), SKIN, np.uint8)
    (folder / "masks").mkdir(parents=True)
    mask = cv2.circle(np.zeros((SIDE, SIDE), np.uint8), CENTRE, RADIUS, 255, -1)
    for row, code in enumerate(codes):
        colour = FIRST + STEP * code
        pictures[row][mask > 0] = [colour, 90, 90]
        pictures[row, :7, :7] = [colour, row % 200, row // 200]
        cv2.imwrite(str(folder / "masks" / f"{table['image_id'][row]}.png"), mask)
    pictures.tofile(folder / "images.u8")
    store = ImageStore(folder, tuple(table["image_id"]), SIDE, {})
    recipe = opened.recipe.model_copy(update={"image": opened.recipe.image.model_copy(update={"size": SIDE})})
    changed = replace(
        opened,
        dataset=Dataset(table, opened.dataset.schema, folder),
        store=None if model is FormOnly else store,
        recipe=recipe,
    )
    return replace(changed, model=model(changed, looks_at).eval())
