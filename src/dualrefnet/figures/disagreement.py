"""Photographs that one run gets right and another wrong, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from dualrefnet.explain.disagreement import Disagreement
from dualrefnet.explain.gallery import ShownCase
from dualrefnet.figures.gradcam import overlay
from dualrefnet.figures.picture import WIDTH, Picture, new_figure, shortened, styled

COLUMNS = ("predicted_a", "predicted_b", "p_true_a", "p_true_b")
# Letters that fit above a panel, and those of a class's name among them.
LINE, NAME = 20, 13


@styled
def draw_disagreement(found: Disagreement, cases: Sequence[tuple[ShownCase, ShownCase | None]], names: tuple[str, str]) -> Picture:
    """Draw one case a row: the photograph, and what each of two runs said and where it looked.

    Args:
        found: what the cases were chosen from.
        cases: what each run makes of the same image; None for the second if it reads no image.
        names: of the two runs.
    """
    said_of = {row[0]: row[1:] for row in found.chosen[["image_id", "label", *COLUMNS]].itertuples(index=False, name=None)}
    titles = {
        image_id: (_words(names[0], label, said_a, sure_a), _words(names[1], label, said_b, sure_b))
        for image_id, (label, said_a, said_b, sure_a, sure_b) in said_of.items()
    }
    lines = max(title.count("\n") + 1 for pair in titles.values() for title in pair)
    rows, data = len(cases), []
    figure, axes = new_figure(rows * (WIDTH / 3 + 0.12 + 0.12 * lines), rows, 3)
    for (first, second), (plain, left, right) in zip(cases, zip(*[iter(axes)] * 3, strict=True), strict=True):
        label, said_a, said_b, sure_a, sure_b = said_of[first.chosen.image_id]
        _panel(plain, first.picture, f"true: {shortened(label, NAME)}")
        sides = ((left, first, said_a, sure_a), (right, second, said_b, sure_b))
        for (axis, case, said, sure), name, title in zip(sides, names, titles[first.chosen.image_id], strict=True):
            picture = first.picture if case is None else overlay(case.picture, case.heats[said])
            _panel(axis, picture, title)
            data.append((first.chosen.image_id, label, name, said, sure))
    counts = found.counts
    caption = (
        f"Of {len(found.table)} test photographs that both runs were tested on, both are right on {counts['both_right']}, only "
        f"{names[0]} on {counts['only_a_right']}, only {names[1]} on {counts['only_b_right']}, none on {counts['both_wrong']}. Shown are "
        "those in which the probabilities of the true class differ most, a patient once, classes in turn; with the predicted class, the "
        "probability of the true one, and the heat of the predicted class (Grad-CAM)."
    )
    if any(second is None for _, second in cases):
        caption += f" {names[1]} reads no photograph, so it has no heat."
    alt = "; ".join(f"true {label}: {name} says {said}, {sure:.0%} for {label}" for _, label, name, said, sure in data)
    frame = pd.DataFrame(data, columns=["image_id", "label", "run", "predicted", "probability_of_true_class"])
    return Picture("disagreement", f"Where {names[0]} and {names[1]} differ", caption, alt, figure, frame)


def _panel(axis: Axes, picture: NDArray[np.uint8], title: str) -> None:
    axis.imshow(picture, interpolation="none")
    axis.set_title(title, fontsize=7, fontweight="normal")
    axis.set_axis_off()


def _words(name: str, label: str, said: str, sure: float) -> str:
    """Say above a panel what a run said of an image, in lines that fit; a run's name is never cut, it may differ at its end."""
    parts = (f"{shortened(said, NAME)}, {'right' if said == label else 'wrong'}", f"{shortened(label, NAME)} {sure:.0%}")
    line = "; ".join(parts)
    return "\n".join([textwrap.fill(name, LINE), *([line] if len(line) <= LINE else parts)])
