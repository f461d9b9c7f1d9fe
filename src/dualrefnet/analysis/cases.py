"""Cases of the test split: the most confident right and wrong predictions of a run; probability chooses, not looks."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from dualrefnet.analysis.gradcam import gradcam, overlay, too_coarse
from dualrefnet.analysis.opened_run import OpenedRun
from dualrefnet.analysis.shap import MISSING_FLAGS
from dualrefnet.data.images import read_mask
from dualrefnet.display.figure import (
    FAINT,
    INK,
    PRIMARY,
    SECONDARY,
    WIDTH,
    ReportFigure,
    file_stem,
    new_figure,
    show_image,
    styled,
    truncate,
)
from dualrefnet.models.inference import to_unit
from dualrefnet.progress import track

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIGHT, WRONG = "right", "wrong"


@dataclass(frozen=True)
class ChosenCase:
    """A test image that the gallery shows; `kind` is `RIGHT` or `WRONG`."""

    image_id: str
    label: str
    predicted: str
    kind: str
    probabilities: dict[str, float]

    @property
    def second(self) -> str:
        return sorted(self.probabilities, key=lambda name: -self.probabilities[name])[1]


@dataclass(frozen=True)
class ShownCase:
    """A chosen image as the model sees it, its saliency by class (none if too coarse), mask, and top SHAP values."""

    chosen: ChosenCase
    image: NDArray[np.uint8]
    saliency: Mapping[str, NDArray[np.float32]]
    mask: NDArray[np.bool_] | None
    attributions: list[tuple[str, str, float]]


def choose_cases(
    predictions: pd.DataFrame, groups: ArrayLike, classes: Sequence[str], each: int = 2
) -> list[ChosenCase]:
    """Choose each class's most confident right and wrong predictions, `each` of both, and each group once for both."""
    columns = [f"prob_{name}" for name in classes]
    table = predictions.assign(group=np.asarray(groups), confidence=predictions[columns].max(axis=1))
    # Ties by id, so that the order of the rows doesn't matter.
    table = table.sort_values(["confidence", "image_id"], ascending=[False, True])
    right = table["label"] == table["predicted"]
    cases = []
    for name in classes:
        for kind, rows in ((RIGHT, right), (WRONG, ~right)):
            shown = table[rows & (table["label"] == name)].drop_duplicates("group").head(each)
            for row in shown.to_dict("records"):
                probabilities = {one: float(row[f"prob_{one}"]) for one in classes}
                cases.append(ChosenCase(row["image_id"], name, row["predicted"], kind, probabilities))
    return cases


def show_cases(
    opened: OpenedRun,
    cases: Sequence[ChosenCase],
    label: str | None = None,
    attributions: Mapping[str, list[tuple[str, str, float]]] | None = None,
    masks: Mapping[str, Path] | None = None,
) -> list[ShownCase]:
    """Compute Grad-CAM of the predicted, the true and the second class of test images, and of `label` if given."""
    examples, shown = opened.image_examples("test"), []
    places = {image_id: row for row, image_id in enumerate(examples.image_ids)}
    paths = opened.dataset.table.set_index("image_id")["image_path"]
    section, coarse = opened.recipe.image, too_coarse(opened)
    for case in track(cases, "Grad-CAM of the gallery"):
        batch = examples.batch(np.array([places[case.image_id]]))
        images = opened.images(batch)
        assert images is not None
        assert batch.images is not None
        saliency = {}
        if not coarse:
            names = list(dict.fromkeys([case.predicted, case.label, case.second, *([label] if label else [])]))
            targets = torch.tensor([opened.classes.index(name) for name in names], device=opened.device)
            metadata = batch.metadata.to(opened.device).expand(len(names), -1)
            maps = gradcam(opened.model, images.expand(len(names), -1, -1, -1), metadata, targets).saliency
            saliency = dict(zip(names, maps.cpu().numpy(), strict=True))
        image = (255 * to_unit(batch.images, section.size)).round().byte()[0].permute(1, 2, 0).numpy()
        file = (masks or {}).get(case.image_id)
        mask = read_mask(file, Path(paths.loc[case.image_id]), section.size, section.fit) if file else None
        shown.append(ShownCase(case, image, saliency, mask, (attributions or {}).get(case.image_id, [])))
    return shown


# Inches a case is high, and letters in a line beside the images.
ROW, LETTERS = 1.3, 34
MOST_CLASSES = 3
# Letters of a class's name at most: in front of its bar, and above the map. Share of the column's width that such a
# letter takes.
NAME, MAP_NAME, LETTER = 12, 9, 0.042


@styled
def draw_gallery(cases: Sequence[ShownCase], label: str, name: str, unit: str) -> ReportFigure:
    """Draw the cases of one class, one a row: image, Grad-CAM of the predicted class, probabilities, attributions."""
    maps = 1 if any(case.saliency for case in cases) else 0
    figure, axes = new_figure(ROW * len(cases), len(cases), 2 + maps, WIDTH, width_ratios=(1.0, *[1.0] * maps, 1.75))
    letters = max(len(truncate(one, NAME)) for case in cases for one, _ in _top(case.chosen))
    rows = []
    for case, (plain, *salient, beside) in zip(cases, zip(*[iter(axes)] * (2 + maps), strict=True), strict=True):
        chosen = case.chosen
        show_image(plain, case.image, chosen.kind)
        for axis in salient:
            title = f"Grad-CAM {truncate(chosen.predicted, MAP_NAME)}"
            show_image(axis, overlay(case.image, case.saliency[chosen.predicted]), title)
        _write_prediction(beside, case, max(0.24, 0.03 + LETTER * letters))
        attributions = "; ".join(f"{field} = {text}: {value:+.3f}" for field, text, value in case.attributions)
        row = {"image_id": chosen.image_id, "label": chosen.label, "predicted": chosen.predicted, "kind": chosen.kind}
        row |= {f"prob_{one}": value for one, value in chosen.probabilities.items()}  # type: ignore[misc]
        rows.append(row | {"answers": attributions})
    right = sum(case.chosen.kind == RIGHT for case in cases)
    caption = (
        f"Test images of {label} as the model sees them: the {right} most confident right and the {len(cases) - right} "
        f"most confident wrong predictions, each {unit} once."
    )
    alt = "; ".join(
        f"{row['kind']}: predicted {row['predicted']} with {_top(case.chosen)[0][1]:.0%}"
        for row, case in zip(rows, cases, strict=True)
    )
    title = f"Test images of {label}" + (f" ({name})" if name else "")
    return ReportFigure(f"gallery_{file_stem(label)}", title, caption, alt, figure, pd.DataFrame(rows))


def _write_prediction(axis: Axes, case: ShownCase, left: float) -> None:
    """Write probabilities, whose bars begin at `left`, and attributions into an empty axis, from the top, in inches."""
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(ROW, 0)
    place, longest = 0.1, 0.74 - left
    for name, value in _top(case.chosen):
        predicted, right = name == case.chosen.predicted, name == case.chosen.label
        colour = (PRIMARY if right else SECONDARY) if predicted else FAINT
        weight = "bold" if predicted else "normal"
        axis.barh(place, longest * value, 0.11, left=left, color=colour)
        axis.text(0.0, place, truncate(name, NAME), va="center", fontsize=7, fontweight=weight)
        # The probability stands behind its bar, and says which class is the true one.
        text = f"{value:.0%}" + (" true" if right else "")
        axis.text(left + 0.02 + longest * value, place, text, va="center", fontsize=7, color=INK)
        place += 0.15
    place += 0.02
    # Half a percentage point is nothing to read.
    for name, given, value in (one for one in case.attributions if abs(one[2]) >= 0.005):
        text = f"fields missing: {given}" if name == MISSING_FLAGS else f"{name} = {given}"
        sign = "−" if value < 0 else "+"
        for line in textwrap.wrap(f"{sign}{abs(100 * value):.0f}  {text}", LETTERS, subsequent_indent="     "):
            axis.text(0.0, place, line, va="center", fontsize=7)
            place += 0.115


def _top(chosen: ChosenCase) -> list[tuple[str, float]]:
    """Return the most probable classes and the true one, the most probable first."""
    top = sorted(chosen.probabilities.items(), key=lambda item: -item[1])[:MOST_CLASSES]
    if chosen.label not in dict(top):
        top[-1] = (chosen.label, chosen.probabilities[chosen.label])
    return top
