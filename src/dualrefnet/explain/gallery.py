"""The gallery: of every class the surest right and the surest wrong answers, chosen by probability and not by looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from dualrefnet.data.masks import read_mask
from dualrefnet.evaluation.opened_run import OpenedRun
from dualrefnet.explain.gradcam import gradcam
from dualrefnet.models.inference import to_unit

RIGHT, WRONG = "surest right", "surest wrong"


@dataclass(frozen=True)
class ChosenCase:
    """A test image that the gallery shows.

    Attributes:
        image_id: its id.
        label: its class.
        predicted: the likeliest class.
        kind: `RIGHT` or `WRONG`.
        probabilities: class -> probability.
    """

    image_id: str
    label: str
    predicted: str
    kind: str
    probabilities: dict[str, float]

    @property
    def second(self) -> str:
        """The second likeliest class."""
        return sorted(self.probabilities, key=lambda name: -self.probabilities[name])[1]


def choose_cases(predictions: pd.DataFrame, groups: ArrayLike, classes: Sequence[str], each: int = 2) -> list[ChosenCase]:
    """Choose, of every class, the right answers with the highest probability and the wrong ones with the highest.

    Args:
        predictions: rows of predictions.csv: `image_id`, `label`, `predicted`, `prob_<CLASS>`.
        groups: the patient of every row; a patient is shown once for each class and kind.
        classes: in the order in which they are shown.
        each: right ones and wrong ones a class; fewer where there are no more.

    Returns:
        The cases: class by class, right before wrong, the surest first.
    """
    columns = [f"prob_{name}" for name in classes]
    table = predictions.assign(group=np.asarray(groups), confidence=predictions[columns].max(axis=1))
    # Ties by id, so that the order of the rows has no say.
    table = table.sort_values(["confidence", "image_id"], ascending=[False, True])
    right = table["label"] == table["predicted"]
    cases = []
    for name in classes:
        for kind, rows in ((RIGHT, right), (WRONG, ~right)):
            shown = table[rows & (table["label"] == name)].drop_duplicates("group").head(each)
            scores = shown[columns].to_numpy(dtype=float).tolist()
            cases += [
                ChosenCase(image_id, name, predicted, kind, dict(zip(classes, row, strict=True)))
                for image_id, predicted, row in zip(shown["image_id"], shown["predicted"], scores, strict=True)
            ]
    return cases


@dataclass(frozen=True)
class ShownCase:
    """A chosen image with all that is shown of it.

    Attributes:
        chosen: which one, and what was said.
        picture: (S, S, 3) uint8, as the model sees it.
        heats: class -> (S, S) Grad-CAM.
        mask: (S, S) True in the lesion, or None.
        answers: (name, answer, value) of the answers of the form that moved the predicted class most; empty if none is read.
    """

    chosen: ChosenCase
    picture: NDArray[np.uint8]
    heats: Mapping[str, NDArray[np.float32]]
    mask: NDArray[np.bool_] | None
    answers: list[tuple[str, str, float]]


def show_cases(
    opened: OpenedRun,
    cases: Sequence[ChosenCase],
    asked: str | None = None,
    answers: Mapping[str, list[tuple[str, str, float]]] | None = None,
    masks: Mapping[str, Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ShownCase]:
    """Look test images up and ask where they speak for the predicted class, the second, the true one and one more.

    Args:
        opened: a run of a method that reads images.
        cases: of its test side.
        asked: one more class whose heat is wanted.
        answers: image id -> the answers that counted.
        masks: image id -> mask file.
        progress: called with (images done, images in all).
    """
    examples, shown = opened.pictures("test"), []
    place = {image_id: row for row, image_id in enumerate(examples.image_ids)}
    paths = opened.dataset.table.set_index("image_id")["image_path"]
    image = opened.recipe.image
    for case in cases:
        batch = examples.batch(np.array([place[case.image_id]]))
        pictures = opened.images(batch)
        assert pictures is not None
        assert batch.images is not None
        names = list(dict.fromkeys([case.predicted, case.label, case.second, *([asked] if asked else [])]))
        targets = torch.tensor([opened.classes.index(name) for name in names], device=opened.device)
        forms = batch.metadata.to(opened.device).expand(len(names), -1)
        heat = gradcam(opened.model, pictures.expand(len(names), -1, -1, -1), forms, targets).heat.cpu().numpy()
        picture = (255 * to_unit(batch.images, image.size)).round().byte()[0].permute(1, 2, 0).numpy()
        file = (masks or {}).get(case.image_id)
        mask = read_mask(file, Path(paths.loc[case.image_id]), image.size, image.fit) if file else None
        shown.append(ShownCase(case, picture, dict(zip(names, heat, strict=True)), mask, (answers or {}).get(case.image_id, [])))
        if progress:
            progress(len(shown), len(cases))
    return shown
